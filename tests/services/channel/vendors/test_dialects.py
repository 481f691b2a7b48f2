"""Any text of a model: a reader as strict as the vendor accepts each part, no character is torn, no one is notified."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.outgoing.client import Outgoing
from services.channel.vendors import VENDORS, dingtalk, discord, feishu, markdown, qq, slack, teams, telegram, whatsapp
from services.channel.vendors.markdown import PLAIN, render
from services.channel.vendors.splitting import utf8_length, utf16_length
from tests.services.channel.vendors.conftest import Adapter
from tests.services.channel.vendors.examples import examples
from tooling.testing.vendors.server import StandIn

FAMILY = "👨\u200d👩\u200d👧\u200d👦"
ENGLAND = "\U0001f3f4\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f"
PIECES = (
    "word ",
    "**bold** ",
    "*it ~~gone~~ it* ",
    "__**x*y**__ ",
    "`code` ",
    "`` a`b ``",
    "\\`\\`\\`",
    "\n```py\nprint('`')\n\n  x = 1\n```\n",
    "\n````\n```\nnested\n```\n````\n",
    "\n~~~\n```\n~~~\n",
    "\n10. a\n\n    ```py\n    x = 1\n\n    y = 2\n    ```\n\n    after\n",
    "\n- ~~~\n  x\n  ~~~\n",
    "\n> ```\n> x\n>\n> y\n> ```\n",
    "```",
    "\n- a\n  - b\n    1. c\n       > d\n",
    "\n> one\n> > two\n> > - three\n",
    "\n| a | b |\n|---|---|\n| `x|y` | **z** |\n| 1 | 2 |\n",
    "\n# Heading **bold**\n",
    "[a (b)](https://e.example/x_(y)?a=1&b=2) ",
    "[t](tg://user?id=7) [r](/path) [![i](https://e.example/i.png)](https://e.example) ",
    "<b>raw</b> <at user_id=all></at> <AT\tid=all> <at>x</at> <script>alert(1)</script> & &amp; ",
    "@everyone @here @all @全体成员 <!channel> <@U1> <@&7> <qqbot-at-everyone /> <#1> ",
    "<https://e.example/a|b> ",
    FAMILY,
    "🇩🇪🇫🇷👍🏽e\u0301 ",
    ENGLAND,
    "שלום \u202eabc\u202c عربي ",
    "a\u200bb\u2060c ",
    "x" * 300,
    "一二三四五。",
    "\n\n",
    "\n---\n",
    "\n[1]: https://e.example/a?b=_c_ 'title'\n[ERROR]: timeout\n",
)
TEXTS = (
    st.lists(st.sampled_from(PIECES), max_size=40)
    .map("".join)
    .flatmap(lambda text: st.integers(1, 12).map(lambda times: (text * times)[:5_000]))
)


class Html(HTMLParser):
    """Telegram's HTML: known tags, well nested, no quotation in a quotation, nothing within code."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in ("b", "i", "s", "code", "pre", "a", "blockquote"), tag
        assert tag != "blockquote" or tag not in self.open
        if tag == "a":
            [(name, value)] = attrs
            assert name == "href"
            assert (value or "").startswith(("http", "mailto:", "tel:"))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def html(part: str) -> int:
    sent = telegram._marked(part)
    if "parse_mode" not in sent:
        return utf16_length(sent["text"])
    parser = Html()
    parser.feed(sent["text"])
    parser.close()
    assert parser.open == []
    assert not re.search(r"&(?!lt;|gt;|amp;|quot;|#)", sent["text"])
    return utf16_length(parser.text)


def mrkdwn(part: str) -> int:
    text = render(part, slack.MRKDWN)
    assert text.count("```") % 2 == 0 or not part.strip("`\n ")
    # A sign of its own is a link only.
    assert all(
        re.fullmatch(r"<(https?|mailto|tel):[^<>|\n]*(\|[^<>\n]*)?>", one) for one in re.findall("<[^>]*>?", text)
    )
    return len(text)


def fences(dialect: Any, length: Callable[[str], int]) -> Callable[[str], int]:
    def check(part: str) -> int:
        text = render(part, dialect)
        # A fence without code is shown as it is.
        assert text.count("```") % 2 == 0 or not part.strip("`\n ")
        return length(text)

    return check


def plain(length: Callable[[str], int]) -> Callable[[str], int]:
    return lambda part: length(render(part, PLAIN))


def markdown_of_feishu(part: str) -> int:
    assert not re.search(r"<\s*at\b", render(part, feishu.DIALECT), re.IGNORECASE)
    return fences(feishu.DIALECT, utf8_length)(part)


