"""The kinds of Slack's messages, events and interactions.

https://docs.slack.dev/reference/events/message, https://docs.slack.dev/reference/interaction-payloads
"""

from __future__ import annotations

from collections.abc import Mapping

_ABOUT_THE_CHANNEL = "a notice about the channel"
_NOT_OFFERED = "the bot does not offer it"
_BOTS = "a bot's message"
_NO_MESSAGE = "no person writes it to the bot"

# By the subtype of the message, then by the type of the event and of the interaction. Empty: it is read; else why it is
# ignored.
KINDS: Mapping[str, str] = {
    "message": "",
    "message.file_share": "",
    "message.file_comment": "",
    "message.thread_broadcast": "",
    "message.me_message": "",
    "message.message_changed": "",
    "message.message_deleted": "",
    "message.bot_message": _BOTS,
    "message.assistant_app_thread": _NO_MESSAGE,
    "message.huddle_thread": _NO_MESSAGE,
    "message.message_replied": "the answer is an event of its own",
    "message.reply_broadcast": "the answer is an event of its own",
    "message.document_mention": "a mention in a canvas",
    "message.file_mention": "a file was mentioned",
    "message.ekm_access_denied": "Slack may not show the message",
    "message.reminder_add": _NO_MESSAGE,
    **dict.fromkeys(
        [
            f"message.{name}"
            for name in (
                "bot_add",
                "bot_remove",
                "channel_archive",
                "channel_convert_to_private",
                "channel_join",
                "channel_leave",
                "channel_name",
                "channel_posting_permissions",
                "channel_purpose",
                "channel_topic",
                "channel_unarchive",
                "group_archive",
                "group_join",
                "group_leave",
                "group_name",
                "group_purpose",
                "group_topic",
                "group_unarchive",
                "pinned_item",
                "unpinned_item",
            )
        ],
        _ABOUT_THE_CHANNEL,
    ),
    "event.app_mention": "",
    "event.reaction_added": "",
    "event.reaction_removed": "",
    "event.channel_id_changed": "",
    "event.app_home_opened": _NO_MESSAGE,
    "event.app_uninstalled": _NO_MESSAGE,
    "event.tokens_revoked": _NO_MESSAGE,
    "event.assistant_thread_started": _NO_MESSAGE,
    "event.assistant_thread_context_changed": _NO_MESSAGE,
    "event.function_executed": "a step of a workflow, which the bot does not offer",
    "event.link_shared": "the message with the link is an event of its own",
    "event.file_shared": "the message with the file is an event of its own",
    "event.member_joined_channel": _ABOUT_THE_CHANNEL,
    "event.member_left_channel": _ABOUT_THE_CHANNEL,
    "interaction.block_actions": "",
    "interaction.interactive_message": "",
    "interaction.message_action": "",
    "interaction.shortcut": "it names no conversation",
    "interaction.view_submission": _NOT_OFFERED,
    "interaction.view_closed": _NOT_OFFERED,
    "interaction.block_suggestion": _NOT_OFFERED,
    "interaction.dialog_submission": _NOT_OFFERED,
    "interaction.workflow_step_edit": _NOT_OFFERED,
    "command": "",
}
