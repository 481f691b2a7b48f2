"""``remember``: the knowledge of earlier conversations in a prompt, for the same number of tokens.

After LoCoMo (Maharana et al., ACL 2024): people talk over months, state facts among small talk, and some facts change.
Then each fact is asked for. The conversations are made from fixed templates, so there is no licence to keep and nothing
to download, and no model is called: a question counts as answerable if the true value is in the context, and as
misleading if only a value that is not true any more is there. The answers of a model are not measured.

Contexts of at most `TOKENS` tokens: none; the last messages; memories that the rules found; memories of a stand-in for
a model, which writes down every fact that the templates stated: the bound that a perfect extraction would reach.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain
from typing import Any, NamedTuple, cast

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import migrate, prepare_database, role_url
from infra.postgres.tx import Tx
from infra.security.crypto import Cipher
from infra.security.subjects import SubjectKeys
from services.memory.domain import count_tokens
from services.memory.indexes.embeddings import BATCH, LOCAL, LocalEmbedder
from services.memory.indexes.models import EmbeddingModels
from services.memory.indexes.vectors import store
from services.memory.memories.keeping import Keeping
from services.memory.memories.learning import FinishedRun, FoundFact, Learning
from services.memory.memories.store import TOKENS, Memories, MemoryScope
from services.memory.metering.credit import Credit
from tooling.bench.fixture import Fixture
from tooling.bench.protocol import Units
from tooling.stack.checkout import CHECKOUT
from tooling.testing.platform import PASSWORDS
from tooling.testing.service_fakes import HasCredit

PEOPLE = 10
SESSIONS = 12
SMALL_TALK = 8
"""Messages without a fact in each session."""
BEGAN = datetime(2026, 1, 5, 9, tzinfo=UTC)


class Attribute(NamedTuple):
    question: str
    values: tuple[str, ...]
    """Words that stand in no other text here."""
    phrases: tuple[str, ...]
    """Some fit a rule and some do not, as people speak."""
    changes: bool = False
    """It has a second value later."""


ATTRIBUTES = {
    "home": Attribute(
        "Which town is home now?",
        ("Bergen", "Turku", "Aarhus", "Uppsala", "Tampere", "Odense"),
        ("I live in {}.", "We settled in {} and love it.", "I moved to {} last week.", "Our new flat is in {}."),
        changes=True,
    ),
    "work": Attribute(
        "Which employer does this person have?",
        ("Norrtull Bakery", "Vester Shipyard", "Lindholm Clinic", "Askim Timber"),
        ("I work at {}.", "My employer is {}.", "Since May {} pays my salary.", "I started a job at {}."),
        changes=True,
    ),
    "allergy": Attribute(
        "Which food is dangerous for this person?",
        ("peanuts", "shellfish", "celery", "sesame"),
        ("I am allergic to {}.", "Careful, {} sends me to hospital.", "I can't eat {}, my throat closes."),
    ),
    "drink": Attribute(
        "Which drink is preferred?",
        ("rooibos", "espresso", "buttermilk", "ginger ale"),
        ("I prefer {}.", "My favourite drink is {}.", "I like {} most of all.", "Give me {} any day."),
    ),
    "birthday": Attribute(
        "When is the birthday?",
        ("3 March", "19 July", "28 October", "11 December"),
        ("My birthday is {}.", "I turn forty on {}.", "I was born on {}."),
    ),
    "pet": Attribute(
        "How is the pet called?",
        ("Fjoll", "Biscuit", "Ragnar", "Pepita"),
        ("My dog is called {}.", "{} is our cat.", "Remember that my parrot is {}."),
    ),
    "sister": Attribute(
        "How is the sister called?",
        ("Solveig", "Hedda", "Marit", "Ingrid"),
        ("My sister {} visits often.", "{} is my sister.", "Please remember that my sister is {}."),
    ),
    "promise": Attribute(
        "Which promise was given to the colleagues?",
        ("the slide deck", "the group photo", "the wine list", "the route map"),
        ("I promise to send {} to the team.", "The team gets {} from me, my word on it.", "I owe the team {}."),
    ),
    "decision": Attribute(
        "Which supplier was chosen?",
        ("Kvist", "Tindra", "Halmstad Steel", "Oru"),
        ("We decided to buy from {}.", "It will be {}, we signed today.", "We agreed on {} as supplier."),
    ),
}
CHANGING = {name for name, attribute in ATTRIBUTES.items() if attribute.changes}
# Facts that no question asks for. With them there is more to know than fits into the budget.
OTHER_PHRASES = (
    "I like {} in the evening.",
    "I enjoy {} with the children.",
    "I have never been good at {}, sadly.",
    "On Sundays it is {} for me.",
)
OTHER = (
    "chess", "rowing", "pottery", "crosswords", "gardening", "karaoke", "bowling", "knitting", "archery", "sailing",
    "juggling", "origami", "astronomy", "fencing", "bird watching", "calligraphy", "surfing", "baking bread",
    "table tennis", "whittling", "folk dance", "photography", "orienteering", "beekeeping", "darts", "curling",
    "model trains", "yoga", "cross-country skiing", "mushroom picking", "quiz nights", "swimming", "embroidery",
    "badminton", "opera", "geocaching",
)  # fmt: skip
CHATTER = (
    "Could you tell me about the weather over the weekend, please?",
    "Thanks, that was helpful. Is there anything else to know about it?",
    "How long does a parcel take to the north at this time of the year?",
    "Please write two sentences for the notice board about the meeting on Monday.",
    "I read about that in the paper, and it sounded rather complicated to me.",
    "Can the invoice be sent once more, with the order number on it?",
    "Good morning! There is a lot to do today, so let us begin.",
    "The lift is out of order again, and the caretaker does not answer the phone.",
    "Is it possible to change the delivery to the afternoon?",
    "How do the two models differ, in simple words?",
)


class Message(NamedTuple):
    at: datetime
    text: str
    facts: tuple[tuple[str, str], ...] = ()
    """Attribute and value, as a perfect reader would note them; ``other`` for a fact that no question asks for."""


class Asked(NamedTuple):
    question: str
    value: str
    """That is true now."""
    former: str
    """That was true before; empty: none."""


def conversation(person: int) -> tuple[list[Message], list[Asked]]:
    """The messages of one person, the oldest first, and the questions about them. The same for the same number."""
    chance = random.Random(person)
    stated: list[list[Message]] = [[] for _ in range(SESSIONS)]
    asked = []
    for name, attribute in ATTRIBUTES.items():
        former, value = chance.sample(attribute.values, 2)
        # A fact that changes does so in the second half.
        sessions = [chance.randrange(SESSIONS // 2)]
        if attribute.changes:
            sessions.append(chance.randrange(SESSIONS // 2, SESSIONS))
        else:
            former = ""
        for session, word in zip(sessions, [former, value] if former else [value], strict=True):
            text = chance.choice(attribute.phrases).format(word)
            stated[session].append(Message(BEGAN, text, ((name, word),)))
        asked.append(Asked(attribute.question, value, former))
    for n, word in enumerate(chance.sample(OTHER, len(OTHER))):
        text = chance.choice(OTHER_PHRASES).format(word)
        stated[n % SESSIONS].append(Message(BEGAN, text, (("other", word),)))
    messages = []
    for session, facts in enumerate(stated):
        said = [*facts, *(Message(BEGAN, text) for text in chance.sample(CHATTER, SMALL_TALK))]
        chance.shuffle(said)
        begins = BEGAN + timedelta(weeks=2 * session)
        messages += [message._replace(at=begins + timedelta(minutes=n)) for n, message in enumerate(said)]
    return messages, asked


def last_messages(messages: Sequence[Message]) -> list[str]:
    """The newest messages that fit into `TOKENS`."""
    chosen: list[str] = []
    left = TOKENS
    for message in reversed(messages):
        left -= count_tokens(message.text)
        if left < 0:
            break
        chosen.append(message.text)
    return chosen


Context = Callable[[int, str], Awaitable[Sequence[str]]]
"""Person and question → the texts that the prompt has."""


async def measure(place: Fixture, progress: Callable[[int, int], None]) -> list[Units]:
    await prepare_database(place.admin_url, {"memory": PASSWORDS})
    await migrate(place.admin_url, "memory", CHECKOUT / "services/memory/migrations")
    engine = create_engine(role_url(place.admin_url, "memory", "worker", PASSWORDS.worker), pool_size=4)
    database = Database(engine, "memory")
    cipher, embedder = Cipher("m" * 43 + "="), LocalEmbedder()
    subjects = SubjectKeys(cipher)
    memories = Memories(subjects)
    models = EmbeddingModels(database, cipher, LOCAL, lambda *_: embedder)
    learning = Learning(Keeping(subjects), memories, models, Credit(cast(Any, HasCredit())))
    talks = [conversation(person) for person in range(PEOPLE)]
    for person, (messages, _) in enumerate(talks):
        for tenant_id in ("rules", "stand-in"):
            async with database.begin(tenant_id=tenant_id) as tx:
                for message in messages:
                    await _learn(tx, learning, person, message)
        progress(person + 1, 2 * PEOPLE)
    for tenant_id in ("rules", "stand-in"):
        await _embed(database, tenant_id, memories, embedder)

    async def nothing(person: int, question: str) -> Sequence[str]:
        return []

    async def last(person: int, question: str) -> Sequence[str]:
        return last_messages(talks[person][0])

    def remembered(tenant_id: str) -> Context:
        async def context(person: int, question: str) -> Sequence[str]:
            vector = (await embedder.queries([question]))[0].vectors[0]
            async with database.begin(tenant_id=tenant_id) as tx:
                recalled = await memories.recall(tx, MemoryScope(str(person)), vector, embedder.key)
            return [each.memory.text for each in recalled]

        return context

    contexts: dict[str, Context] = {
        "no memory": nothing,
        "last messages": last,
        "memories, rules": remembered("rules"),
        "memories, stand-in for a model": remembered("stand-in"),
    }
    figures = []
    for n, (name, context) in enumerate(contexts.items(), 1):
        texts = [
            (each, " ".join(await context(person, each.question)))
            for person, (_, asked) in enumerate(talks)
            for each in asked
        ]
        figures.append(_figure(name, texts))
        progress(PEOPLE + n * PEOPLE // len(contexts), 2 * PEOPLE)
    await engine.dispose()
    return figures


async def _learn(tx: Tx, learning: Learning, person: int, message: Message) -> None:
    run = FinishedRun(uuid7(), str(person), None, None, message.at)
    if tx.tenant_id == "rules":
        await learning.by_rules(tx, run, message.text)
        return
    found = [
        FoundFact(message.text, "fact", name if name in CHANGING else None, 5, 0.9, None, None, None)
        for name, _ in message.facts
    ]
    await learning.by_model(tx, run, "stand-in", found, ())


async def _embed(database: Database, tenant_id: str, memories: Memories, embedder: LocalEmbedder) -> None:
    async with database.begin(tenant_id=tenant_id) as tx:
        rows = await tx.sql("SELECT id FROM memory WHERE tenant_id = $1 AND replaced_by IS NULL ORDER BY id", tenant_id)
    ids = [id_ for (id_,) in rows]
    for n in range(0, len(ids), BATCH):
        batch = ids[n : n + BATCH]
        async with database.begin(tenant_id=tenant_id) as tx:
            found = [await memories.without_vector(tx, id_, embedder.key) for id_ in batch]
        texts = [memory.text if memory else "" for memory in found]
        made = await embedder.passages(texts)
        async with database.begin(tenant_id=tenant_id) as tx:
            embedded = {id_: vector.tobytes() for id_, vector in zip(batch, made.vectors, strict=True)}
            await store(tx, "memory", embedder.key, None, embedded)


def _figure(context: str, texts: Sequence[tuple[Asked, str]]) -> Units:
    right = sum(asked.value in text for asked, text in texts)
    misleading = sum(bool(asked.former) and asked.former in text and asked.value not in text for asked, text in texts)
    tokens = [count_tokens(text) for _, text in texts]
    return Units(
        bench="remember",
        measure=context,
        value=100 * right / len(texts),
        unit="% answerable",
        goal=None,
        met=True,
        made_of={
            "misleading %": 100 * misleading / len(texts),
            "tokens": sum(tokens) / len(tokens),
            "questions": len(texts),
        },
    )


def texts_of_templates() -> list[str]:
    """All fixed texts, so that a test can show that no value stands in another text."""
    return [
        *CHATTER,
        *OTHER,
        *OTHER_PHRASES,
        *chain.from_iterable(attribute.phrases for attribute in ATTRIBUTES.values()),
    ]