def markdown_of_dingtalk(part: str) -> int:
    assert "<" not in render(part, dingtalk.DIALECT)
    return fences(dingtalk.DIALECT, lambda text: len(msgspec.json.encode(text)))(part)


def text_of_qq(part: str) -> int:
    text = qq._shown(part)
    assert not re.search(r"<[@#]|<qqbot-|@everyone|@全体成员", text)
    # The vendor names no limit of a message.
    return 0


CHECKS: dict[str, tuple[Callable[[str], int], int]] = {
    "telegram": (html, 4_096),
    "slack": (mrkdwn, 4_000),
    "discord": (fences(discord.DIALECT, len), 2_000),
    "whatsapp": (fences(whatsapp.DIALECT, len), 4_096),
    "teams": (fences(teams.DIALECT, utf8_length), 28_000),
    "feishu": (markdown_of_feishu, 28_000),
    "dingtalk": (markdown_of_dingtalk, 15_000),
    "line": (plain(utf16_length), 5_000),
    "twilio": (plain(len), 1_600),
    "wecom": (plain(utf8_length), 2_048),
    "qq": (text_of_qq, 0),
    "webhook": (len, 100_000),
}


DIALECTS = {
    "telegram": telegram.HTML,
    "slack": slack.MRKDWN,
    "discord": discord.DIALECT,
    "whatsapp": whatsapp.DIALECT,
    "teams": teams.DIALECT,
    "feishu": feishu.DIALECT,
    "dingtalk": dingtalk.DIALECT,
}


@pytest.mark.parametrize(
    ("text", "telegram_html", "slack_marks"),
    [
        ("他说**“好”**了", "他说<b>“好”</b>了", "他说\u200b*“好”*\u200b了"),
        ("**注意：**请先看", "<b>注意：</b>请先看", "*注意：*\u200b请先看"),
        ("請看~~「舊」~~的", "請看<s>「舊」</s>的", "請看\u200b~「舊」~\u200b的"),
        ("用`ls`看", "用<code>ls</code>看", "用\u200b`ls`\u200b看"),
        ("un**frigging**real, **b**.", "un<b>frigging</b>real, <b>b</b>.", "un\u200b*frigging*\u200breal, *b*."),
        ("one<br>two<BR />three `<br>`", "one\ntwo\nthree <code>&lt;br&gt;</code>", "one\ntwo\nthree `&lt;br&gt;`"),
        ("|a|\n|-|\n|b<br>c|", "<pre>a\n---\nb c</pre>", "```\na\n---\nb c\n```"),
        ("2 ** 3 ** 4, a_b_c", "2 ** 3 ** 4, a_b_c", "2 ** 3 ** 4, a_b_c"),
        ("https://e.example/_a_?b=_c_", "https://e.example/_a_?b=_c_", "https://e.example/_a_?b=_c_"),
        (
            "_https://e.example_ ~~http://e.example/~u~~",
            "<i>https://e.example</i> <s>http://e.example/~u</s>",
            "_https://e.example_ ~http://e.example/~u~",
        ),
        ("**https://e.example/a_b**。", "<b>https://e.example/a_b</b>。", "*https://e.example/a_b*。"),
        (
            "[https://e.example/_a_](https://e.example/_a_)",
            '<a href="https://e.example/_a_">https://e.example/_a_</a>',
            "<https://e.example/_a_>",
        ),
    ],
)
def test_marks_beside_wide_letters_and_in_addresses(text: str, telegram_html: str, slack_marks: str) -> None:
    assert render(text, telegram.HTML) == telegram_html
    assert render(text, slack.MRKDWN) == slack_marks


@pytest.mark.parametrize(
    ("text", "plain", "read_as_markdown"),
    [
        (r"\_\_init\_\_(\*args)", "__init__(*args)", r"\_\_init\_\_(\*args)"),
        (r"\*a* b \`c\` \~~d\~~ \[e](https://e.example) 1 * 2", "*a* b `c` ~~d~~ [e](https://e.example) 1 * 2", None),
        (r"\# no heading", "# no heading", r"\# no heading"),
        (r"a\\_b", r"a\_b", r"a\\\_b"),
        (
            "snake_case_word https://e.example/_a_",
            "snake_case_word https://e.example/_a_",
            "snake_case_word https://e.example/_a_",
        ),
        ("`__init__`", "__init__", "`__init__`"),
        ("2*3*4=24 and 2**3**4", "2*3*4=24 and 2**3**4", r"2\*3\*4=24 and 2\*\*3\*\*4"),
        ("**Note:**text, so**(yes)** and **b**c", "Note:text, so(yes) and bc", "**Note:**text, so**(yes)** and **b**c"),
    ],
)
def test_escaped_marks_stay_text(text: str, plain: str, read_as_markdown: str | None) -> None:
    assert render(text, PLAIN) == plain
    for dialect in (discord.DIALECT, teams.DIALECT, dingtalk.DIALECT, feishu.DIALECT):
        shown = render(text, dialect)
        if read_as_markdown is not None:
            assert shown == read_as_markdown
        # A reader of Markdown shows the same again.
        assert render(shown, PLAIN) == plain


