"""Channel: webhooks in, replies out."""

from infra.security.subjects import SubjectKeys
from infra.service.service import Service
from services.channel import accounts, api, attachments, changes, handlers, tenants
from services.channel.drainer import Drainer
from services.channel.ingest import ACCEPTED, ingest
from services.channel.previews import previews
from services.channel.projections import READ_MODELS
from services.channel.publishing import DELIVERY, MESSAGE, REPLAYED
from services.channel.sender import sender
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
