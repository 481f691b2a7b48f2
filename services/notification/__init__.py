"""Notification. Owns: notifications, webhook endpoints of tenants.

Handles: notification.v1.SendEmail, notification.v1.SendPush, user.v1.SubjectErased, and the public facts of
agent.events, channel.events and platform.events. Serves: HTTP ``/api/v1/notifications``,
``/api/v1/webhook-endpoints``. Calls: the user service's gRPC ``Directory``; a mail server; tenants' endpoints.
"""