@pytest.mark.parametrize(
    ("text", "read_as_markdown"),
    [
        ("Here:\n\n[Result]: 42\n\nBye", "Here:\n\n\\[Result]: 42\n\nBye"),
        ("[ERROR]: timeout\n[WARN]: disk", "\\[ERROR]: timeout\n\\[WARN]: disk"),
        ("[The report][1].\n\n[1]: https://e.example/_a_", "[The report][1].\n\n\\[1]: https://e.example/_a_"),
    ],
)
def test_a_line_that_could_define_a_link_stays_text(text: str, read_as_markdown: str) -> None:
    for dialect in (PLAIN, telegram.HTML, slack.MRKDWN, whatsapp.DIALECT):
        assert render(text, dialect) == text
    for dialect in (discord.DIALECT, teams.DIALECT, dingtalk.DIALECT, feishu.DIALECT):
        # A reader of Markdown would take it out of the text.
        shown = render(text, dialect)
        assert [line.rstrip() for line in shown.split("\n")] == read_as_markdown.split("\n")


def test_dingtalk_and_feishu_get_only_markdown_that_they_show() -> None:
    text = "# Title\n\none\ntwo ~~gone~~\n\n- a\n  - b\n- c\n\n> q\n> r\n\n![i](https://e.example/i.png)"
    table = "| a | b |\n|---|---|\n| 1 | <x> |"
    lines = "### Title\n\none  \ntwo gone\n\n- a\n    - b\n- c\n\n> q  \n> r\n\n![i](https://e.example/i.png)"
    assert render(text, dingtalk.DIALECT) == lines
    assert render(table, dingtalk.DIALECT) == "```\na  b\n-  ---\n1  &lt;x>\n```"
    lines = "**Title**\n\none\ntwo ~~gone~~\n\n- a\n    - b\n- c\n\n> q\n> r\n\n[i](https://e.example/i.png)"
    assert render(text, feishu.DIALECT) == lines
    assert render(table, feishu.DIALECT) == "```\na  b\n-  ---\n1  <x>\n```"


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        (r"\(a*b*c\) and $\hat{y}_{t} = \hat{x}_{t}$", r"(a*b*c) and $\hat{y}_{t} = \hat{x}_{t}$"),
        (r"\[ \hat{y}_{t} + \hat{x}_{t} \\ \]", r"[ \hat{y}_{t} + \hat{x}_{t} \\ ]"),
        ("So:\n$$\na &= b\n- c\n+ d\n=\n$$", "So:\n\n$$\na &= b\n- c\n+ d\n=\n$$"),
        ("> \\[\n> - a_1\n> \\]\n\n- b", "[\n- a_1\n]\n\n• b"),
        # Not formulas.
        (r"\[1\], \[sic *x*\], $5 to **$10**, $A, **$B**, `$x_1*y*$`", "[1], [sic x], $5 to $10, $A, $B, $x_1*y*$"),
        ("$$a_1$$ b\n- c costs $$", "$$a_1$$ b\n\n• c costs $$"),
    ],
)
def test_signs_of_a_formula_are_no_marks(text: str, plain: str) -> None:
    assert render(text, PLAIN) == plain


def test_a_reader_of_markdown_makes_no_list_or_heading_of_a_formula() -> None:
    assert render("$$\na\n- c\n+ d\n=\n$$", teams.DIALECT) == "$$  \na  \n\\- c  \n\\+ d  \n\\=  \n$$"


def test_discord_hides_no_part_of_an_answer() -> None:
    assert render("if a || b || c: `a || b`", discord.DIALECT) == r"if a \|\| b \|\| c: `a || b`"


def test_teams_gets_line_breaks_and_signs_that_it_does_not_drop() -> None:
    text = "one\ntwo List<String>\n\n* a\n* b\n  `x<y>`\n\n> q\n> r\n\n| a<b> |\n|---|\n| 1 |"
    shown = "one  \ntwo List&lt;String>\n\n- a\n- b  \n    `x<y>`\n\n> q  \n> r\n\n```\na<b>\n----\n1\n```"
    assert render(text, teams.DIALECT) == shown


def test_a_fence_without_code_is_text_and_a_language_is_no_mention() -> None:
    for dialect in (discord.DIALECT, teams.DIALECT, dingtalk.DIALECT, feishu.DIALECT, slack.MRKDWN, whatsapp.DIALECT):
        assert "```" not in render("```word ", dialect)
        assert "<" not in render("```<at\tid=all></at> x\ncode\n```", dialect)
    assert render("```c++ numbers\nx\n```", discord.DIALECT) == "```c++\nx\n```"


