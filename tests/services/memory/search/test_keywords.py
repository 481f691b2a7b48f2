"""Keyword search in PostgreSQL: English and Chinese words, codes, and other tenants."""

from __future__ import annotations

from uuid import UUID

import pytest

from infra.clock import uuid7
from infra.postgres.database import Database
from infra.postgres.db import create_engine
from infra.postgres.schema import role_url
from infra.stores.objects import Stored
from services.memory import readable
from services.memory.domain import Block, chunk, sections
from services.memory.indexes.vectors import store
from services.memory.knowledge import documents, passages
from services.memory.knowledge.languages import LANGUAGES
from services.memory.search.keywords import _COUNT, _RANK, _READ, READ, with_words
from tests.services.memory import files
from tooling.testing.platform import PASSWORDS, Platform

EVERYONE = readable.Scope(("all",))


@pytest.fixture(scope="module")
async def memory_database(platform: Platform) -> Database:
    await platform.prepare("memory")
    return platform.database("memory")


async def add(database: Database, tenant_id: str, blocks: list[Block], *, indexed: bool = True) -> UUID:
    id_ = uuid7()
    async with database.begin(tenant_id=tenant_id) as tx:
        await documents.add(tx, id_, "text", Stored(path="path", size=1, sha256="0", content_type="text/plain"))
        await passages.add(tx, id_, 0, list(chunk(blocks)))
        if indexed:
            await documents.advance(tx, id_, "indexed", 1.0)
    return id_


async def found(database: Database, tenant_id: str, text: str, limit: int = 10) -> list[str]:
    async with database.begin(tenant_id=tenant_id) as tx:
        [ranks] = await with_words(tx, [text], limit, EVERYONE)
        texts, _ = await readable.found(tx, list(ranks), EVERYONE, "", [])
    return [texts[id_].text for id_ in ranks]


@pytest.fixture(scope="module")
async def handbooks(memory_database: Database) -> Database:
    for language in ("en", "zh"):
        await add(memory_database, "norrland", list(sections(files.handbook(language).decode())))
    return memory_database


@pytest.mark.parametrize(
    ("query", "answer"),
    [
        ("order number 7710", "7710"),
        ("E07", "E07"),
        ("household warranties", "30 months"),
        ("descaled with vinegar", "vinegar and citric acid damage"),
        ("家用保修多久？", "30 个月"),
        ("可以用醋除垢吗", "醋和柠檬酸会损坏密封圈"),
        ("清洁片", "清洁片"),
    ],
)
async def test_words_of_both_languages_find_their_passage(handbooks: Database, query: str, answer: str) -> None:
    """Also in another form (``warranties``), and in Chinese, which has no spaces between words."""
    assert answer in " ".join((await found(handbooks, "norrland", query))[:3])


async def test_passages_with_all_words_come_before_those_with_any(memory_database: Database) -> None:
    texts = ["The blue kettle leaks.", "The kettle is new.", "A blue door.", "Nothing else."]
    await add(memory_database, "order", [Block(text, str(n)) for n, text in enumerate(texts)])
    hits = await found(memory_database, "order", "blue kettles")
    assert hits[0] == texts[0]
    assert sorted(hits[1:]) == sorted(texts[1:3])
    assert await found(memory_database, "order", "blue kettle", limit=1) == texts[:1]


async def test_rare_words_count_more_and_repeated_words_and_long_passages_less(memory_database: Database) -> None:
    texts = [
        "The kettle rests on a stone.",
        "The kettle leaks. A kettle is new, a kettle is old, and here is another kettle.",
        "The kettle leaks. " + "It stands beside a window that shows many trees on a hill. " * 2 + "Trees.",
        "A gasket.",
    ]
    await add(memory_database, "rarity", [Block(text, str(n)) for n, text in enumerate(texts)])
    # "gasket" is in one passage and "kettle" in three; a passage that repeats "kettle" four times gains less than that.
    assert await found(memory_database, "rarity", "kettle gasket", limit=2) == [texts[3], texts[1]]
    # Of two with the same words, the shorter one.
    assert await found(memory_database, "rarity", "kettle") == [texts[1], texts[0], texts[2]]


