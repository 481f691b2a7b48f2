"""Channel. Owns: channel accounts, inbound messages, deliveries.

Handles: channel.v1.SendMessage, user.v1.SubjectErased.
Publishes: channel.v1.MessageReceived, MessageDelivered, MessageUndelivered, AccountBroken. Sends: MessageReceived and
MessageChanged to the agent, notification.v1.SendEmail. Serves: ``/webhooks/…``, ``/api/v1/channels``,
``/api/v1/channel-types``, ``/api/v1/deliveries``.

Rooms, each importing only those below: intake (vendors' calls, into their conversations), deliveries (replies, to the
vendor), files (of messages), accounts (credentials, and which agent gets a message), vendors (one module for each).
"""
