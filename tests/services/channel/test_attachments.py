"""Attachments on their way to the agent, against the running service, the object store and the fakes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from datetime import timedelta
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from infra.clock import uuid7
from infra.errors import InvalidMessage, NotFound, Transient
from infra.observe.metrics import Metrics
from infra.service.tenant_erasure import ERASURES
from infra.stores import charsets, filetypes
from infra.stores.objects import Objects, once
from infra.web import rpc
from protos.catalog import PLATFORM_EVENTS
from protos.memory.v1 import memory_pb2, memory_pb2_grpc
from protos.messages.channel import File
from protos.messages.user import SubjectErased, TenantErased
from services.channel.events import Attachment, InboundContent
from services.channel.files import attachments
from services.channel.files.attachments import (
    ATTACHMENT as FILE,
)
from services.channel.files.attachments import (
    MAX_BYTES,
    MAX_CHARACTERS,
    Fetcher,
    _Read,
    together,
)
from tests.services.channel.conftest import Desk
from tooling.testing import keys
from tooling.testing.platform import Platform
from tooling.testing.vendors import LineStandIn, SlackStandIn, TelegramStandIn, answer, hold
from tooling.testing.vendors.server import Call, Fault, Reply, StandIn


class Transcriber(StandIn):
    """An OpenAI-shaped endpoint that hears the same words everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[Call] = []

    def handle(self, call: Call) -> Reply:
        self.heard.append(call)
        return Reply(200, {"text": "spoken words"})


@pytest.fixture(scope="module")
async def transcriber() -> AsyncIterator[Transcriber]:
    async with Transcriber() as running:
        yield running


class Reader(memory_pb2_grpc.MemoryServicer):
    """A stand-in for memory, with replies in their order."""

    def __init__(self) -> None:
        self.asked: list[memory_pb2.ReadFileRequest] = []
        self.replies: list[memory_pb2.ReadFileReply | Exception] = []
        self.kept: list[memory_pb2.KeepFileRequest] = []
        self.forgotten: list[tuple[str, str]] = []
        self.refusals: list[Exception] = []

    async def KeepFile(self, request: memory_pb2.KeepFileRequest, context: Any) -> memory_pb2.KeepFileReply:
        assert rpc.tenant()
        if self.refusals:
            raise self.refusals.pop(0)
        self.kept.append(request)
        return memory_pb2.KeepFileReply()

    async def ForgetFiles(self, request: memory_pb2.ForgetFilesRequest, context: Any) -> memory_pb2.ForgetFilesReply:
        assert rpc.tenant()
        self.forgotten.append((request.subject_id, request.message_id))
        return memory_pb2.ForgetFilesReply()

    async def ReadFile(self, request: memory_pb2.ReadFileRequest, context: Any) -> memory_pb2.ReadFileReply:
        assert rpc.tenant()
        self.asked.append(request)
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


@pytest.fixture(scope="module")
async def reader(platform: Platform) -> AsyncIterator[Reader]:
    reader = Reader()  # type: ignore[abstract]
    server = rpc.Server("memory", keys.callers("memory"), Metrics(CollectorRegistry()))
    memory_pb2_grpc.add_MemoryServicer_to_server(reader, server.grpc)
    await server.start(platform.ports["memory_grpc"])
    yield reader
    await server.stop()


@pytest.fixture(scope="module")
async def service(platform: Platform, transcriber: Transcriber, reader: Reader) -> Platform:
    await platform.prepare("channel")
    await platform.start(
        "channel", CLAW_TRANSCRIPTION_BASE_URL=f"{transcriber.url}/v1", CLAW_TRANSCRIPTION_API_KEY="a key"
    )
    return platform


@pytest.fixture
async def telegram() -> AsyncIterator[TelegramStandIn]:
    async with TelegramStandIn() as vendor:
        yield vendor


