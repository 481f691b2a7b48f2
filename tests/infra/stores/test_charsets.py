"""Texts in an unknown encoding. More of them, through the parser, are in the tests of memory."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from infra.stores import charsets
from infra.stores.charsets import UnknownEncoding, decode, wide_encoding

TEXTS = [
    ("cp1250", "Proszę o zwrot pieniędzy za zamówienie."),
    ("cp1250", "Nyitvatartás: hétfőtől péntekig"),
    ("cp1250", "Őszi szünet"),
    ("cp1250", "Ďakujem"),
    ("cp1250", "Bucureşti"),
    ("cp1250", "Rambursarea dureaza cinci zile, mulţumesc pentru înţelegere"),
    ("iso8859_2", "Wysyłka trwa pięć dni, święta wyłączone."),
    ("iso8859_2", "Vrátenie peňazí trvá päť dní."),
    ("cp1252", "Être quatorze: une fenêtre et une forêt à Orléans"),
    ("cp1252", "As informações são três"),
    ("cp1252", "Õpetaja kõnnib mööda tänavat"),
    ("cp1252", "Kurz nach März trifft sich die Größe mit Smørrebrød"),
    ("cp1252", "The fee in the Czech shop is £50 – it’s due on 3 May."),
    ("cp1252", "Room of 12 m² and 30 m³ for rent"),
    ("cp1252", "Price ¥500"),
    ("cp1252", "Costs 5¢ each. "),
    ("cp1252", "Add ½ cup"),
    ("cp1252", "Tolerance ±5 µm"),
    ("cp1252", "Size 3×4, 10³. "),
    ("cp1250", "Łatwy i mały"),
    ("cp1250", "ŻÓŁTY ŚLĄSK ŁÓDŹ"),
    *(
        ("cp1250", cased)
        for text in (
            "Vrácení peněz trvá pět dní.",
            "Pozor, dveře se zavírají automaticky",
            "Před použitím si přečtěte návod",
            "Účet byl zablokován z bezpečnostních důvodů",
            "Ředitel školy",
            "Ďakujeme za váš nákup",
            "Zákaznícka podpora spoločnosti",
            "Dziękujemy za zamówienie",
            "Wyłącz urządzenie",
            "Garanţia este valabilă",
            "Škola počinje u ponedjeljak",
        )
        for cased in (text, text.upper())
    ),
    *(
        ("cp1252", cased)
        for text in (
            "La società è responsabile della qualità",
            "Più informazioni",
            "Où êtes-vous né? Près de Noël",
            "Instruções de utilização do aparelho",
            "Ábyrgðin gildir í þrjátíu mánuði",
            "Læs brugsanvisningen før brug",
        )
        for cased in (text, text.upper())
    ),
    *(
        ("cp1252", text)
        for text in (
            "Norður",
            "Ekki er hægt að opna dyrnar",
            "Verðið er lægra",
            "Lýðveldið",
            "Þýsk ábyrgð",
            "L'error s'ha produït avui",
            "El fitxer és un sòcol",
        )
    ),
    *(
        ("cp1250", text)
        for text in (
            "nieprawidłowy numer telefonu",
            "wprowadzone słowo",
            "Egyértelmű válasz",
            "Az Alt és Win billentyűk",
            "Parolă nouă",
            "Valoarea maximă posibilă",
            "Slijedeće naredbe",
            "Onemogući obavijesti",
            "Baltički jezici",
        )
    ),
    ("cp1250", "wyświetlanie informacji"),
    ("cp1250", "Slovinský jazyk"),
    *(
        ("iso8859_2", text)
        for text in (
            "Izvršavanje nije uspjelo",
            "Boja križića",
            "Greška čitanja",
            "arabščina",
        )
    ),
    ("cp1254", "Yeni ağ bağlantısı"),
    ("cp949", "소속 파티션:"),
    ("cp949", "잘못된 그룹 목록"),
    *(
        ("big5hkscs", text)
        for text in ("無效的列寬數值", "主要圖示名稱", "setgroups 失敗", "顏色選擇元件", "記憶體耗盡")
    ),
    ("gb18030", "请用api和sdk"),
    ("cp1254", "KAPILAR KENDİLİĞİNDEN KAPANIR"),
    ("cp1254", "LÜTFEN MÜŞTERİ HİZMETLERİ İLE İLETİŞİME GEÇİN"),
    ("cp1255", "זהירות: מתח גבוה"),
    ("cp1255", "חוזה העסקה"),
    ("iso8859_2", "ľudia"),
    ("cp866", "Возврат денег занимает пять дней"),
    ("iso8859_5", "Возврат денег занимает пять дней"),
    ("koi8_u", "Повернення грошей триває п'ять днів, їжа"),
    ("gb18030", "Größe: 7 元"),
    ("gb18030", "没有注册"),
    ("gb18030", "宫保鸡丁 麻婆豆腐 鱼香肉丝"),
    ("big5hkscs", "保養期係兩年，唔該聯絡我哋嘅客戶服務。"),
    ("big5hkscs", "我哋嘅地址喺九龍"),
    *(
        (encoding, text)
        for text in (
            "ВНИМАНИЕ! ГАРАНТИЯ ДВА ГОДА",
            "ИНСТРУКЦИЯ ПО ЭКСПЛУАТАЦИИ КОФЕМАШИНЫ",
            "ВОЗВРАТ ДЕНЕГ ЗАНИМАЕТ ПЯТЬ ДНЕЙ",
            "ВСТРЕЧА НАЧИНАЕТСЯ В ТРИ ЧАСА ДНЯ",
        )
        for encoding in ("cp1251", "koi8_r", "cp866", "iso8859_5")
    ),
    ("koi8_u", "ПОВЕРНЕННЯ ГРОШЕЙ ТРИВАЄ П'ЯТЬ ДНІВ, ЇЖА"),
    ("cp1253", "ΠΡΟΣΟΧΗ: Η ΠΟΡΤΑ ΚΛΕΙΝΕΙ ΑΥΤΟΜΑΤΑ"),
    ("cp1255", "אין חבילות לעדכון."),
    ("utf-16-le", "The key hangs in the yellow box."),
    ("utf-16-be", "退款需要五天。\n请联系客服。\n"),
    ("utf-32-le", "退款需要五天。"),
    ("utf-32-be", "Привет"),
]


@pytest.mark.parametrize(("encoding", "text"), TEXTS)
def test_a_short_text_is_read_in_its_encoding(encoding: str, text: str) -> None:
    assert decode(text.encode(encoding)) == (text, encoding)


DAMAGED = [
    "Die Rückgabe der Geräte für Köln dauert fünf Tage.",
    "Grüße aus Köln",
    "Été à Paris, déjà vu",
    "Příliš žluťoučký kůň",
    "Гарантия тридцать месяцев",
    "保修期为三十个月",
    "Café – 5 €",
]


@pytest.mark.parametrize("declared", [None, "utf-8", "cp1252"])
@pytest.mark.parametrize("text", DAMAGED)
def test_utf8_with_a_damaged_byte_is_utf8(text: str, declared: str | None) -> None:
    for byte in (b"\xff", b"\xc3", b"\xa0"):
        assert decode(text.encode() + byte + b" and more", declared) == (f"{text}\ufffd and more", "utf-8")
    assert decode(f"{text}退款".encode()[:-1], declared) == (f"{text}退\ufffd", "utf-8")


def test_a_text_with_a_damaged_byte_is_read_in_its_encoding() -> None:
    text = "保修期为两年，请联系客户服务部门退款。" * 2
    content = text.encode("gbk")
    assert decode(content + b"\xff" + content) == (f"{text}\ufffd{text}", "gb18030")
    with pytest.raises(UnknownEncoding):
        decode(content[:20] + b"\xff" + content[:10])


def test_a_declared_encoding_is_read_as_the_larger_one() -> None:
    assert decode("𨋢".encode("big5hkscs"), "big5") == ("𨋢", "big5hkscs")


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"\1\0\2\0\3\0\4\0", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", bytes(range(256))]
)
def test_binary_content_is_no_text_of_wide_letters(content: bytes) -> None:
    assert wide_encoding(content) is None


@pytest.mark.parametrize(
    ("encoding", "text"),
    [(encoding, text) for encoding, text in TEXTS if "utf" not in encoding]
    + [("utf-8", "é退😀"), ("utf-16-le", "退款需要\n"), ("utf-32-be", "Привет"), ("iso2022_jp", "返金には五日")],
)
def test_a_text_that_is_cut_within_a_letter_is_read_in_its_encoding(encoding: str, text: str) -> None:
    text *= 40
    for characters in range(20, 28):
        assert decode(text.encode(encoding), characters=characters) == (text[:characters], encoding)


def lines_run(call: Callable[[], Any]) -> int:
    """How many lines of the module Python runs during the call."""
    count = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return trace if frame.f_code.co_filename == charsets.__file__ else None

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


def test_the_steps_of_the_judgement_do_not_grow_with_the_file() -> None:
    short, long = (b"hello world " * n + b"\xff" for n in (2_000, 100_000))
    assert lines_run(lambda: decode(long)) == lines_run(lambda: decode(short))