def test_every_vendor_is_checked() -> None:
    assert set(CHECKS) == set(VENDORS)


@pytest.mark.parametrize("name", sorted(CHECKS))
@given(TEXTS)
@settings(max_examples=10, deadline=None)
def test_every_part_is_accepted_and_no_character_is_torn(name: str, text: str) -> None:
    check, most = CHECKS[name]
    parts = VENDORS[name].split(text)
    for part in parts:
        assert part.strip()
        assert check(part) <= most
        # A cut before an accent, a joiner or the letters of a flag, or behind a joiner, would show half a character.
        assert unicodedata.category(part[0]) not in ("Mn", "Me", "Mc")
        assert not "\U000e0020" <= part[0] <= "\U000e007f"
        assert "\u200d" not in (part[0], part[-1])
        part.encode()
    # Nothing is lost but white space; fences and heads of tables may come twice.
    assert set("".join(parts)) >= {sign for sign in text if not sign.isspace()}


# Each % becomes a word of its own.
WORDED = (
    "% **% *%*** `%` ~~%~~ 中**%**文**“%”**。",
    "[% (%)](https://e.example/x_(y)) ![%](https://e.example/i.png) [%](/path) <sub>%</sub> %[^1] $%_{1}$ \\[ % \\]",
    "## % **%**",
    "\n7) %\n   - [ ] %\n     ~~~c++ x\n     %\n\n       %\n     ~~~\n8) %\n",
    "\n> %\n> - %\n>\n> > %\n",
    "\n```py\n" + "    %  # `*%*`\n" * 60 + "```\n",
    "\n| a | b |\n|---|---|\n| `% | %` | %<br>% |\n| % | % | % |\n" + "| % | [%](https://e.example) |\n" * 20,
    "\n$$\n%\n- %\n$$\n",
)


@given(st.lists(st.sampled_from(WORDED), min_size=1, max_size=12))
@settings(max_examples=10, deadline=None)
def test_each_vendor_shows_each_word_once(pieces: list[str]) -> None:
    number = itertools.count(10_000)
    text = re.sub("%", lambda _: f"w{next(number)}", "\n\n".join(pieces))
    words = [f"w{n}" for n in range(10_000, next(number))]
    for name in sorted(set(VENDORS) - {"webhook"}):
        dialect = DIALECTS.get(name, PLAIN)
        shown = "\n".join(render(part, dialect) for part in VENDORS[name].split(text))
        assert re.findall(r"w\d{5}", shown) == words, name


@pytest.mark.parametrize("name", sorted(set(CHECKS) - {"webhook", "teams"}))
async def test_each_piece_is_accepted_by_the_vendor(name: str, outgoing: Outgoing) -> None:
    fake: StandIn = examples()[name].fake
    async with fake:
        adapter = Adapter(name, fake, outgoing)
        for n, piece in enumerate((*PIECES, "".join(PIECES))):
            for m, part in enumerate(adapter.vendor.split(piece), 1):
                place = {"qq": "users/u1", "dingtalk": "user/s1", "feishu": "oc_1", "line": "U1"}.get(name, "1")
                answers = f"m{n}" if name == "qq" else None
                await adapter.send(part, place, f"d{n}-{m}", answers=answers, part=m)
    assert fake.refusals == []


def test_no_word_of_a_table_is_lost_and_its_columns_stand_below_each_other() -> None:
    """A pipe in a code is a part of it, also without a backslash, and a row may have more cells than the head."""
    text = "| `a|b` | 値段 |\n|---|---|\n| `string | 数` | ``x|y`` |\n| `a \\| b` | 1 |\n| or || any | more |"
    shown = (
        "a|b          値段\n-----------  -------------\nstring | 数  x|y\na | b        1\nor            | any | more"
    )
    assert render(text, PLAIN) == shown
    quoted = render("> |a|b|\n> |-|-|\n> |1|2|3|\n\n|" + "`" * 100_000, PLAIN)
    assert quoted.startswith("a  b\n-  -----\n1  2 | 3\n")


def test_a_small_text_does_not_become_a_large_table() -> None:
    text = "|a" * 300 + "|\n" + "|-" * 300 + "|\n" + "a\n" * 300
    cells = [token for token in markdown._parse(text) if token.type == "td_open"]
    assert len(cells) <= 300 + 1_000
    small = "|a|b|c|\n|-|-|-|\n" + "|1|\n" * 400
    assert sum(token.type == "td_open" for token in markdown._parse(small)) == 1_200