async def test_a_passage_is_found_by_other_forms_of_its_language(memory_database: Database) -> None:
    texts = {
        "german": "Die Gebühren werden mit der Rechnung am Ende des Monats und nicht vorher erhoben.",
        "french": "Les garanties sont valables pour les appareils qui ont été achetés dans une boutique.",
        "russian": "Гарантия не действует для приборов, которые не были куплены у нас и не работают.",
    }
    await add(memory_database, "languages", [Block(text, name) for name, text in texts.items()])
    for query, name in (("eine Gebühr", "german"), ("garantie valable", "french"), ("купленный прибор", "russian")):
        assert (await found(memory_database, "languages", query))[:1] == [texts[name]]


async def test_words_of_scripts_without_spaces_are_found(memory_database: Database) -> None:
    texts = {
        "รับประกัน": "เครื่องนี้มีการรับประกันสามสิบเดือนนับจากวันที่ซื้อ",
        "ຮັບປະກັນ": "ເຄື່ອງນີ້ມີການຮັບປະກັນສາມສິບເດືອນ",
        "ធានា": "ម៉ាស៊ីននេះមានការធានារយៈពេលសាមសិបខែ",
        "အာမခံ": "ဤစက်သည်အာမခံလသုံးဆယ်ရှိသည်",
        "保証期間": "この機械の保証期間は三十か月です",
    }
    await add(memory_database, "scripts", [Block(text, str(n)) for n, text in enumerate(texts.values())])
    for query, text in texts.items():
        assert await found(memory_database, "scripts", query) == [text]


async def test_words_are_found_without_their_accents_points_and_prefixes(memory_database: Database) -> None:
    texts = {
        "malmö": "The depot in Malmö opens at six.",
        "malmo": "Per Malmo keeps the key.",
        "élèves": "L’équipe offre un café pour les élèves de la ville.",
        "łódź": "Hasło jest u kierownika w Łodzi.",
        "εγγύηση": "Η εγγύηση διαρκεί τριάντα μήνες.",
        "אחריות": "האחריות למקרר היא שלושים חודשים.",
        "خزانة": "مُدِيرُ المَصْنَعِ يَحْفَظُ المِفْتَاحَ.",
        "वारंटी": "फ्रिज की वारंटी तीस महीने है।",
    }
    await add(memory_database, "accents", [Block(text, str(n)) for n, text in enumerate(texts.values())])
    for query, name in (
        ("eleves", "élèves"),
        ("lodzi haslo", "łódź"),
        ("ΕΓΓΥΗΣΗ", "εγγύηση"),
        ("εγγυηση", "εγγύηση"),
        ("אחריות", "אחריות"),
        ("המקרר", "אחריות"),
        ("אַחֲרָיוּת", "אחריות"),
        ("مدير المصنع", "خزانة"),
        ("مفتاح", "خزانة"),
        ("वारंटी", "वारंटी"),
    ):
        assert await found(memory_database, "accents", query) == [texts[name]], query
    # The word as it is written comes first.
    assert await found(memory_database, "accents", "Malmö") == [texts["malmö"], texts["malmo"]]
    assert set(await found(memory_database, "accents", "malmo")) == {texts["malmö"], texts["malmo"]}


async def test_a_word_is_found_that_a_sign_joins_to_another(memory_database: Database) -> None:
    text = "Replace the pump/valve if it leaks.The log is C:/var/log/crane.txt, its owner klage.ops@norrland.example."
    await add(memory_database, "joined", [Block(text), Block("A part of 12.5 kg.", "other")])
    for query in ("valve", "pump/valve", "leaking", "crane.txt", "/var/log", "norrland", "owner@norrland"):
        assert await found(memory_database, "joined", query) == [text], query
    part = "Part XK-4711 of the years 2010-2020."
    await add(memory_database, "joined", [Block(part)])
    for query in ("4711", "XK-4711", "2020", "2010-2020"):
        assert await found(memory_database, "joined", query) == [part], query
    # A number is one word.
    assert await found(memory_database, "joined", "12 5") == []


async def test_documents_of_other_readers_do_not_change_a_rank(memory_database: Database) -> None:
    await add(memory_database, "readers", [Block("A gasket."), Block("A kettle.")])

    async def ranks() -> list[float]:
        async with memory_database.begin(tenant_id="readers") as tx:
            return list((await with_words(tx, ["kettle gasket"], 10, EVERYONE))[0].values())

    before = await ranks()
    hidden = await add(memory_database, "readers", [Block(f"Kettle {n}.", str(n)) for n in range(5)])
    async with memory_database.begin(tenant_id="readers") as tx:
        await tx.sql("UPDATE document SET audience = '{agent:a}' WHERE id = $1", hidden)
    assert await ranks() == before


