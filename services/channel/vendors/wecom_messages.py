"""WeCom's messages and events: https://developer.work.weixin.qq.com/document/path/90239"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Literal
from xml.etree import ElementTree

from infra.errors import InvalidMessage
from services.channel.events import Attachment
from services.channel.vendors.base import described, forwarded, placeholder
from services.channel.vendors.items import Ignored, Inbound

_NO_MESSAGE = "no person writes it to the bot"
_ADMINISTRATION = "a notice about the company"

# By the type of the message, then by the name of the event. Empty: it is read; else why it is ignored.
KINDS: Mapping[str, str] = {
    "text": "",
    "image": "",
    "voice": "",
    "video": "",
    "shortvideo": "",
    "file": "",
    "location": "",
    "link": "",
    "miniprogram": "",
    "chatrecord": "",
    "mixed": "",
    "event.click": "",
    "event.taskcard_click": "",
    "event.template_card_event": "",
    "event.template_card_menu_event": "",
    "event.scancode_push": "",
    "event.scancode_waitmsg": "",
    "event.location_select": "",
    "event.view": "a page was opened",
    "event.pic_sysphoto": "the photo is a message of its own",
    "event.pic_photo_or_album": "the photo is a message of its own",
    "event.pic_weixin": "the photo is a message of its own",
    "event.subscribe": _NO_MESSAGE,
    "event.unsubscribe": _NO_MESSAGE,
    "event.enter_agent": _NO_MESSAGE,
    "event.LOCATION": "the place of a device, which no person sent",
    "event.batch_job_result": _ADMINISTRATION,
    "event.change_contact": _ADMINISTRATION,
    "event.change_external_contact": _ADMINISTRATION,
    "event.open_approval_change": _ADMINISTRATION,
    "event.share_agent_change": _ADMINISTRATION,
    "event.share_chain_change": _ADMINISTRATION,
    "event.inactive_alert": _ADMINISTRATION,
    "event.close_inactive_alert": _ADMINISTRATION,
    "event.low_active_alert": _ADMINISTRATION,
    "event.active_alert": _ADMINISTRATION,
}
_FILES: dict[str, Literal["image", "voice", "video", "file"]] = {
    "image": "image",
    "voice": "voice",
    "video": "video",
    "shortvideo": "video",
    "file": "file",
}


# Control characters and halves of characters, which XML does not allow. People paste them, and WeCom passes them on.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
# The declaration of XML itself.
_XML = re.compile(r"\A\s*<\?xml[^<>]*>")


def fields(body: bytes) -> dict[str, str]:
    """The elements of the XML, by name. Raises InvalidMessage, also for XML that declares types or entities."""
    return {child.tag: child.text or "" for child in _parse(body)}


def _parse(body: bytes) -> ElementTree.Element:
    try:
        # The encoding that a declaration names would hide other declarations from the search.
        text = _ILLEGAL.sub("", body.decode("utf-8", "surrogatepass"))
        # People write declarations, too: those in sections of text. A section that is none, in a comment or an
        # instruction, leaves their beginning outside.
        first, *sections = _XML.sub("", text).split("<![CDATA[")
        outside = first + "".join(section.partition("]]>")[2] for section in sections)
        if "<!" in outside or "<?" in outside:
            raise InvalidMessage("body", "must be XML without declarations")
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise InvalidMessage("body", f"is not XML: {error}") from error


def read(body: bytes, agent_id: str) -> Inbound | Ignored:
    root = _parse(body)
    given = {child.tag: child.text or "" for child in root}
    kind, person = given.get("MsgType", ""), given.get("FromUserName", "")
    # An event has no id.
    name = "/".join(given.get(field, "") for field in ("FromUserName", "CreateTime", "Event", "EventKey", "TaskId"))
    id_ = given.get("MsgId", "")
    # Messages of several people at the same moment have had one id.
    ids = (f"message/{person}/{id_}",) if id_ and kind != "event" else (f"event/{name}",)
    if not person:
        return Ignored(ids, "a message without an author")
    if given.get("AgentID", agent_id) != agent_id:
        return Ignored(ids, "a message to another app")
    if kind == "event":
        event = given.get("Event", "")
        # WeChat's are in upper case.
        event = event if f"event.{event}" in KINDS else event.lower()
        text = _chosen(event, root, given.get("EventKey", ""))
        if not text:
            return Ignored(ids, KINDS.get(f"event.{event}") or f"an event {event[:40]}")
        return Inbound(ids, person, person, "", text)
    attachments: tuple[Attachment, ...] = ()
    # A voice message, written down by the vendor.
    words: str | None = given.get("Recognition", "")
    if not words and kind in _FILES and given.get("MediaId"):
        attachments = (Attachment(_FILES[kind], given["MediaId"], given.get("FileName", "")),)
    elif not words:
        words = _text(kind, root, given)
    if words is None or not id_:
        return Ignored(ids, f"a message of type {kind[:40]}")
    # WeCom does not say which files were sent together.
    in_album = kind in ("image", "video", "file")
    return Inbound(ids, person, person, id_, words, attachments=attachments, in_album=in_album)


def _text(kind: str, root: ElementTree.Element, given: Mapping[str, str]) -> str | None:
    match kind:
        case "text":
            return given.get("Content", "")
        case "location":
            return described("Location", *(given.get(name) for name in ("Label", "Location_X", "Location_Y")))
        case "link" | "miniprogram":
            return described("Link", *(given.get(name) for name in ("Title", "Description", "Url")))
        case "chatrecord" | "mixed":
            return forwarded("\n".join(_contents(root)))
    return placeholder("a file") if kind in _FILES else None


def _contents(root: ElementTree.Element) -> Iterator[str]:
    """The texts of messages in a message, in their order."""
    for element in root.iter():
        if element.tag in ("Content", "Title", "Description") and (element.text or "").strip():
            yield (element.text or "").strip()


def _chosen(event: str, root: ElementTree.Element, key: str) -> str:
    """The value that a person pressed, chose or scanned; empty for other events."""
    if KINDS.get(f"event.{event}", _NO_MESSAGE):
        return ""
    found = {"OptionId": "", "ScanResult": "", "Label": "", "Location_X": "", "Location_Y": ""}
    chosen = [element.text for element in root.iter() if element.tag in found and element.text]
    return ", ".join([key, *chosen] if key else chosen)
