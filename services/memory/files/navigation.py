"""Takes the parts of an HTML page out that only lead to other places: menus, lists of the page's own headings, links to
share the page. Also banners about cookies, signs beside headings, and numbers beside lines of code. In linear time.

The name of a part is not enough: a menu stays if it has text outside its links, such as opening hours, or a telephone
number.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Set
from typing import NamedTuple

from lxml import etree, html  # type: ignore[import-untyped]

# Names among the classes and the id of a part.
_MENU = re.compile(
    r"(?:^|[\s_-])(?:nav|navbar|navbox|navigation|mainmenu|main-menu|submenu|sub-menu|menu-item|breadcrumbs?"
    r"|share|sharing|sharedaddy|shariff|addtoany)(?:$|[\s_-])",
    re.IGNORECASE,
)
_CONSENT = re.compile(
    r"cookie[-_]?(?:banner|notice|consent|bar|law|hint|popup|layer|message|modal|overlay|alert)"
    r"|onetrust-|cybotcookiebot|usercentrics-|didomi-|cc-window",
    re.IGNORECASE,
)
_LINE_NUMBERS = re.compile(r"(?:^|\s)(?:linenos?|lnt|gutter|rouge-gutter|hljs-ln-numbers)(?:$|\s)")
_SKIP = re.compile(r"skip|jump", re.IGNORECASE)
_EDIT = re.compile(r"(?:^|\s)mw-editsection(?:$|\s)")
_TITLES = ("h2", "h3", "h4", "h5", "h6")
_CONTACTS = ("tel:", "mailto:", "sms:")
_WORD = re.compile(r"\w")
# The number before a heading, and the sign behind it that leads to its place.
_AROUND = re.compile(r"^[\d.]+\s+|\s*[¶#§]$")
# Outside its links, a menu has at most this part of its text: the signs between them.
_MAX_OTHER = 0.1
# In characters. A banner about cookies has no more, and a page with less text outside of links is a list of links.
_MAX_CONSENT, _MIN_TEXT = 3_000, 200


class _Count(NamedTuple):
    """Characters of the page so far."""

    other: int = 0
    """Outside of links, titles, and repeated headings."""
    titles: int = 0
    links: int = 0
    """With buttons."""
    repeated: int = 0
    """In links to a place of the page, with the text of a heading."""
    numbers: int = 0
    """In texts that are only numbers."""
    contacts: int = 0


def remove(root: html.HtmlElement, is_hidden: Callable[[etree._Element], bool]) -> None:
    """Removes these parts from the page. Its hidden parts do not count."""
    headings = {_plain(each) for each in root.iter("h1", *_TITLES)}
    menus: list[html.HtmlElement] = []
    others: list[html.HtmlElement] = []
    count = _Count()
    begun: list[_Count] = []
    # The outermost open link or title, and the part that is the text of the page or an article.
    inside: html.HtmlElement | None = None
    main: html.HtmlElement | None = None
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        if event == "start" and is_hidden(element):
            walk.skip_subtree()
        elif event == "start":
            begun.append(count)
            if main is None and (element.tag in ("main", "article") or element.get("role") == "main"):
                main = element
            if inside is None and (element.tag in ("a", "button") or element.tag in _TITLES):
                inside = element
                count = _add(count, _linked(element, headings))
            elif inside is None:
                count = _add(count, _text(element.text, headings))
        else:
            if not is_hidden(element):
                own = _Count(*map(operator.sub, count, begun.pop()))
                if _is_menu(element, own, named=main is None):
                    menus.append(element)
                elif _is_aside(element, own) or _is_sign(element):
                    others.append(element)
                inside, main = (None if element is each else each for each in (inside, main))
            if inside is None:
                count = _add(count, _text(element.tail, headings))
    for element in others if count.other < _MIN_TEXT else others + menus:
        element.drop_tree()


def _add(count: _Count, more: _Count) -> _Count:
    return _Count(*map(operator.add, count, more))


def _plain(element: etree._Element) -> str:
    return _AROUND.sub("", " ".join("".join(element.itertext()).split()))


def _is_numbers(text: str) -> bool:
    return text.replace(" ", "").isdecimal()


def _text(text: str | None, headings: Set[str]) -> _Count:
    text = " ".join((text or "").split())
    is_heading = _AROUND.sub("", text) in headings
    return _Count(other=0 if is_heading else len(text), numbers=len(text) if _is_numbers(text) else 0)


def _linked(element: html.HtmlElement, headings: Set[str]) -> _Count:
    """Of a link, a button or a title."""
    text = _plain(element)
    size, numbers = len(text), len(text) if _is_numbers(text) else 0
    link = element if element.tag == "a" else element.find(".//a")
    if link is None and element.tag != "button":
        return _Count(titles=size, numbers=numbers)
    goal = "" if link is None else link.get("href", "")
    return _Count(
        links=size,
        repeated=size if goal.startswith("#") and text in headings else 0,
        numbers=numbers,
        contacts=size if goal.startswith(_CONTACTS) else 0,
    )


def _named(element: etree._Element) -> str:
    return f"{element.get('class', '')} {element.get('id', '')}"


def _is_menu(element: etree._Element, own: _Count, *, named: bool) -> bool:
    """named: the names of the part count."""
    if own.contacts or own.links <= own.titles or own.other > _MAX_OTHER * (own.links + own.titles):
        return False
    if element.tag in ("ul", "ol", "dl") and own.links == own.repeated:
        return True
    is_marked = element.tag == "nav" or element.get("role") == "navigation"
    return is_marked or (named and element.tag not in ("html", "body") and bool(_MENU.search(_named(element))))


def _is_aside(element: etree._Element, own: _Count) -> bool:
    """Whether the part is a banner about cookies, numbers of lines, or a link to edit the page."""
    names = _named(element)
    size = own.other + own.links + own.titles
    if element.tag in ("html", "body"):
        return False
    return bool(
        _EDIT.search(names)
        or (own.numbers == size and _LINE_NUMBERS.search(names))
        or (size < _MAX_CONSENT and _CONSENT.search(names))
    )


def _is_sign(element: etree._Element) -> bool:
    """Whether a link to a place of the page has no words, or is one over the menu."""
    return (
        element.tag == "a"
        and element.get("href", "").startswith("#")
        and bool(_SKIP.search(element.get("class", "")) or not _WORD.search("".join(element.itertext())))
    )
