"""Starts notification: sends e-mails to people."""

from infra.security.subjects import erasure
from infra.service.service import Service
from services.notification import adapters, api, handlers
from services.notification.settings import NotificationSettings

service = Service("notification", NotificationSettings)
service.serve_http(api.routes)
service.consume(handlers.queue_email, notifications=adapters.notifications)
service.consume(handlers.record_push)
service.consume(erasure("notification"))
service.work(handlers.send_email, notifications=adapters.notifications, owners=adapters.owners, mailer=adapters.mailer)

if __name__ == "__main__":
    service.run()
