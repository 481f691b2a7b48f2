"""Agent: answers messages of people."""

from infra.security.subjects import erasure
from infra.service.service import Service
from services.agent import adapters, api, handlers, tenants
from services.agent.definitions.store import SEALED
from services.agent.execution import wiring
from services.agent.learning.wiring import learner
from services.agent.read_models import READ_MODELS
from services.agent.runs.publishing import REPLAYED
from services.agent.sessions.publishing import SESSION
from services.agent.settings import AgentSettings

service = Service("agent", AgentSettings)
service.own(SESSION, REPLAYED)
service.project(*READ_MODELS)
service.seal(*SEALED)
service.serve_http(api.routes)
for subscription in handlers.TAKE_MESSAGES:
    service.consume(subscription, subjects=adapters.subjects)
service.consume(handlers.change_message, subjects=adapters.subjects)
service.consume(handlers.keep_answer, subjects=adapters.subjects)
service.consume(handlers.wake)
service.consume(handlers.take_learning)
service.consume(handlers.on_message_delivered)
service.consume(handlers.on_message_undelivered)
service.consume(erasure("agent"))
service.erase_tenants(before=tenants.end_work)
service.work(handlers.skip_gap, subjects=adapters.subjects)
service.work(handlers.execute_run, executor=wiring.executor)
service.work(handlers.learn_from_run, learner=learner)

if __name__ == "__main__":
    service.run()
