"""Channel: webhooks in, replies out."""

from infra.security.subjects import SubjectKeys
from infra.service.service import Service
from services.channel import api, handlers, tenants
from services.channel.accounts import store as accounts
from services.channel.deliveries.previews import previews
from services.channel.deliveries.sender import sender
from services.channel.files import attachments
from services.channel.intake import changes
from services.channel.intake.drainer import Drainer
from services.channel.intake.ingest import ACCEPTED, ingest
from services.channel.projections import READ_MODELS
from services.channel.publishing import DELIVERY, MESSAGE, REPLAYED
from services.channel.settings import ChannelSettings

service = Service("channel", ChannelSettings)
service.own(REPLAYED, DELIVERY, MESSAGE)
service.project(*READ_MODELS)
service.seal(*accounts.SEALED, ACCEPTED)
service.serve_http(api.routes)
service.beside("drainer", lambda runtime: Drainer(ingest(runtime)))
service.beside("previews", previews)
service.consume(handlers.enqueue_deliveries, subjects=lambda runtime: SubjectKeys(runtime.cipher))
service.consume(handlers.erase_subject)
service.erase_tenants(before=tenants.delete_files, notes=("attachment",))
service.work(attachments.fetch_attachments, fetcher=attachments.fetcher)
service.work(attachments.erase_files, fetcher=attachments.fetcher)
service.work(attachments.forget_documents, memory=attachments.memory_stub)
service.consume(attachments.queue_erasure)
service.work(changes.apply_change, subjects=lambda runtime: SubjectKeys(runtime.cipher))
service.work(handlers.skip_gap)
service.work(handlers.deliver, sender=sender)

if __name__ == "__main__":
    service.run()
