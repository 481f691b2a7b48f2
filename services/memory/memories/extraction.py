"""Finds facts about a person in their own words, by rules. Pure. It never reads the reply or the output of tools."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

from protos.messages.channel import FORWARDED, IN_REPLY

Kind = Literal["fact", "preference", "decision", "promise"]

MAX_FACTS = 10
MAX_TEXT = 500
# Shorter words are in many sentences and prove nothing.
MIN_QUOTE = 3


class LearnedFact(NamedTuple):
    text: str
    """The person's own sentence."""
    kind: Kind
    importance: int
    """From 1 to 10."""
    topic: str | None = None
    """Of two facts with one topic, the newer one is true."""


class _Rule(NamedTuple):
    pattern: re.Pattern[str]
    kind: Kind
    importance: int
    topic: str | None = None
    """With `{}` for the first group."""


def _rule(pattern: str, kind: Kind, importance: int, topic: str | None = None) -> _Rule:
    return _Rule(re.compile(pattern, re.IGNORECASE), kind, importance, topic)


# In chats many write Im and dont.
_I = r"\bI(?: a|['’])?m\b"
_IS = rf"{_I}(?: not| no longer)?(?: an?)?"
_LIVE = r"\bI(?: now)? live in"
_MOVED = r"\bI(?:['’]?ve| have)? moved to"
_WORK = r"\bI(?: now)? work"
_OBJECT = r"([^;!]{2,})"
# Of these words the earlier messages give the meaning.
_TASTE = rf"(?!(?:it|th(?:is|at|[eo]se|em|eir)|h(?:im|er|is)|your?|wh(?:en|at)|how|one)\b){_OBJECT}"
# Before a name, as most people write it; before a place and not a kind of home.
_NAMED = r"(?=(?:the )?(?-i:[^\W\d_a-z]))"
_PLACE = r"(?!(?:an?|my|our|this) |the (?-i:[^A-Z]))"
# People move to these, too, and do not live there.
_NO_TOWN = r"(?!(?:\w+ )?\d|(?:\w+ ){0,3}(?:plan|team|department|version|Windows|Linux|macOS|iOS|Android)\b)"
_NO_TOWN_ZH = r"(?![^，；]*(?:[\d楼层组]|部门|会议室|办公室|工位))"
_MONTH = r"(?:Jan|Feb|Mar|Apr|May|June?|July?|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?"
# And not next week: a day of the year.
_DAY = rf"(?: on)?(?: the)? (?:\d+[./-]\d|\d+(?:st|nd|rd|th)?(?: of)? {_MONTH}|{_MONTH} (?:the )?\d{{1,2}}\b)"
# The first rule that fits a sentence decides. It has a topic only if its sentences contradict each other.
_RULES = (
    _rule(rf"{_I}(?: not| severely| very| no longer)? allergic to {_OBJECT}", "fact", 9, "allergy {}"),
    _rule(rf"\bI have an? (?:\w+ )?allergy to {_OBJECT}", "fact", 9, "allergy {}"),
    _rule(r"\bI have an? (?:severe |serious |bad |mild )?([^\W\d_]+) allergy\b", "fact", 9, "allergy {}"),
    _rule(r"我对([^,，。；;！]{1,30}?)(?:不再|不|严重|有点)*过敏", "fact", 9, "allergy {}"),
    # Vegetarians say so too.
    _rule(rf"{_I} not (?:a )?(?:vegan|pescatarian)\b(?! any ?more)", "fact", 8),
    _rule(rf"{_IS} (?:vegetarian|vegan|pescatarian)", "fact", 8, "diet"),
    _rule(r"我(?:现在)?(?:吃素|不吃素|是素食)", "fact", 8, "diet"),
    _rule(rf"{_IS} diabetic", "fact", 8, "diabetes"),
    _rule(rf"{_IS} co?eliac", "fact", 8, "coeliac disease"),
    _rule(rf"\bmy name(?: is|['’]s) {_NAMED}", "fact", 7, "name"),
    _rule(r"\bmy name(?: is|['’]s) \w", "fact", 7),
    # And not, for example, on Monday or ASAP.
    _rule(r"\bcall me (?-i:(?!\w*day\b|[A-Z]{2})[^\W\d_a-z])", "fact", 7, "form of address"),
    # With these signs it means to order, or to call a person.
    _rule(r"我叫(?![了过不他她它你您人外的车快辆个服]|一[辆个份杯声下])|我的名字是", "fact", 7, "name"),
    # With these signs it means to call or to wake a person.
    _rule(r"请叫我(?!一[声下]|起床|[醒来去])", "fact", 7, "form of address"),
    _rule(rf"{_LIVE} {_PLACE}|{_MOVED} {_PLACE}{_NO_TOWN}", "fact", 6, "home"),
    _rule(rf"{_LIVE}|{_MOVED}", "fact", 6),
    _rule(rf"我(?:现在)?住在(?!一|这|那|公寓|宿舍|酒店)|我搬到{_NO_TOWN_ZH}", "fact", 6, "home"),
    _rule(r"我(?:现在)?住在|我搬到", "fact", 6),
    _rule(rf"{_WORK} (?:at|for) {_NAMED}", "fact", 6, "work"),
    _rule(rf"{_WORK} as an?\b", "fact", 6, "occupation"),
    _rule(rf"{_WORK} (?:at|for|as|in)\b", "fact", 6),
    _rule(r"我(?:现在)?在[^,，。；;！]{1,20}(?:工作|上班)", "fact", 6),
    # Without a topic: it may deny one place, and another one is the home.
    _rule(r"\bI (?:do not|don['’]?t|no longer) (?:live in|work (?:at|for|as|in))\b", "fact", 6),
    _rule(r"我(?:已经)?不再?(?:住在|在[^,，。；;！]{1,20}(?:工作|上班))", "fact", 6),
    _rule(
        rf"\b(?:my birthday is|I was born){_DAY}|我的生日是[\d一二三四五六七八九十]+[年月./-]", "fact", 7, "birthday"
    ),
    _rule(r"\bmy birthday is|\bI was born [io]n\b|我的生日是|我出生", "fact", 7),
    _rule(
        rf"\bI (?:do not |don['’]?t |really |now |no longer )*(?:like|love|prefer|enjoy|hate|dislike) {_TASTE}",
        "preference",
        5,
        "taste {}",
    ),
    _rule(
        r"我(?:现在|很|非常|最|不再|不)*(?:喜欢|爱吃|爱喝|讨厌|偏好)(?![它他她你这那])([^。；;！]+)",
        "preference",
        5,
        "taste {}",
    ),
    _rule(r"\b(?:we|I)(?: have|['’]ve)? (?:decided|agreed) (?:to|on|that)\b|我们?决定", "decision", 6),
    _rule(r"\bI promise\b|我(?:答应|保证)", "promise", 6),
    _rule(r"^(?:please )?(?:remember|note)(?: that|:) |^请?记住", "fact", 8),
)
# A wish to have something forgotten. If its sentence were learned, the very thing to forget would be remembered.
_FORGET = re.compile(
    r"(?i)^(?:(?:can|could|would|will) you )?(?:please )?(?:forget|delete|erase|remove|do(?:n['’]t| not) remember)\b"
    r"|^请?你?(?:忘记|忘掉|忘了|删除|删掉|不要记|别记)"
)
# Parts of a message that are not the person's own words: lines of an earlier message, code, quotations.
_QUOTED = re.compile(
    r"""
    ^[ \t]*>.* | ```[\s\S]*?(?:```|\Z) | `[^`\n]*`
    | "[^"]*" | “[^“”]*” | «[^«»]*» | 「[^「」]*」 | 『[^『』]*』
    | (?<!\w)['‘][^'‘’\n]*(?:(?<=\w)['’](?=\w)[^'‘’\n]*)*['’](?!\w)
    """,
    re.MULTILINE | re.VERBOSE,
)
# Behind such a line, a message has the words of another one, perhaps of another person: as channels and mail programs
# write it.
_ANOTHER = re.compile(
    rf"^[ \t>]*(?:{re.escape(FORWARDED)}|{re.escape(IN_REPLY)}|-+ ?(?:Forwarded|Original) Message ?-+"
    r"|Begin forwarded message:|On .{5,200} wrote:)[ \t]*$",
    re.MULTILINE | re.IGNORECASE,
)
# Before a fact in its sentence: another person says it of themselves, it is only supposed, or it is to be written.
_NOT_STATED = re.compile(
    r"""(?ix)
    \b(?:if|whether|unless|suppose|imagine|pretend|assum(?:e|ing)|not[ ]true|untrue)\b[^,]*$
    | \b(?:translate|write|say|send|draft|correct|rephrase|print|type|answer|reply|said|says|told|wrote|writes)\b.*:
    | ^[\W\d]*(?!(?:note|fyi|update|ps|correction|important|rem(?:emb|ind)er|btw|me|also|yes|no|diet|hi|hello)[ ]*:)
        [^\W\d_]+(?:[ ](?-i:[^\W\d_a-z])[^\W\d_]*)?[ ]*:
    | ^[\W\d]*(?!注意|更正|补充|备注|另外|提醒|你好|请)[\u4e00-\u9fff]{2,4}[:：] | 说[:：]
    | (?:如果|假如|要是|假设|翻译|是否)[^，]*$
    """
)
_UNIT = r"""
    (?:day|week|weekend|month|year|term|semester|spring|summer|autumn|fall|winter|Jan(?:uary)?|Feb(?:ruary)?|March|April
    |May|June|July|August|Sept(?:ember)?|October|November|December|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day)\b
"""
_LATER = rf"""
    (?:next[ ]{_UNIT} | the[ ]coming[ ]{_UNIT} | tomorrow
    | (?:from|starting|beginning|as[ ]of)[ ](?:on[ ]|in[ ])?{_UNIT})
"""
_LATER_ZH = r"""
    (?:下个?(?:星期|礼拜|月|周|年|学期)[一二三四五六日天]?|[明后][天年]|将来|未来|不久|很快|再?过[\d一二两三四五六七八九十几]+个?[天周月年]
    |以后)(?:起|开始|以后|之后|后|的时候)?
"""
# Directly before a fact, or behind it: it is not true yet, is true for a time, or is doubted.
_NOT_SURE = re.compile(
    rf"""(?ix)
    (?:
        \b(?:{_LATER}|(?:from|starting|as[ ]of)[ ]{_LATER}|soon|(?:one|some)[ ]?day
        |in[ ](?:an?|one|two|three|four|five|six|ten|\d+|a[ ]few|some)[ ](?:day|week|month|year)s?
        |(?:until|till)[ ](?!now\b|today\b)[^,;:]*
        |maybe|perhaps|possibly|probably|presumably|hopefully
        |I[ ](?:guess|suspect|doubt|wish|hope|(?:do[ ]not|don['’]?t)[ ](?:think|believe))(?:[ ]that)?
        |(?:not|un)[ ]?(?:sure|certain)(?:[ ]that)?)
        | {_LATER_ZH} | 为止 | 也许 | 或许 | 可能 | 大概 | 说不定 | 恐怕 | 好像 | 不确定 | 怀疑 | 希望 | 但愿
    )[,，]?\s*$
    """
)
_NOT_SURE_BEHIND = re.compile(
    rf"""(?ix)
    ^I(?:[ ]now)?[ ](?:live|work)\b[^,;]*[ ](?:(?:from|starting|as[ ]of)[ ])?{_LATER}[ ,.!]*$
    | ,[ ]*(?:maybe|perhaps|possibly|probably|I[ ](?:think|guess|suppose))[ .!]*$
    | ,[ ]*(?:but[ ])?I(?:['’]?m[ ]not[ ]sure|[ ]am[ ]not[ ]sure|[ ]do[ ]not[ ]know|[ ]don['’]?t[ ]know)[ .!]*$
    | [，,](?:可能|也许|大概|或许|应该)吧?[ 。！]*$
    """
)
# Directly before a fact that is not a move: it was true.
_FORMERLY = re.compile(
    rf"""(?ix)
    (?:
        \b(?:(?<!since[ ])(?<!from[ ])last[ ]{_UNIT}|before[ ]\d{{4}}|back[ ]then|in[ ]the[ ]past|formerly|previously
        |as[ ]a[ ](?:child|kid|boy|girl|teenager)|when[ ]I[ ]was[ ](?:\w+[ ]?){{1,4}})
        | (?:^|[\d年月，])(?:以前|之前) | 从前 | 过去 | 曾经 | 当时 | 那时候? | 小时候 | 年轻时
        | (?<!从)(?<!自)(?:上个?(?:星期|礼拜|月|周|年|学期)|[去前]年|[昨前]天)
    )[,，]?\s*$
    """
)
_MOVE = re.compile(r"(?i)\bmoved\b|搬到")
# A question behind a statement. One that asks whether the statement is true belongs to it.
_ASKED = re.compile(
    r"""(?ix)
    (?P<said>(?!(?:am|do|does|did|is|are|was|were|can|could|will|would|should|have|has|what|which|where|when|who|how|why)\b)
        .*?\w)[,;]\s*(?:(?:so|and|but)\s+)?(?!is\s(?:that|this|it)\s(?:right|correct|true|so)\b|are\syou\ssure)
        (?:what|which|where|when|who|how|why|can|could|may|do\syou|does|is|are|will|would|should|any)\b.*[?？]
    | (?P<said_zh>[^吗?？]*?)[，；](?!(?:不?对|不?是|好|真的)[吗吧])
        [^，；]*(?:吗|呢|什么|哪|怎么|多少|几|谁|可以|能)[^，；]*[?？]
    """
)
# The part of a sentence outside of its fact says more of the person, or doubts the fact. If a newer fact replaced the
# sentence, this part would be lost.
_SAYS_MORE = re.compile(
    r"(?i)\b(?:I|my|and|but|said|says|told|thinks?|believes?|claims?|asked)\b|[我和]|，\S|而且|说|告诉|认为|觉得|以为"
)
# A single letter before one of these words is not an initial.
_BEGINNING = r"""
    (?:I|My|We|Our|You|Your|It|This|That|The|There|Do|Does|Did|Is|Are|Am|Can|Could|Would|Should|What|Where|When|Who|Which
    |Why|How|Please|Thanks?|Also|But|And)['’\s]
"""
# Signs that end a sentence do not end it within a number or an address, nor after an initial, a title or "no.".
_SENTENCE = re.compile(
    rf"""
    (?:
        \b(?:[A-HJ-Za-z](?!\.\s+{_BEGINNING})|(?i:St|Mrs?|Ms|Dr|Prof|No(?=\.[ ]?\d)))\.
        | (?<![.!?])[.!?]+(?=[a-z\d])
        | [^.!?。！？；\n]
    )+
    (?:[.!?。！？；]+|\n|$)
    """,
    re.VERBOSE,
)
# After a fact: a clause that does not state more of it, and words that do not change its object.
_CLAUSE = re.compile(r"(?i)[,，]\s*(?:(?:so|because|since|please|thanks?)\b|请|所以|因为|谢|太).*")
_AFTERWARDS = re.compile(r"(?:\s+(?:any ?more|any longer|very much|a lot|now|at all|too|again)|[的了])+$")
_NOT_LETTERS = re.compile(r"[^\w]+")


