"""The table of abilities. ``python -m tests.abilities.table`` writes docs/conformance.md from it.

A cell names the test that proves the ability, or gives the reason why the type does not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from services.channel.vendors import VENDORS as VENDOR_ADAPTERS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "conformance.md"
VENDOR_TESTS = "tests/services/channel/vendors"


class Proof(NamedTuple):
    """A test function in a file of `VENDOR_TESTS`."""

    file: str
    test: str


class Lacking(NamedTuple):
    reason: str


Cell = Proof | Lacking

VENDORS = (
    "telegram",
    "slack",
    "discord",
    "teams",
    "whatsapp",
    "line",
    "twilio",
    "feishu",
    "dingtalk",
    "wecom",
    "qq",
    "webhook",
)


def _each(test: str, **others: str | Lacking) -> dict[str, Cell]:
    """The same test for all types, except for `others`: another test, or a reason."""
    return {
        vendor: other if isinstance(other, Lacking) else Proof(f"test_{vendor}.py", other)
        for vendor in VENDORS
        for other in [others.get(vendor, test)]
    }


def _shared(test: str, **lacking: str) -> dict[str, Cell]:
    """One test of all types in test_accounts.py, except for those that lack it."""
    return {
        vendor: Lacking(lacking[vendor]) if vendor in lacking else Proof("test_accounts.py", test) for vendor in VENDORS
    }


_CONSOLE = "the vendor has no call for it: a person enters it in the console"
_NO_KEY = Lacking("the vendor takes no key: an unanswered send stays `unknown`")
_NO_MARKS = Lacking("the vendor shows plain text: marks are removed")
_NO_TOKEN = Lacking("the credentials are sent with each call")
_NOT_TOLD = Lacking("the vendor does not tell it in its webhook")
_FIXED: dict[str, Cell] = {
    "discord": Lacking("it gets commands, which cannot be changed"),
    "twilio": Lacking("a text message cannot be changed"),
    "webhook": Lacking("its only event is a message"),
}
_NO_EDITS = Lacking("the vendor cannot change a message that was sent")
_PREVIEWS = "../test_previews.py"
_READ = "test_messages_of_people_and_groups_are_read"
_FILES = "test_files_are_attachments"
_ERRORS = "test_permanent_transient_and_unknown_errors_are_distinguished"
_TOKEN = "test_a_token_that_ran_out_is_fetched_again_once"
# Edits, deletions and buttons are among the kinds of messages and events.
_KINDS = Proof("test_kinds.py", "test_each_kind_is_read_or_ignored_with_its_reason")
_BUTTONS: dict[str, Cell] = {
    **{
        name: Proof("test_buttons.py", f"test_{name}")
        for name in ("telegram", "slack", "discord", "teams", "line", "dingtalk")
    },
    "whatsapp": Proof("test_whatsapp.py", "test_a_text_outside_of_the_field_text_is_found"),
    **dict.fromkeys(("twilio", "webhook"), Lacking("there are no buttons")),
    **dict.fromkeys(("feishu", "wecom", "qq"), _KINDS),
}

ABILITIES: Mapping[str, Mapping[str, Cell]] = {
    "refuses forged calls": _each(
        "test_a_changed_call_is_refused",
        telegram="test_an_update_without_the_secret_token_is_refused_before_it_is_read",
        slack="test_a_changed_or_old_call_is_refused",
        teams="test_a_changed_missing_or_unsigned_token_is_refused",
        twilio="test_a_changed_call_or_url_is_refused",
        dingtalk="test_a_changed_or_old_signature_is_refused",
        webhook="test_another_id_body_or_key_is_refused",
    ),
    "reads texts": _each(
        "test_a_message_is_read",
        telegram="test_a_message_is_read_with_what_a_reply_needs",
        slack="test_a_message_is_read_with_its_thread_and_as_it_was_written",
        discord="test_the_text_is_the_string_option_also_of_a_subcommand",
        teams="test_a_message_is_read_without_its_mention",
        whatsapp="test_every_message_of_every_change_is_read",
        line="test_each_event_of_a_batch_is_read",
        feishu="test_a_message_is_read_with_its_mentions",
        dingtalk=_READ,
        qq=_READ,
        webhook="test_the_judges_signature_is_accepted_among_others",
    ),
    "finds files": _each(
        _FILES,
        telegram="test_a_caption_is_the_text_and_an_attachment_without_one_is_named",
        slack="test_a_text_outside_of_the_field_text_is_found",
        discord="test_a_file_of_the_command_is_an_attachment",
        teams="test_files_are_named_and_other_shapes_are_told_apart",
        line="test_a_file_is_an_attachment",
        twilio="test_statuses_other_accounts_and_pictures",
        wecom="test_attachments_events_and_other_apps",
        qq=_READ,
        webhook="test_files_are_attachments",
    ),
    "fetches files": _shared("test_a_file_is_fetched_and_limited"),
    "reads pressed buttons": _BUTTONS,
    "ignores other events with 200": _each(
        "test_other_events_are_ignored",
        telegram="test_an_update_without_a_persons_text_is_ignored",
        slack="test_bots_changes_and_other_events_are_ignored",
        discord="test_other_calls_are_ignored",
        teams="test_bots_and_other_activities_are_ignored",
        whatsapp="test_sent_statuses_and_other_numbers_are_ignored",
        twilio="test_statuses_other_accounts_and_pictures",
        feishu="test_bots_and_other_events_are_ignored",
        dingtalk="test_the_robot_itself_and_unknown_kinds_are_ignored",
        wecom="test_attachments_events_and_other_apps",
        qq="test_other_events_are_ignored_and_other_shapes_are_told_apart",
        webhook=Lacking("it has one kind of event; another shape is refused with its field"),
    ),
    "shows Markdown": _each(
        "",
        telegram="test_markdown_is_sent_as_html_and_plain_if_telegram_refuses_it",
        slack="test_markdown_becomes_slacks_markup",
        discord="test_a_long_text_is_split_by_characters_and_tables_become_code",
        teams="test_a_reply_quotes_its_message_at_the_service_of_the_call",
        whatsapp="test_a_reply_quotes_its_message_in_whatsapps_markup",
        line=_NO_MARKS,
        twilio=_NO_MARKS,
        feishu="test_a_reply_is_rich_text_and_repeated_under_its_uuid",
        dingtalk="test_a_reply_goes_to_the_session_of_its_message_on_the_vendors_host_only",
        wecom=_NO_MARKS,
        qq=_NO_MARKS,
        webhook=Lacking("the receiver gets the model's text verbatim"),
    ),
    "splits long answers": _each(
        "test_a_long_text_is_split_by_bytes",
        telegram="test_length_is_counted_in_utf_16_units",
        slack="test_a_cut_code_block_is_closed_and_opened_again",
        discord="test_a_long_text_is_split_by_characters_and_tables_become_code",
        whatsapp="test_a_long_text_is_split_by_characters",
        line="test_a_long_text_is_split_in_utf_16_units",
        twilio="test_a_long_text_is_split_by_characters",
        qq="test_a_long_text_fills_at_most_five_parts",
        webhook=Lacking("a message may have 100,000 characters, the most that a run answers with"),
    ),
    "sends once": _each(
        "",
        telegram=_NO_KEY,
        slack=_NO_KEY,
        discord="test_the_first_part_replaces_is_thinking_and_others_follow_once",
        teams=_NO_KEY,
        whatsapp=_NO_KEY,
        line="test_a_push_is_repeated_under_its_key_and_accepted_once",
        twilio=_NO_KEY,
        feishu="test_a_reply_is_rich_text_and_repeated_under_its_uuid",
        dingtalk=_NO_KEY,
        wecom="test_a_reply_is_plain_text_with_the_duplicate_check",
        qq="test_parts_are_numbered_and_a_repeat_is_accepted_once",
        webhook="test_a_reply_is_signed_and_sent_again_under_the_same_id",
    ),
    "tells errors apart": _each(_ERRORS),
    "renews its token once": _each(
        _TOKEN,
        telegram=_NO_TOKEN,
        slack=_NO_TOKEN,
        discord=_NO_TOKEN,
        teams=_ERRORS,
        whatsapp=_NO_TOKEN,
        line=_NO_TOKEN,
        twilio=_NO_TOKEN,
        dingtalk="test_after_the_session_a_reply_is_sent_proactively",
        webhook=_NO_TOKEN,
    ),
    "names its account": _shared("test_the_account_is_named"),
    "registers its webhook": _shared(
        "test_the_webhook_is_registered",
        slack=_CONSOLE,
        teams=_CONSOLE,
        feishu=_CONSOLE,
        dingtalk=_CONSOLE,
        wecom=_CONSOLE,
        qq=_CONSOLE,
        webhook="there is no vendor",
    ),
    "shows an answer while it is written": dict.fromkeys(VENDORS, _NO_EDITS)
    | dict.fromkeys(
        ("slack", "discord", "teams", "feishu"),
        Proof(_PREVIEWS, "test_an_answer_is_shown_while_it_is_written_and_replaced_by_the_finished_one"),
    )
    | {
        "telegram": Proof(_PREVIEWS, "test_telegram_shows_drafts_in_private_chats_and_typing_in_groups"),
        "dingtalk": Lacking("it needs a template of a card, which the tenant would have to make in the console"),
        "qq": Lacking("each text so far would be one of the five replies to a message"),
    },
    "shows that it is typing": dict.fromkeys(VENDORS, Lacking("the vendor has no sign for it"))
    | dict.fromkeys(
        ("telegram", "teams", "whatsapp", "line"), Proof(_PREVIEWS, "test_before_there_is_a_text_the_bot_is_typing")
    )
    | {
        "discord": Proof("test_discord.py", "test_the_first_part_replaces_is_thinking_and_others_follow_once"),
        "qq": Lacking("the sign would be one of the five replies to a message"),
    },
    "tells delivery and reading": dict.fromkeys(VENDORS, _NOT_TOLD)
    | {
        "whatsapp": Proof("../test_receipts.py", "test_receipts_change_a_sent_delivery_once"),
        "twilio": Proof("../test_receipts.py", "test_a_message_names_the_address_for_its_receipts"),
        "teams": Proof("test_teams.py", "test_a_receipt_names_the_last_message_that_was_read"),
    },
    "follows edits": dict.fromkeys(VENDORS, _NOT_TOLD)
    | {
        name: Proof(f"test_{name}.py", "test_edits_deletions_and_reactions_name_their_message")
        for name in ("slack", "teams")
    }
    | {
        "telegram": Proof("test_telegram.py", "test_edits_and_reactions_name_their_message"),
        "line": Proof("test_line.py", "test_an_edited_message_has_its_author_and_its_new_text"),
        "whatsapp": _KINDS,
    }
    | _FIXED,
    "follows deletions": dict.fromkeys(VENDORS, _NOT_TOLD)
    | {
        name: Proof(f"test_{name}.py", "test_edits_deletions_and_reactions_name_their_message")
        for name in ("slack", "teams")
    }
    | {
        "feishu": Proof("test_feishu.py", "test_deletions_and_reactions_name_their_message"),
        "line": Proof("test_line.py", "test_an_unsent_message_is_deleted"),
        # Of Telegram only in the chats of a business.
        "telegram": _KINDS,
        "whatsapp": _KINDS,
    }
    | _FIXED,
    "records reactions": dict.fromkeys(VENDORS, _NOT_TOLD)
    | {
        name: Proof(f"test_{name}.py", "test_edits_deletions_and_reactions_name_their_message")
        for name in ("slack", "teams")
    }
    | {
        "telegram": Proof("test_telegram.py", "test_edits_and_reactions_name_their_message"),
        "feishu": Proof("test_feishu.py", "test_deletions_and_reactions_name_their_message"),
        "whatsapp": Proof("test_whatsapp.py", "test_a_reaction_names_its_message"),
    }
    | _FIXED,
    "chooses its agent": dict.fromkeys(
        VENDORS, Proof("../test_routing.py", "test_the_first_route_that_fits_names_the_agent")
    ),
    "answers mentions only": dict.fromkeys(
        ("telegram", "slack", "teams", "feishu", "line"),
        Proof("../test_routing.py", "test_adapters_tell_groups_mentions_and_replies"),
    )
    | {"qq": Proof("test_qq.py", "test_a_message_of_a_group_is_for_the_bot_if_it_mentions_it")}
    | dict.fromkeys(("dingtalk", "discord"), Lacking("of a group it gets only messages for the bot"))
    | dict.fromkeys(("whatsapp", "twilio", "wecom", "webhook"), Lacking("there are no groups")),
    "sends files": dict.fromkeys(VENDORS, Lacking("a file is sent as a link"))
    | dict.fromkeys(
        ("telegram", "slack", "discord", "whatsapp", "webhook"), Proof("test_files.py", "test_files_are_sent")
    )
    | {"line": Proof("test_files.py", "test_line_gets_the_address_of_an_image_and_only_by_https")},
    "sends an agent's files": dict.fromkeys(
        VENDORS, Lacking("the file is named, and the text says that it is not sent")
    )
    | dict.fromkeys(("telegram", "slack", "discord"), Proof("test_files.py", "test_files_are_sent"))
    | dict.fromkeys(
        ("whatsapp", "webhook"),
        Proof("test_files.py", "test_a_file_of_our_store_is_uploaded_to_whatsapp_and_lies_in_the_message_to_a_webhook"),
    ),
}


def page() -> str:
    """The text of docs/conformance.md."""
    reasons: dict[str, int] = {}
    rows = []
    for ability, cells in ABILITIES.items():
        shown = []
        for vendor in VENDORS:
            cell = cells[vendor]
            if isinstance(cell, Lacking):
                shown.append(str(reasons.setdefault(cell.reason, len(reasons) + 1)))
            else:
                shown.append(f"[✓](../{VENDOR_TESTS}/{cell.file})")
        rows.append(f"| {ability} | {' | '.join(shown)} |")
    notes = "\n".join(f"{n}. {reason}" for reason, n in reasons.items())
    return (
        "# Conformance of channels\n\n"
        "This page is made from `tests/abilities/table.py` by `python -m tests.abilities.table`. A ✓ leads to the\n"
        "file with the test that proves it; a number leads to the reason below.\n\n"
        f"| ability | {' | '.join(VENDORS)} |\n|---|{'---|' * len(VENDORS)}\n"
        + "\n".join(rows)
        + f"\n\n## Reasons\n\n{notes}\n\n## Kinds of messages and events\n\n"
        "The kinds that each vendor documents, by the tables in `services/channel/vendors`. A message of any other\n"
        "kind is ignored, and the reason names the kind. Each kind has an example in\n"
        f"[test_kinds.py](../{VENDOR_TESTS}/test_kinds.py).\n\n"
        + "\n\n".join(_kinds(vendor) for vendor in VENDORS)
        + "\n"
    )


def _kinds(vendor: str) -> str:
    """The kinds that are read, and the others by their reasons."""
    by_reason: dict[str, list[str]] = {}
    for kind, reason in VENDOR_ADAPTERS[vendor].kinds.items():
        by_reason.setdefault(reason, []).append(f"`{kind}`")
    read = ", ".join(by_reason.pop("", []))
    ignored = [f"- ignored, {reason}: {', '.join(kinds)}" for reason, kinds in by_reason.items()]
    return "\n".join([f"### {vendor}\n", f"- read: {read}", *ignored])


if __name__ == "__main__":
    PAGE.write_text(page())
