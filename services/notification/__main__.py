"""Starts notification: sends e-mails to people, and events to tenants' webhook endpoints."""

from infra.security.subjects import erasure
from infra.service.service import Service
from services.notification import adapters, api, handlers, notifications
from services.notification.retention import Retention
from services.notification.settings import NotificationSettings
from services.notification.webhooks import endpoints
from services.notification.webhooks import handlers as webhooks

service = Service("notification", NotificationSettings)
service.seal(notifications.SEALED, *endpoints.SEALED)
service.serve_http(api.routes)
service.beside("retention", lambda runtime: Retention(runtime.worker))
service.consume(handlers.queue_email, notifications=adapters.notifications)
service.consume(handlers.record_push)
service.consume(webhooks.queue_run_events)
service.consume(webhooks.queue_channel_events)
service.consume(webhooks.queue_platform_events)
service.consume(erasure("notification"))
service.erase_tenants()
service.work(handlers.send_email, notifications=adapters.notifications, owners=adapters.owners, mailer=adapters.mailer)
service.work(
    webhooks.post_webhook,
    outgoing=lambda runtime: runtime.outgoing,
    secrets=lambda runtime: endpoints.EndpointSecrets(runtime.cipher),
    notifications=adapters.notifications,
)

if __name__ == "__main__":
    service.run()