def facts(said: str) -> list[LearnedFact]:
    """The facts that a person states about themselves in a message, at most MAX_FACTS. Questions, wishes to forget,
    quotations and suppositions state none."""
    found: dict[str, LearnedFact] = {}
    own = _QUOTED.sub(lambda quoted: "\0" * len(quoted[0]), said)
    for begin, sentence in _statements(said):
        if len(sentence) > MAX_TEXT:
            continue
        for rule in _RULES:
            if part := rule.pattern.search(sentence):
                if own[begin + part.start()] != "\0" and _is_stated_of_today(sentence, part, rule.kind):
                    fact = LearnedFact(sentence, rule.kind, rule.importance, _topic(rule, part))
                    found.setdefault(normal(sentence), fact)
                break
    return list(found.values())[:MAX_FACTS]


def _is_stated_of_today(sentence: str, part: re.Match[str], kind: Kind) -> bool:
    before = sentence[: part.start()]
    if _NOT_STATED.search(before):
        return False
    # A decision of last week and a promise for tomorrow are ones of today.
    if kind not in ("fact", "preference"):
        return True
    was = _FORMERLY.search(before) and not _MOVE.search(part[0])
    return not was and not _NOT_SURE.search(before) and not _NOT_SURE_BEHIND.search(sentence[part.start() :])


