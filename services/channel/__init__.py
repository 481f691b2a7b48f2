"""Channel. Owns: channel accounts, inbound messages, deliveries.

Handles: channel.v1.SendMessage, user.v1.SubjectErased.
Publishes: channel.v1.MessageReceived, MessageDelivered, MessageUndelivered, AccountBroken. Sends: MessageReceived and
MessageChanged to the agent, notification.v1.SendEmail. Serves: ``/webhooks/…``, ``/api/v1/channels``,
``/api/v1/channel-types``, ``/api/v1/deliveries``.
"""