async def arrived(desk: Desk, channel: dict[str, Any], count: int = 1) -> list[dict[str, Any]]:
    async def ask() -> list[dict[str, Any]] | None:
        found = await desk.received(channel)
        return found if len(found) == count else None

    found = await desk.platform.until(ask)
    assert found
    return found


async def connected(desk: Desk, telegram: TelegramStandIn) -> dict[str, Any]:
    return await desk.connect("telegram", telegram.credentials, telegram.url)


async def test_the_text_of_a_file_reaches_the_agent_with_the_caption(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await connected(desk, telegram)
    telegram.files["f1"] = "Größe: 7 元".encode("gb18030")
    document = {"file_id": "f1", "file_name": "../a.txt", "mime_type": "image/png"}
    update = telegram.update(None, caption="what is this?", document=document)
    for _ in range(2):
        assert (await desk.call(channel, update)).status_code == 200
    # The next message of the conversation keeps its position.
    await desk.call(channel, telegram.update("and?"))
    messages = sorted(await arrived(desk, channel, 2), key=lambda one: one["position"])
    assert [one["position"] for one in messages] == [1, 2]
    text = messages[0]["text"]
    assert text == "what is this?\n\n[The person sent an image (../a.txt). Its text:]\nGröße: 7 元"
    async with desk.platform.database("channel").begin() as tx:
        [(path,)] = await tx.sql("SELECT path FROM attachment WHERE tenant_id = $1", desk.tenant_id)
    assert path.startswith(f"{messages[0]['subject_id']}/attachments/{desk.tenant_id}/{messages[0]['session_key']}/")
    assert path.endswith("_1_a.txt")


async def test_a_file_that_is_fetched_during_a_rotation_is_read_with_the_new_credentials(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    rotated = asyncio.Event()
    channel = await connected(desk, telegram)
    telegram.files["f1"] = b"Refunds take five days."
    telegram.faults.append(hold(rotated))
    await desk.call(channel, telegram.update(None, document={"file_id": "f1", "file_name": "a.txt"}))

    async def is_called() -> bool:
        return telegram.calls > 0

    await desk.platform.until(is_called)
    # Telegram takes the new token only, from now on.
    telegram.bot_token = "1:new"
    async with desk.client() as http:
        path = f"/api/v1/channels/{channel['id']}/rotate"
        assert (await http.post(path, json={"credentials": telegram.credentials})).status_code == 200
    rotated.set()
    [message] = await arrived(desk, channel)
    assert message["text"].endswith("Its text:]\nRefunds take five days.")


async def test_with_a_file_the_own_words_beside_a_quotation_are_not_all_that_is_said(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await connected(desk, telegram)
    telegram.files["f1"] = b"no"
    bot = {"message_id": 1, "from": {"id": int(telegram.bot_token.partition(":")[0]), "is_bot": True}}
    quoted: dict[str, Any] = {"reply_to_message": bot, "quote": {"text": "May I?"}}
    document = {"file_id": "f1", "file_name": "a.txt"}
    await desk.call(channel, telegram.update(None, caption="yes", document=document, **quoted))
    [message] = await arrived(desk, channel)
    assert (message["text"].startswith("yes"), message["words"]) == (True, "")


async def test_the_text_of_a_pdf_is_read_by_memory(desk: Desk, telegram: TelegramStandIn, reader: Reader) -> None:
    channel = await connected(desk, telegram)
    telegram.files["f1"] = b"%PDF-1.7 x"
    reader.replies += [
        Transient("busy"),
        memory_pb2.ReadFileReply(text="Refunds take five days.", is_cut=True, warnings=["Pages without text: 2."]),
        memory_pb2.ReadFileReply(refused="The PDF is encrypted. Upload it without a password."),
        InvalidMessage("path", "must be an attachment"),
    ]
    for caption in ("read this", "and this", "and that"):
        document = {"file_id": "f1", "file_name": "plan.pdf"}
        await desk.call(channel, telegram.update(None, caption=caption, document=document))
    texts = [one["text"] for one in sorted(await arrived(desk, channel, 3), key=lambda one: one["position"])]
    assert texts[0] == (
        "read this\n\n[The person sent a file (plan.pdf). Its text:]\nRefunds take five days.\n"
        "[Pages without text: 2.]\n[The rest of it is cut off.]"
    )
    assert "cannot be read here: The PDF is encrypted." in texts[1]
    assert "Tell the person so" in texts[1]
    assert "it could not be read: path: must be an attachment" in texts[2]
    assert {(one.content_type, one.max_characters) for one in reader.asked} == {("application/pdf", MAX_CHARACTERS)}
    assert "/attachments/" in reader.asked[0].path
    assert reader.replies == []


async def test_a_voice_message_is_written_down(desk: Desk, telegram: TelegramStandIn, transcriber: Transcriber) -> None:
    channel = await connected(desk, telegram)
    telegram.files["v1"] = b"OggS" + bytes(200)
    await desk.call(channel, telegram.update(None, voice={"file_id": "v1", "mime_type": "audio/ogg"}))
    [message] = await arrived(desk, channel)
    assert message["text"] == "[The person sent a voice message. Its text:]\nspoken words"
    [call] = transcriber.heard
    assert (call.path, call.headers["authorization"]) == ("/v1/audio/transcriptions", "Bearer a key")
    assert b"whisper-1" in call.body
    assert b'filename="voice.ogg"' in call.body


async def test_a_voice_message_that_is_too_long_is_named_with_the_reason(
    desk: Desk, telegram: TelegramStandIn, transcriber: Transcriber
) -> None:
    """Two hours are too many bytes, or the server that writes them down refuses them."""
    channel = await connected(desk, telegram)
    telegram.files |= {"long": b"OggS" + bytes(MAX_BYTES), "refused": b"OggS" + bytes(200)}
    transcriber.faults.append(answer(413, {"error": {"message": "Maximum content size limit exceeded"}}))
    for id_ in ("long", "refused"):
        voice = {"file_id": id_, "mime_type": "audio/ogg", "duration": 7_200}
        await desk.call(channel, telegram.update(None, voice=voice))
    texts = [one["text"] for one in sorted(await arrived(desk, channel, 2), key=lambda one: one["position"])]
    assert "larger than 20 MB" in texts[0]
    assert "the transcription was refused: HTTP 413" in texts[1]
    assert all("Tell the person so" in text for text in texts)


async def test_a_file_that_cannot_be_read_is_named_with_the_reason(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await connected(desk, telegram)
    telegram.files |= {
        "big": bytes(MAX_BYTES + 1),
        "zip": b"\x00\x01\x02 program",
        "text": bytes([0x81, 0x8D, 0x8F, 0x90, 0x9D]) * 4,
        "movie": b"\x00\x00\x00\x18ftypmp42",
    }
    for field, id_ in (
        ("document", "gone"),
        ("document", "big"),
        ("document", "zip"),
        ("document", "text"),
        ("video", "movie"),
    ):
        fields: dict[str, Any] = {field: {"file_id": id_, "file_name": id_}}
        await desk.call(channel, telegram.update(None, **fields))
    texts = [one["text"] for one in sorted(await arrived(desk, channel, 5), key=lambda one: one["position"])]
    assert all("Tell the person so" in text for text in texts)
    reasons = "file is too big", "larger than 20 MB", "application/octet-stream", "encoding", "video/mp4 are not read"
    for text, reason in zip(texts, reasons, strict=True):
        assert reason in text


async def test_a_large_text_is_cut_and_judged_beside_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    judged = []

    def judge(content: bytes, *args: Any, **options: Any) -> tuple[str, str]:
        judged.append((len(content), threading.current_thread() is threading.main_thread()))
        return decode(content, *args, **options)

    decode = charsets._decode
    monkeypatch.setattr(charsets, "_decode", judge)
    nothing: Any = None
    fetcher = Fetcher(nothing, nothing, nothing, nothing, None, nothing)
    content = b"hello world " * 100_000 + b"\xff"
    read = await fetcher._read(content, "text/plain", Attachment("file", "f1"), last=True)
    assert judged == [(4 * MAX_CHARACTERS, False)]
    assert read.text == "hello world " * (MAX_CHARACTERS // 12)


async def test_the_documents_of_a_message_have_a_limited_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0

    class Slow:
        async def ReadFile(self, *_: Any, **__: Any) -> memory_pb2.ReadFileReply:
            nonlocal clock
            clock += 45.0
            return memory_pb2.ReadFileReply(text="text")

    monkeypatch.setattr(attachments, "monotonic", lambda: clock)
    nothing: Any = None
    slow: Any = Slow()
    fetcher, reading = Fetcher(nothing, nothing, nothing, nothing, None, slow), attachments._Reading()
    read = [await fetcher._read_document("t", f"{n}", filetypes.PDF, reading, last=False) for n in range(10)]
    assert [one.text for one in read] == ["text"] * 3 + [""] * 7
    assert {one.reason for one in read[3:]} == {"the files before it took too long"}


def test_the_messages_of_two_tenants_leave_places_to_a_third_one() -> None:
    work = attachments.fetch_attachments
    assert 2 * work.per_tenant < work.concurrency


async def test_a_transient_fault_of_the_vendor_is_waited_for(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await connected(desk, telegram)
    telegram.files["f1"] = b"content"
    telegram.faults += [answer(500), answer(429)]
    await desk.call(channel, telegram.update(None, document={"file_id": "f1"}))
    [message] = await arrived(desk, channel)
    assert message["text"] == "[The person sent a file. Its text:]\ncontent"


async def made_file(desk: Desk, message: dict[str, Any], name: str) -> tuple[Objects, File]:
    """A file that an agent made for the person of the message."""
    objects = Objects(**desk.platform.stack.engines["s3"])
    path = f"{message['subject_id']}/attachments/{desk.tenant_id}/{uuid7()}_1_1_{name}"
    await objects.upload(FILE, once(b"%PDF-1.7 x"), name=name, user_id="u", path=lambda _: path)
    return objects, File(path=path, name=name)


async def test_files_of_an_answer_are_sent_after_it_or_named(desk: Desk, telegram: TelegramStandIn) -> None:
    async with LineStandIn() as line, SlackStandIn() as slack:
        channels = [await connected(desk, telegram)]
        channels += [await desk.connect("line", line.credentials, line.url)]
        channels += [await desk.connect("slack", slack.credentials, slack.url)]
        await desk.call(channels[0], telegram.update("hi", chat=42))
        await desk.call(channels[1], line.call(line.event()))
        await desk.call(channels[2], slack.event("hi", channel="D1"))
        for channel in channels:
            [message] = await arrived(desk, channel)
            _, file = await made_file(desk, message, "a.pdf")
            settled = await desk.settled(await desk.reply(message, "Here.", files=(file,)))
            assert settled["state"] == "sent"
            async with desk.client() as http:
                found = await http.get("/api/v1/messages", params={"channel_id": channel["id"]})
            assert found.json()["items"][0]["attachments"] == [{"url": None, "name": "a.pdf"}]
        assert telegram.texts() == ["Here.", "[document a.pdf]"]
        assert telegram.ledger[1].fields["content"] == b"%PDF-1.7 x"
        assert slack.texts() == ["Here.", "[file a.pdf]"]
        # Slack gives no id of the second message. Reactions to the first one are found by its id.
        assert settled["vendor_message_id"] == slack.ledger[0].id
        assert line.texts() == ["Here.\n\n[The file a.pdf cannot be sent in this chat.]"]
        [message] = await arrived(desk, channels[0])
        gone = File(path=f"{file.path}.gone", name="a.pdf")
        settled = await desk.settled(await desk.reply(message, "Again.", files=(gone,)))
        assert settled["reason"] == "part 2 of 2: the file could not be fetched: it was deleted"


async def test_a_file_becomes_a_document_of_memory_until_its_message_is_deleted(desk: Desk, reader: Reader) -> None:
    async with LineStandIn() as line:
        channel = await desk.connect("line", line.credentials, line.url)
        line.files["m7"] = b"Refunds take five days."
        file = {"type": "file", "id": "m7", "fileName": "rules.txt"}
        await desk.call(channel, line.call(line.event(None, message=file)))
        [sent] = await arrived(desk, channel)
        # As a file was stored when its path had no tenant.
        database, objects = desk.platform.database("channel"), Objects(**desk.platform.stack.engines["s3"])
        async with database.begin() as tx:
            [(stored,)] = await tx.sql("SELECT path FROM attachment WHERE tenant_id = $1", desk.tenant_id)
            old = stored.replace(f"/{desk.tenant_id}/", "/")
            await tx.sql("UPDATE attachment SET path = $2 WHERE path = $1", stored, old)
        await objects.delete(stored)
        await objects.upload(FILE, once(b"Refunds take five days."), name="a.txt", user_id="u", path=lambda _: old)
        async with desk.client() as http:
            [message] = (await http.get("/api/v1/messages", params={"channel_id": channel["id"]})).json()["items"]
            assert message["attachments"] == [{"url": None, "name": "rules.txt"}]
            path = f"/api/v1/messages/{message['id']}/document"
            given = {"audience": ["agent:a1"], "tags": ["rules"]}
            made = [await http.post(path, json=given) for _ in range(2)]
            assert [answer.status_code for answer in made] == [202, 202], made[0].text
            reader.refusals += [InvalidMessage("audience[0]", "must be all"), NotFound("object: x")]
            refused = [await http.post(path, json={}) for _ in range(2)]
            assert [answer.status_code for answer in refused] == [422, 404]
            assert refused[0].json()["errors"][0]["field"] == "audience[0]"
            for other, number in ((path, 2), (f"/api/v1/messages/{uuid7()}/document", 1)):
                assert (await http.post(other, json={"attachment": number})).status_code == 404
        async with desk.platform.client("channel", f"other {desk.tenant_id}") as stranger:
            assert (await stranger.post(path, json={})).status_code == 404
        [first, second] = reader.kept
        assert first == second
        assert made[0].json() == {"document_id": first.document_id}
        assert (first.name, list(first.audience), list(first.tags)) == ("rules.txt", ["agent:a1"], ["rules"])
        assert (first.subject_id, first.channel_id) == (sent["subject_id"], channel["id"])
        assert first.message_id == message["id"]
        assert first.path == stored
        assert first.path.endswith(f"/{message['id']}_1_rules.txt")
        assert await objects.paths(stored) == [stored]

        async with database.begin() as tx:
            kept = "UPDATE attachment SET path = replace(path, '_1_', '_9_') WHERE tenant_id = $1 RETURNING path"
            assert len(await tx.sql(kept, desk.tenant_id)) == 2
        async with desk.client() as http:
            assert (await http.post(path, json={})).status_code == 409
        await desk.call(channel, line.call(line.event(type="unsend", unsend={"messageId": "m7"})))

        async def forgotten() -> bool:
            return reader.forgotten == [(sent["subject_id"], message["id"])]

        await desk.platform.until(forgotten)
        async with desk.client() as http:
            assert (await http.post(path, json={})).status_code == 404
        assert len(reader.kept) == 2


async def test_erasure_deletes_the_stored_files(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await connected(desk, telegram)
    telegram.files["f1"] = b"content"
    await desk.call(channel, telegram.update(None, document={"file_id": "f1"}))
    [message] = await arrived(desk, channel)
    objects, file = await made_file(desk, message, "a.pdf")
    erased = SubjectErased(tenant_id=desk.tenant_id, subject_id=message["subject_id"])
    await desk.platform.produce(PLATFORM_EVENTS, erased, key=desk.tenant_id, tenant_id=desk.tenant_id)
    database = desk.platform.database("channel")

    async def queued() -> bool:
        async with database.begin() as tx:
            # It is due in some minutes.
            return bool(
                await tx.sql(
                    """
                    UPDATE lane_item SET not_before = now()
                    WHERE kind = 'erased files' AND tenant_id = $1 RETURNING 1
                    """,
                    desk.tenant_id,
                )
            )

    await desk.platform.until(queued)

    async def gone() -> bool:
        async with database.begin() as tx:
            await tx.sql("UPDATE lane SET ready_at = now() WHERE kind = 'erased files' AND ready_at IS NOT NULL")
            return not await tx.sql("SELECT 1 FROM attachment WHERE tenant_id = $1", desk.tenant_id)

    await desk.platform.until(gone)
    assert await objects.paths(file.path) == []


async def test_a_file_that_is_stored_late_after_an_erasure_does_not_stay(desk: Desk, telegram: TelegramStandIn) -> None:
    """A run that was under way has made it, after the first pass."""
    channel = await connected(desk, telegram)
    await desk.call(channel, telegram.update("hi"))
    [message] = await arrived(desk, channel)
    objects, early = await made_file(desk, message, "a.pdf")
    erased = SubjectErased(tenant_id=desk.tenant_id, subject_id=message["subject_id"])
    await desk.platform.produce(PLATFORM_EVENTS, erased, key=desk.tenant_id, tenant_id=desk.tenant_id)

    async def deleted(file: File, within: timedelta) -> None:
        """By a pass that is due within this time; it is due now."""

        async def gone() -> bool:
            async with desk.platform.database("channel").begin() as tx:
                await tx.sql(
                    """
                    UPDATE lane_item SET not_before = now()
                    WHERE kind = 'erased files' AND tenant_id = $1 AND not_before < now() + $2::interval
                    """,
                    desk.tenant_id,
                    within,
                )
                await tx.sql("UPDATE lane SET ready_at = now() WHERE kind = 'erased files' AND ready_at IS NOT NULL")
            return await objects.paths(file.path) == []

        await desk.platform.until(gone)

    await deleted(early, timedelta(minutes=10))
    _, late = await made_file(desk, message, "b.pdf")
    await deleted(late, timedelta(days=1))


async def test_erasure_of_the_tenant_deletes_the_stored_files(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await connected(desk, telegram)
    telegram.files["f1"] = b"content"
    await desk.call(channel, telegram.update(None, document={"file_id": "f1"}))
    [message] = await arrived(desk, channel)
    async with desk.platform.database("channel").begin() as tx:
        [(path,)] = await tx.sql("SELECT path FROM attachment WHERE tenant_id = $1", desk.tenant_id)
    objects, _ = await made_file(desk, message, "a.pdf")
    assert await objects.paths(path) == [path]
    await desk.platform.produce(PLATFORM_EVENTS, TenantErased(tenant_id=desk.tenant_id), key=desk.tenant_id)

    async def gone() -> bool:
        return await objects.paths(path) == []

    await desk.platform.until(gone)


async def test_a_file_that_arrives_while_its_tenant_is_erased_does_not_stay(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await connected(desk, telegram)
    telegram.files["f1"] = b"content"
    arrives = asyncio.Event()
    telegram.faults.extend([hold(arrives)] * 4)
    await desk.call(channel, telegram.update(None, document={"file_id": "f1"}))
    database = desk.platform.database("channel")

    async def rows(query: str, *arguments: object) -> Sequence[Any]:
        async with database.begin() as tx:
            return await tx.sql(query, *arguments)

    async def noted() -> Sequence[Any]:
        return await rows("SELECT path FROM attachment WHERE tenant_id = $1", desk.tenant_id)

    async def asked() -> bool:
        return len(telegram.faults) < 4

    # A fetch that has not begun before the first pass never begins.
    await desk.platform.until(asked)
    [(path,)] = await noted()
    await desk.platform.produce(PLATFORM_EVENTS, TenantErased(tenant_id=desk.tenant_id), key=desk.tenant_id)

    async def passed() -> bool:
        """The first pass is over."""
        left = await rows(
            """
            SELECT convert_from(body, 'UTF8')::jsonb ->> 'number'
            FROM lane_item
            WHERE kind = $1 AND convert_from(body, 'UTF8')::jsonb ->> 'tenant_id' = $2 AND state = 'waiting'
            ORDER BY 1
            """,
            ERASURES.name,
            desk.tenant_id,
        )
        return [number for (number,) in left] == ["2", "3"]

    await desk.platform.until(passed)
    arrives.set()
    objects = Objects(**desk.platform.stack.engines["s3"])

    async def stored() -> bool:
        return await objects.paths(path) == [path]

    await desk.platform.until(stored)

    async def gone() -> bool:
        # The second pass is due in ten minutes.
        await rows(
            """
            UPDATE lane_item SET not_before = now()
            WHERE kind = $1
              AND convert_from(body, 'UTF8')::jsonb @> jsonb_build_object('tenant_id', $2::text, 'number', 2)
            """,
            ERASURES.name,
            desk.tenant_id,
        )
        await rows(
            "UPDATE lane SET ready_at = now() WHERE kind = $1 AND lane = $2 AND owner IS NULL",
            ERASURES.name,
            desk.tenant_id,
        )
        return not await stored() and not await noted()

    await desk.platform.until(gone)


def test_the_texts_of_all_files_together_are_limited() -> None:
    files = tuple(Attachment("file", str(n)) for n in range(3))
    read = [_Read(text="x" * 50_000), _Read(text="y" * 50_000), _Read(text="z")]
    text = together(InboundContent("c", "p", "m", "", files), read)
    assert (text.count("x") - text.count("text"), text.count("y")) >= (50_000, MAX_CHARACTERS - 50_000)
    assert len(text) < MAX_CHARACTERS + 1_000
    assert "cut off" in text


async def test_an_image_reaches_the_agent_as_an_image(desk: Desk, telegram: TelegramStandIn) -> None:
    channel = await connected(desk, telegram)
    telegram.files["p1"] = b"\x89PNG\r\n\x1a\n" + bytes(50)
    photo = [{"file_id": "small"}, {"file_id": "p1"}]
    await desk.call(channel, telegram.update(None, photo=photo, media_group_id="13"))
    [message] = await arrived(desk, channel)
    assert (message["text"], message["in_album"]) == ("[The person sent an image (photo.jpg).]", True)
    [image] = message["images"]
    assert image["content_type"] == "image/png"
    assert image["path"].startswith(message["subject_id"])


async def test_the_parts_of_an_album_reach_the_agent_together_also_if_a_file_is_slow(
    desk: Desk, telegram: TelegramStandIn
) -> None:
    channel = await connected(desk, telegram)
    gates = [asyncio.Event() for _ in range(3)]
    # The first call for each file, and the file itself.
    telegram.faults.extend([hold(gates[0]), Fault(late=True), hold(gates[1]), Fault(late=True), hold(gates[2])])
    for n in range(3):
        telegram.files[f"p{n}"] = b"\x89PNG\r\n\x1a\n" + bytes(50)
        await desk.call(channel, telegram.update(None, photo=[{"file_id": f"p{n}"}], media_group_id="13"))
    for n, gate in enumerate(gates):

        async def is_fetched(calls: int = 2 * n + 1) -> bool:
            return telegram.calls == calls

        await desk.platform.until(is_fetched)
        assert await desk.received(channel) == []
        gate.set()
    messages = await arrived(desk, channel, 3)
    assert sorted(one["position"] for one in messages) == [1, 2, 3]
    assert all(len(one["images"]) == 1 for one in messages)
    assert telegram.calls == 6