def topic_of(text: str) -> str | None:
    """The topic of a text that states one fact."""
    found = facts(text)
    return found[0].topic if len(found) == 1 else None


def is_stated(quote: str, said: str) -> bool:
    """Whether a person said these words, and not in a question or in a wish to have them forgotten."""
    wanted = normal(quote)
    return len(wanted) >= MIN_QUOTE and wanted in normal(" ".join(sentence for _, sentence in _statements(said)))


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """The sentences, with their places, that are neither questions nor wishes to forget, nor words of another message;
    of a statement with a question behind it the statement."""
    another = _ANOTHER.search(text)
    for match in _SENTENCE.finditer(text, 0, another.start() if another else len(text)):
        sentence = match[0].strip()
        if sentence.endswith(("?", "？")):
            asked = _ASKED.fullmatch(sentence) if len(sentence) <= MAX_TEXT else None
            sentence = (asked["said"] or asked["said_zh"]) if asked else ""
        if sentence and not _FORGET.match(sentence):
            yield text.index(sentence, match.start()), sentence


def normal(text: str) -> str:
    """The form in which two texts that say the same are equal: letters and digits in lower case."""
    return _NOT_LETTERS.sub(" ", text.lower()).strip()


def _topic(rule: _Rule, part: re.Match[str]) -> str | None:
    rest = f"{part.string[: part.start()]} {_CLAUSE.sub('', part.string[part.end() :])}"
    if rule.topic is None or _SAYS_MORE.search(rest):
        return None
    return rule.topic.format(*map(_object, part.groups()))


def _object(text: str) -> str:
    """The thing in a fact, or the whole list of things: a part of the list does not contradict it."""
    return _AFTERWARDS.sub("", normal(_CLAUSE.sub("", text)))
