"""Notification as a real process, with a test mail server and a test directory."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any, cast
from uuid import uuid4

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, LoginPassword, Session
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from infra.clock import utcnow, uuid7
from infra.errors import EffectFailed, Transient
from infra.observe import telemetry
from infra.observe.spans import encode
from infra.security.crypto import Cipher
from protos.catalog import NOTIFICATION_PUSH, PLATFORM_EVENTS
from protos.envelope import Envelope
from protos.messages.notification import Attachment, SendEmail, SendPush
from protos.messages.user import SubjectErased
from services.notification import handlers
from services.notification.mailer import Mailer
from services.notification.notifications import (
    FOR_FILES,
    MAX_A_DAY,
    TOO_MANY,
    TOO_MANY_FILES,
    Email,
    Notifications,
)
from tests.services.notification.conftest import Inbox, World, address, tenant
from tooling.testing.platform import MASTER_KEY
from tooling.testing.stack import free_port


async def test_a_mail_arrives_as_it_was_asked_for_and_leaves_no_address_behind(world: World) -> None:
    tenant_id, to = tenant(), address()
    id_ = await world.send(tenant_id, to, "预算 nearly spent 🙂", "90 % of it.\nשלום\x00!\n" + "long " * 500)
    ended = await world.ended(tenant_id, id_)
    assert (ended["kind"], ended["state"], ended["reason"], ended["to"]) == ("email", "sent", "", ["o***@example.com"])
    [mail] = world.inbox.of(to)
    assert (mail["To"], mail["Subject"], mail["Auto-Submitted"]) == (to, "预算 nearly spent 🙂", "auto-generated")
    assert mail["Message-ID"].endswith("@localhost.localdomain>")
    assert mail.get_content().splitlines() == ["90 % of it.", "שלום!", "long " * 500]
    for table in ("notification", "lane_item", "lane_effect", "dead_letter"):
        rows = await world.sql(f"SELECT convert_to(t::text, 'UTF8') FROM {table} t")
        assert not [row for row in rows if to.encode() in bytes(row[0])], table
    assert to not in world.platform.log("notification")


async def test_a_file_goes_along_with_a_mail(world: World) -> None:
    tenant_id, to = tenant(), address()
    file = Attachment("INV-000001.pdf", "application/pdf", b"%PDF-1.7 \x00\xff")
    await world.ended(tenant_id, await world.send(tenant_id, to, "Invoice", "Attached.\n", file))
    [mail] = world.inbox.of(to)
    [part] = mail.iter_attachments()
    assert (part.get_filename(), part.get_content_type()) == ("INV-000001.pdf", "application/pdf")
    assert part.get_content() == file.content


async def test_without_an_address_each_owner_of_the_tenant_is_written_to(world: World) -> None:
    tenant_id, first, second = tenant(), address(), address()
    world.directory.owners[tenant_id] = [first, second, first, "not an address"]
    ended = await world.ended(tenant_id, await world.send(tenant_id, ""))
    assert (ended["state"], len(ended["to"])) == ("sent", 2)
    for owner in (first, second):
        [mail] = world.inbox.of(owner)
        assert mail["To"] == owner


async def test_a_tenant_without_owners_is_told_why_nothing_was_sent(world: World) -> None:
    tenant_id = tenant()
    ended = await world.ended(tenant_id, await world.send(tenant_id, ""))
    assert (ended["state"], ended["reason"]) == ("failed", "the tenant has no owner with an address")


async def test_what_the_server_refuses_for_good_failed(world: World) -> None:
    tenant_id, to = tenant(), address("gone")
    ended = await world.ended(tenant_id, await world.send(tenant_id, to))
    assert (ended["state"], ended["reason"]) == ("failed", "refused by the mail server: 550 5.1.1")
    assert to not in world.platform.log("notification")


async def test_a_domain_with_other_letters_than_ascii_has_its_form_of_dns(world: World) -> None:
    tenant_id, name = tenant(), uuid4().hex
    sent = await world.send(tenant_id, f"{name}@Bücher.example")
    assert (await world.ended(tenant_id, sent))["state"] == "sent"
    assert len(world.inbox.of(f"{name}@xn--bcher-kva.example")) == 1
    wrong = await world.ended(tenant_id, await world.send(tenant_id, f"{name}@☃️.example"))
    assert (wrong["state"], wrong["reason"]) == ("failed", "the domain of the address cannot exist")


async def test_a_refusal_puts_no_address_into_the_trace(world: World) -> None:
    spans = InMemorySpanExporter()
    running = telemetry.setup("notification", "1", None, processor=SimpleSpanProcessor(spans))
    to = address("gone")
    mailer = Mailer(f"smtp://127.0.0.1:{world.inbox.port}", "from@example.com")
    with pytest.raises(EffectFailed):
        await mailer.send("key", to, Email("", "Hello", "Text", utcnow()))
    running.shutdown()
    [span] = spans.get_finished_spans()
    sent = encode(cast("Any", span))
    assert b"550" in sent
    assert to.encode() not in sent


async def test_what_the_server_refuses_for_now_is_sent_later(world: World) -> None:
    tenant_id, to = tenant(), address("busy")
    ended = await world.ended(tenant_id, await world.send(tenant_id, to))
    assert ended["state"] == "sent"
    [mail] = world.inbox.of(to)
    assert mail["Message-ID"] == world.inbox.refused[to]
    assert to not in world.platform.log("notification")


async def test_a_recipient_who_is_refused_for_now_keeps_no_other_one_waiting(world: World) -> None:
    tenant_id, full, other = tenant(), address("full"), address()
    world.directory.owners[tenant_id] = [full, other]
    id_ = await world.send(tenant_id, "")
    await world.platform.until(lambda: asyncio.sleep(0, world.inbox.of(other)))

    async def recorded() -> bool:
        [item] = (await world.listed(tenant_id))["items"]
        return bool(item["to"]) and item["state"] == "queued"

    await world.platform.until(recorded)
    await world.sql("UPDATE lane_item SET expires_at = now(), not_before = now() WHERE item_id = $1", id_)
    await world.sql("UPDATE lane SET ready_at = now() WHERE kind = 'emails' AND ready_at IS NOT NULL")
    ended = await world.ended(tenant_id, id_)
    assert (ended["state"], ended["reason"]) == ("sent", "to other recipients it could not be sent within a day")
    assert ended["to"] == ["o***@example.com"]
    assert len(world.inbox.of(other)) == 1


async def test_a_password_is_not_sent_without_tls() -> None:
    sent = []

    def login(server: SMTP, session: Session, mail: object, mechanism: str, data: LoginPassword) -> AuthResult:
        sent.append(data.password)
        return AuthResult(success=True)

    server = Controller(Inbox(), hostname="127.0.0.1", port=free_port(), auth_require_tls=False, authenticator=login)
    server.start()
    try:
        mailer = Mailer(f"smtp://user:secret@127.0.0.1:{server.port}", "from@example.com")
        with pytest.raises(Transient, match="mail server: SMTP STARTTLS extension not supported"):
            await mailer.send("key", "a@example.com", Email("", "Hello", "Text", utcnow()))
    finally:
        server.stop()
    assert sent == []


async def test_while_the_mail_server_is_away_mails_wait(world: World) -> None:
    tenant_id, to = tenant(), address()
    world.inbox.stop()
    try:
        id_ = await world.send(tenant_id, to)

        async def tried() -> bool:
            return bool(await world.sql("SELECT 1 FROM lane_item WHERE item_id = $1 AND attempts > 0", id_))

        await world.platform.until(tried)
        [item] = (await world.listed(tenant_id))["items"]
        assert (item["state"], item["to"], item["finished_at"]) == ("queued", [], None)
    finally:
        world.inbox.start()
    assert (await world.ended(tenant_id, id_))["state"] == "sent"
    assert len(world.inbox.of(to)) == 1


@pytest.mark.parametrize(
    ("field", "to", "subject"),
    [
        ("to", "a@example.com\r\nBcc: b@example.com", "Hello"),
        ("to", "a@example.com,b@example.com", "Hello"),
        ("subject", "a@example.com", "Hello\r\nBcc: b@example.com"),
        ("subject", "a@example.com", "x" * 501),
    ],
)
async def test_what_would_inject_a_header_is_a_dead_letter(world: World, field: str, to: str, subject: str) -> None:
    tenant_id = tenant()
    id_ = await world.send(tenant_id, to, subject)

    async def dead() -> Any:
        return await world.sql("SELECT error FROM dead_letter WHERE message_id = $1", str(id_))

    [(error,)] = await world.platform.until(dead)
    assert f"{field}: " in error
    assert (await world.listed(tenant_id))["items"] == []


async def test_what_was_asked_for_more_than_a_day_ago_is_not_sent(world: World) -> None:
    tenant_id, to = tenant(), address()
    asked = Envelope(
        id=uuid7(),
        source="billing",
        type=SendEmail.wire_name(),
        time=utcnow() - timedelta(hours=25),
        tenant_id=tenant_id,
    )
    async with world.platform.database("notification").begin(tenant_id=tenant_id, cause=asked) as tx:
        message = SendEmail(to=to, subject="Hello", text="Text")
        await handlers.queue_email.handler(message, tx, Notifications(Cipher(MASTER_KEY)))
    ended = await world.ended(tenant_id, asked.id)
    assert (ended["state"], ended["reason"]) == ("failed", "could not be sent within a day")
    assert world.inbox.of(to) == []


async def test_a_push_notification_is_recorded_as_undeliverable_and_nothing_of_it_kept(world: World) -> None:
    tenant_id = tenant()
    message = SendPush(user_id=uuid4(), title="secret title", text="secret text")
    id_ = await world.platform.send(NOTIFICATION_PUSH, message, tenant_id=tenant_id)
    ended = await world.ended(tenant_id, id_)
    assert (ended["kind"], ended["state"], ended["to"]) == ("push", "failed", [])
    assert ended["reason"] == "undeliverable: the user has no device"
    rows = await world.sql("SELECT t::text FROM notification t WHERE id = $1", id_)
    assert "secret" not in str(rows)


async def test_a_tenant_sees_its_own_page_by_page(world: World) -> None:
    mine, other = tenant(), tenant()
    sent = [await world.platform.send(NOTIFICATION_PUSH, push(), tenant_id=id_) for id_ in (mine, mine, mine, other)]
    for tenant_id, id_ in zip((mine, mine, mine, other), sent, strict=True):
        await world.ended(tenant_id, id_)
    first = await world.listed(mine, limit=2)
    second = await world.listed(mine, limit=2, cursor=first["next"])
    items = first["items"] + second["items"]
    assert sorted(item["id"] for item in items) == sorted(str(id_) for id_ in sent[:3])
    assert [item["created_at"] for item in items] == sorted((item["created_at"] for item in items), reverse=True)
    assert second["next"] is None
    async with world.platform.client("notification", mine) as client:
        assert (await client.get("/api/v1/notifications", params={"cursor": "bm9uZQ=="})).status_code == 422
    async with world.platform.client("notification", mine, scopes=()) as client:
        assert (await client.get("/api/v1/notifications")).status_code == 403


async def test_e_mails_of_a_tenant_and_day_are_bounded_and_its_last_ones_are_for_files(world: World) -> None:
    mine, other, to = tenant(), tenant(), address()
    file = Attachment("INV-000001.pdf", "application/pdf", b"%PDF-1.7")

    async def had(count: int, ago: str = "1 hour") -> None:
        await world.sql(
            """
            INSERT INTO notification (tenant_id, id, kind, state, created_at, finished_at)
            SELECT $1, gen_random_uuid(), 'email', 'sent', now() - $3::text::interval, now()
            FROM generate_series(1, $2)
            """,
            mine,
            count,
            ago,
        )

    async def reason(tenant_id: str, attachment: Attachment | None = None) -> str:
        ended = await world.ended(tenant_id, await world.send(tenant_id, to, file=attachment))
        assert ended["state"] == ("failed" if ended["reason"] else "sent")
        return str(ended["reason"])

    await had(MAX_A_DAY, "25 hours")
    await had(MAX_A_DAY - FOR_FILES - 1)
    assert [await reason(mine), await reason(mine), await reason(mine)] == ["", TOO_MANY, TOO_MANY]
    assert await reason(mine, file) == ""
    await had(FOR_FILES - 1)
    assert await reason(mine, file) == TOO_MANY_FILES
    assert await reason(other) == ""
    # The operator sees it in the service's log.
    assert world.platform.log("notification").count(TOO_MANY) == 2


def push() -> SendPush:
    return SendPush(user_id=uuid4(), title="Hello", text="Text")


async def test_an_erased_subjects_key_is_destroyed_here_too(world: World) -> None:
    tenant_id, subject_id = tenant(), uuid4().hex
    event = SubjectErased(tenant_id=tenant_id, subject_id=subject_id)
    await world.platform.produce(PLATFORM_EVENTS, event, key=tenant_id, tenant_id=tenant_id)

    async def destroyed() -> Any:
        return await world.sql("SELECT destroyed_at FROM subject_key WHERE subject_id = $1", subject_id)

    [(at,)] = await world.platform.until(destroyed)
    assert at is not None


async def test_after_a_crash_between_two_owners_each_has_one_mail(world: World, tmp_path: Any) -> None:
    tenant_id, first, second = tenant(), address(), address()
    world.directory.owners[tenant_id] = [first, second]
    assert world.platform.stop("notification") == 0
    once = tmp_path / "once"
    once.touch()
    await world.start(CLAW_FAILPOINT="after_effect_commit", CLAW_FAILPOINT_ONCE=str(once))
    id_ = await world.send(tenant_id, "")

    async def died() -> bool:
        return world.platform.processes["notification"].poll() is not None

    await world.platform.until(died)
    assert [len(world.inbox.of(owner)) for owner in (first, second)] == [1, 0]
    await world.start()
    assert (await world.ended(tenant_id, id_))["state"] == "sent"
    assert [len(world.inbox.of(owner)) for owner in (first, second)] == [1, 1]
