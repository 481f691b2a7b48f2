"""Notification. Owns: notifications.

Handles: notification.v1.SendEmail, notification.v1.SendPush, user.v1.SubjectErased. Serves: HTTP
``/api/v1/notifications``. Calls: the user service's gRPC ``Directory``; a mail server.
"""