async def test_only_the_tenants_own_indexed_and_present_documents_are_found(memory_database: Database) -> None:
    tenants = ("tenant-a", "tenant 'b'\\ & | !")
    for tenant in tenants:
        await add(memory_database, tenant, [Block(f"The canary of {tenant} sings.")])
        await add(memory_database, tenant, [Block("An unfinished canary.")], indexed=False)
        gone = await add(memory_database, tenant, [Block("A deleted canary.")])
        async with memory_database.begin(tenant_id=tenant) as tx:
            await documents.delete(tx, [gone])
    for tenant in tenants:
        assert await found(memory_database, tenant, "canary") == [f"The canary of {tenant} sings."]


QUERIES = ["", " ", "the of and", "'", "\\", "a & b | !c", "'''::", "😀", "<->", "水", "x" * 5000, "保\u3000'"]


@pytest.mark.parametrize("query", QUERIES)
async def test_any_text_is_a_query(handbooks: Database, query: str) -> None:
    await found(handbooks, "norrland", query)


async def test_words_with_quotes_are_counted(memory_database: Database) -> None:
    """PostgreSQL writes the quotes of a word doubled."""
    address = "https://example.org/o'brien"
    await add(memory_database, "quotes", [Block(f"It is at {address} now."), Block("It is at https://example.org.")])
    async with memory_database.begin(tenant_id="quotes") as tx:
        [ranks] = await with_words(tx, [address], 10, EVERYONE)
    assert max(ranks.values()) == pytest.approx(1.0)


async def test_of_many_passages_those_with_the_rare_word_come_first(memory_database: Database) -> None:
    """More passages have a word than are read at once, so the words are counted first."""
    common = [Block(f"Shelf {n} holds lamps.", str(n)) for n in range(READ + 20)]
    rare = [Block(f"Shelf {n} holds lamps and a gramophone.", f"r{n}") for n in range(3)]
    await add(memory_database, "many", common + rare)
    found_texts = await found(memory_database, "many", "lamps gramophone", limit=5)
    assert sorted(found_texts[:3]) == [block.text for block in rare]
    assert len(found_texts) == 5


async def test_the_worker_role_finds_words_and_codes_by_their_indexes(
    platform: Platform, memory_database: Database
) -> None:
    """Row-level security would keep PostgreSQL from using them."""
    async with memory_database.begin(tenant_id="plans") as tx:
        await tx.sql("SELECT set_config('enable_seqscan', 'off', true)")
        scoped = (*EVERYONE.parameters, "plans")
        words = await tx.sql(f"EXPLAIN {_READ}", *scoped, list(LANGUAGES), ["lamps"], [None])
        counted = await tx.sql(f"EXPLAIN {_COUNT}", *scoped, ["lamp"])
        ranked = await tx.sql(f"EXPLAIN {_RANK}", *scoped, ["lamp"], ["lamp"])
    for plan in (words, counted, ranked):
        assert "Bitmap Index Scan on passage_words" in str(plan)
    url = role_url(platform.database_url, "memory", "request", PASSWORDS.request)
    engine = create_engine(url, pool_size=1)
    async with Database(engine, "memory", tenanted=True).begin(tenant_id="plans") as tx:
        await tx.sql("SELECT set_config('enable_seqscan', 'off', true)")
        assert "passage_words" not in str(await tx.sql(f"EXPLAIN {_RANK}", *scoped, ["lamp"], ["lamp"]))
    await engine.dispose()


async def test_codes_of_another_tenant_are_not_counted(memory_database: Database) -> None:
    for tenant in ("codes-a", "codes-b"):
        id_ = await add(memory_database, tenant, [Block(f"Error E77 of {tenant}.")])
        async with memory_database.begin(tenant_id=tenant) as tx:
            waiting = await passages.without_vector(tx, id_, "model", 10)
            await store(tx, "passage", "model", None, {passage.id: bytes(8) for passage in waiting})
    async with memory_database.begin(tenant_id="codes-a") as tx:
        counts = await readable.with_codes(tx, ["e77"], "model", 10, EVERYONE)
        texts, _ = await readable.found(tx, list(counts), EVERYONE, "", [])
    assert [each.text for each in texts.values()] == ["Error E77 of codes-a."]
