"""Decodes text in an unknown character encoding. Pure.

A short Chinese text in GBK is also valid Korean, Cyrillic and Western text. So every encoding that can decode the bytes
is judged by the same question: are its letters the common ones of its language? Common letters make up more than half
of a real text, and a tenth of one in the wrong encoding.
"""

from __future__ import annotations

import codecs
import math
import re
import unicodedata
from collections.abc import Callable
from itertools import islice

# At least this share of the letters must be common; half of it is enough if no other encoding comes near.
MIN_SHARE = 0.4
# Of the bytes beyond ASCII, for each part that is not valid UTF-8: in other encodings almost all are not valid.
MIN_VALID_BYTES = 7
# The same for the other encodings, in which texts of another encoding are almost valid.
MIN_OTHER_VALID_BYTES = 50
# With fewer letters beyond ASCII, a statistical guess is not better than chance.
MIN_GUESSED_LETTERS = 200
# A sample is enough for the judgement, and a file may be large.
_SAMPLE_LETTERS = 4_000

_PUNCTUATION = "、。，！？：；“”‘’（）《》「」『』【】—…·～％＋－／　０１２３４５６７８９"
_SIMPLIFIED = """
的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成
方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使
情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老
给世位次度门任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目
太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王
象完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运笔
价退款订单客户服务配送发票修质说明换货周请联系账号密码登录支付费免快递地址邮箱电话公司部门合同功能问题答案
机器除垢故障电源按键温度冷热安全使用须知北京上海广州深圳中文编码测试文档内容句您吗呢吧啊哪谁每
早晚午饭茶咖啡店元角块钱买卖租房车票站楼层室号
字符效标置语错选未列项存输误失包值参引型示模败库需令组序持索显息查写读改创找图签版操删证复称钥含函软转略省移启允节态执超匹获检
缺段默限始警串归载亚否连属束止状冲缓忽径端析消调级装范准围集布备注链印排域志窗整闭视缩线询页终择算锁跳验添
"""
_TRADITIONAL = """
的一是不了在人有我他這個們中來上大為和國地到以說時要就出會可也你對生能而子那得於著下自之年過發後作裡用道行所然家種事成
方多經麼去法學如都同現當沒動面起看定天分還進好小部其些主樣理心她本前開但因只從想實日軍者意無力它與長把機十民第公此已工使
情明性知全三又關點正業外將兩高間由問很最重並物手應戰向頭文體政美相見被利什二等產或新己制身果加西斯月話合回特代內信表化老
給世位次度門任常先海通教兒原東聲提立及比員解水名真論處走義各入幾口認條平系氣題活爾更別打女變四神總何電數安少報才結反受目
太量再感建務做接必場件計管期市直德資命山金指克許統區保至隊形社便空決治展馬科司五基眼書非則聽白卻界達光放強即像難且權思王
器需每月除垢溫度冷熱電源按鍵清潔價退款訂單客戶服務配送發票修質說明換貨請聯繫帳號密碼登錄支付費免快遞地址郵箱電話公司部門台灣香港您嗎呢吧
檔案式語字取設選錯標項效元列誤輸未存示稱引組失訊程符格料敗值模顯版型令啟寫包預讀執置參鑰交圖找編記移類亞連庫援告否態套略含簽
端路警視索容印徑確串拉共刪狀載序線準複改封忽始息該裝完驗影窗籤須範轉群併整停縮傳查暫製屬段衝缺色規試尋限檢止欄算擇圍
係我哋嘅喺唔咗啲冇佢嚟乜嘢邊度睇返攞畀呀啦喇
"""
_KANJI = """
日本人年大国会出中時行見月後前生五間上東四今金九入学高円子外八六下来気小七山話女北午百書先名川千水半男西電校語土木聞食車
何南万毎白天母火右読友左休父雨一二三十分方者事合回自社発部定長新場員立開手力問代明動京目通言理体田主題意不作用度強公持野
以思家世多正安院心界教文元重近考画海売知道集別物使品計死特私始朝運終台広住無真有口少町料工建空急止送切転研足究楽起着店病質
待試族銀早映親験英医仕去味写字答夜音注帰古歌買悪図週室歩風紙黒花春赤青館屋色走秋夏習駅洋旅服夕借曜飲肉貸堂鳥飯勉冬昼茶弟
牛魚兄犬妹姉漢保証返品期間修理交換
"""
_KANA = "".join(map(chr, range(0x3041, 0x3097))) + "".join(map(chr, range(0x30A1, 0x30FD)))
_HANGUL = """
이다는을의에가고하은를한로지도사기서해어자과인리일대시그나제보수정아니장들으라부있주게전여면만것상성스국용습요안공동세경원유
적비우관화발오중신물내생방모소무연행법실계선개체구조회합등위했었였음업와않할될된더때말년월없같받교명영간데거려러치트드미통학
파션함패값름프되버못크옵키력잘형설디블야호열메변테레류료브록번목복읽령코현태렉타베포추임알커항퍼줄절래른본최속았능랜십페럼색확
재단분결당운필품작반표출점예식마바저너네요까불달터입격환증문의매상담직배송금액
"""
# In the order of their frequency, as in `_FREQUENT`.
_CYRILLIC = "оеаинтсрвлікмдпуяыьгзбчйхжшюцщєї"
_BOTH_CASES = _CYRILLIC + _CYRILLIC.upper()
_WESTERN = "éèàçêîôûëïüùäöüßñáíóúãõåæøœìòÄÖÜÉÀÁÂÅÆÇÈÊËÍÎÑÓÔÕÚÛØÃÌÒÙÏ“”‘’–—…«»€°§·¡¿®©™"
# Central European letters have the same bytes.
_SIGNS = "£¥¢¹²³½¼¾±×÷µ¬"
_TURKISH = "çğıöşüâîûÇĞİÖŞÜ“”‘’–—…"
_GREEK = "".join(map(chr, range(0x386, 0x3CF)))
_HEBREW = "".join(map(chr, range(0x5D0, 0x5EB)))
_ARABIC = "".join(map(chr, range(0x621, 0x653))) + "،؛؟"
_THAI = "".join(map(chr, range(0xE01, 0xE5C)))
_CENTRAL_LETTERS = "ąćęłńóśźżáäčďéěíňôřšťúůýžőűöüăâîşţđľĺ"
_CENTRAL = _CENTRAL_LETTERS + _CENTRAL_LETTERS.upper() + "“”„’–—…"
_CENTRAL_ENCODINGS = ("cp1250", "iso8859_2")
# Encoding → the letters beyond ASCII of languages whose texts have the same bytes in the other ones.
_ALPHABETS = {
    "cp1250": ("áčďéěíňóřšťúůýž", "áäčďéíľňóôšťúýž", "ąćęłńóśźż", "áéíóöőúüű", "ăâîşţ", "čćđšž"),
    "cp1254": ("çğıöşüâîû",),
    "cp1252": (
        *("äöüß", "àâæçèéêëîïôœùûü", "áéíñóúü", "àáâãçéêíóôõú", "åäöé", "æøåé", "õäöüšž", "àèéìòù", "áðéíóúýþæö"),
        *("àçèéíïòóúü·", "áéíóúâêîôû", "ëïéèöü"),
    ),
}
_ALPHABETS["iso8859_2"] = _ALPHABETS["cp1250"]
# Parts of words that are Icelandic, and not Turkish, Croatian or Polish with other letters for the same bytes.
_ICELANDIC = {
    "cp1254": re.compile(
        r"[rfg]ð|ðv|\bh[vlr]\w*[ðýæáéíóú]|þj|\bþýð|\b(?:vi|þa|me)ð\b|\b(?:hlý|lý)ð|\bþ[eúó]|"
        r"[áéíóú]\w{0,20}[ðþ]|[ðþ]\w{0,20}[áéíóú]"
    ),
    "cp1250": re.compile(
        r"ð(?:u[rmn]|i[rnl]?|ar?|v[ei]\w*|h\w*)?\b(?<!\bð)|[aeiouy]ð[rsvhlm]|\w[rfg]ð|þ[ýjóúæ]|æð|ðæ|æm\b|\b[hm]æ"
    ),
}
# A letter in a place that Western languages do not have: it is č, ć, ě, ň, ř, ś, ů, ű or ă.
_NOT_WESTERN = re.compile(
    r"\bè\w|è(?=[aeiouyáíéó])|[aeouyáéíý]è|ì(?=[a-z])|ò(?=[aeiouyáíé])|[aeoyáéíý][ìòù]|ù\w|[aeiouyáéíý]ø|ø[aiouyáíý]|ï\b|"
    r"(?<![aeou])ï(?=[a-z]\b)|\wœ(?![ui])|\bï|\bò|ã(?=[bcdfghjklmpqrtuvxyz])|(?<![hmçlfs])ã\b|\w{4}[mls]ã\b|rsã\b|"
    r"[aeiou]æ(?:[aeiou]|\b)|\bæ[eu]|èk|[yz]û|mû(?!r)|û[kvz]"
)

# In Windows-1250: a letter that is ı in Turkish after a vowel with which it does not go, and others that Turkish lacks.
_NOT_TURKISH = re.compile(r"[eiöü][b-df-hj-np-tv-z]{1,3}ý|[áéíóúčďěňřšťůž]")
# In Windows-1250, letters of ISO-8859-2.
_NOT_POLISH = re.compile(r"\bą|[aeouy]ą|ą[aeiouyąęčž]|^[^«]*\w»")
# Encoding → its common letters. The order decides between equals.
_COMMON: dict[str, frozenset[str]] = {
    "gb18030": frozenset(_SIMPLIFIED + _PUNCTUATION + _WESTERN),
    "big5hkscs": frozenset(_TRADITIONAL + _PUNCTUATION),
    "cp932": frozenset(_KANA + _KANJI + _PUNCTUATION),
    "euc_jp": frozenset(_KANA + _KANJI + _PUNCTUATION),
    "cp949": frozenset(_HANGUL + _PUNCTUATION),
    "cp1252": frozenset(_WESTERN + _SIGNS),
    "cp1254": frozenset(_TURKISH),
    "cp1250": frozenset(_CENTRAL),
    "iso8859_2": frozenset(_CENTRAL),
    "cp1251": frozenset(_BOTH_CASES),
    "koi8_r": frozenset(_BOTH_CASES),
    "koi8_u": frozenset(_BOTH_CASES + "ґҐ"),
    "cp866": frozenset(_BOTH_CASES),
    "iso8859_5": frozenset(_BOTH_CASES),
    "cp1253": frozenset(_GREEK),
    "cp1255": frozenset(_HEBREW),
    "cp1256": frozenset(_ARABIC),
    "iso8859_6": frozenset(_ARABIC),
    "cp874": frozenset(_THAI),
    "mac_roman": frozenset(_WESTERN),
}
_LATIN = ("cp1252", "cp1254", "cp1250", "iso8859_2", "mac_roman")
# Of the words of a text in Latin letters, few have three letters with accents and no other.
_WITHOUT_ASCII, _BESIDE_ASCII = re.compile(rb"[\xc0-\xff]{3}"), re.compile(rb"[a-zA-Z][\x80-\xff]|[\x80-\xff][a-zA-Z]")
# The letters of the alphabets that use the same bytes, the most frequent ones first.
_FREQUENT: dict[str, str] = {
    "cp1251": _CYRILLIC,
    "koi8_r": _CYRILLIC,
    "koi8_u": _CYRILLIC,
    "cp866": _CYRILLIC,
    "iso8859_5": _CYRILLIC,
    "cp1253": "αοιετσνηυρπκμςλωόίέάήθδγύώφχβξζψ",
    "cp1255": "יוהלתרמאבשנדקפחםעסגכטןצזךץף",
    "cp1256": "اليمنوتربعدةفقسحكجشصخطضغىذءثزظأإآئؤ",
    "iso8859_6": "اليمنوتربعدةفقسحكجشصخطضغىذءثزظأإآئؤ",
    "cp874": "านรกเงอมยลวดทสตคปบ่้ัีไแหิุจพข์ูำะืถใชธณศผซฟภ็ึโษฐฝญฉ",
}
# Almost all bytes are letters of some of them, so that Chinese and Japanese texts would be taken for them.
_MIN_FREQUENCY = 0.15
# Of two capital letters side by side: few texts have only capital letters.
_CAPITAL_SHARE = 0.8
_FINAL_LETTERS = "ךםןףץ"
# The second byte of their characters may be that of an ASCII letter.
_WITH_ASCII_BYTES = ("gb18030", "big5hkscs", "cp932", "cp949")
# The last lead byte of the more common half of the characters.
_LESS_COMMON = {"gb18030": b"\xd7", "big5hkscs": b"\xc6"}
_LESS_COMMON_SHARE = 0.3

# Browsers read these names as the larger encoding (https://encoding.spec.whatwg.org/).
_LARGER = {
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "big5": "big5hkscs",
    "shift_jis": "cp932",
    "euc_kr": "cp949",
    "iso8859-1": "cp1252",
}

# Encodings of e-mails whose bytes are all ASCII, so that they are also valid UTF-8.
_SEVEN_BITS = ("iso2022_jp", "iso2022_kr", "hz")
# Begins Japanese characters in ISO-2022-JP.
_JAPANESE = b"\x1b$B"
_BEYOND_ASCII = re.compile(r"[^\x00-\x7f]")
_WIDE = ("utf-32-le", "utf-32-be", "utf-16-le", "utf-16-be")
# Declared in e-mails and pages, and not told apart by their letters.
_DECLARED = ("iso8859_1", "iso8859_7", "iso8859_8", "iso8859_9", "iso8859_15")


class UnknownEncoding(Exception):
    """The bytes are not text in an encoding that is recognised."""


def decode(content: bytes, declared: str | None = None, *, characters: int | None = None) -> tuple[str, str]:
    """The text and its encoding. Raises UnknownEncoding.

    declared: the name that the file states. characters: the most of a text; the rest is neither read nor judged.
    """
    if characters is None:
        return _decode(content, declared, is_cut=False)
    # A letter has at most 4 bytes.
    text, encoding = _decode(content[: 4 * characters], declared, is_cut=len(content) > 4 * characters)
    return text[:characters], encoding


def _decode(content: bytes, declared: str | None, *, is_cut: bool) -> tuple[str, str]:
    if content[:4] in (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE):
        return content.decode("utf-32", errors="replace"), "utf-32"
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return content.decode("utf-16", errors="replace"), "utf-16"
    if wide := wide_encoding(content):
        return content.decode(wide, errors="replace"), wide
    name = _known(declared) or ("iso2022_jp" if _JAPANESE in content else None)
    for encoding in (name, "utf-8") if name in _SEVEN_BITS else ("utf-8", name):
        if encoding:
            codec = "utf-8-sig" if encoding == "utf-8" else encoding
            try:
                return _without_part(content, codec) if is_cut else content.decode(codec), encoding
            except (UnicodeError, LookupError):
                # The statement is wrong, as it is in many files, or names a codec that is none of texts.
                if encoding == "utf-8" and (text := _damaged(content, codec, MIN_VALID_BYTES)):
                    return text, encoding
    best = _judge(content, _whole) or _judge(content, _with_damage)
    return (content.decode(best, errors="replace"), best) if best else _guess(content)


def _judge(content: bytes, read: Callable[[bytes, str], str | None]) -> str | None:
    """The encoding whose common letters the text has; None if there is none."""
    shares = {encoding: _share(read(content, encoding), encoding, common) for encoding, common in _COMMON.items()}
    frequencies = {encoding: _frequency(content, encoding) for encoding in _FREQUENT}
    shares |= {other: 0.0 for other, found in frequencies.items() if found < _MIN_FREQUENCY}
    if _WITHOUT_ASCII.search(sample := content[: 4 * _SAMPLE_LETTERS]) and not _BESIDE_ASCII.search(sample):
        shares |= dict.fromkeys(_LATIN, 0.0)
    best, second = sorted(shares, key=lambda encoding: -shares[encoding])[:2]
    if shares[best] >= MIN_SHARE and best in _FREQUENT:
        best = max(_FREQUENT, key=lambda encoding: shares[encoding] * frequencies[encoding])
    # Of the Latin encodings, which share most of their bytes, the letters' neighbours decide.
    share, central = shares[best], max(shares[encoding] for encoding in _CENTRAL_ENCODINGS)
    if best == "cp1250" and not _fits(sample, best):
        # The letters š and ž of ISO-8859-2, Icelandic, or Turkish in capital letters.
        best = next((other for other in ("iso8859_2", "cp1254", "cp1252") if _fits(sample, other)), best)
    if best in _ICELANDIC and _ICELANDIC[best].search(sample.decode("cp1252", "replace").lower()):
        best = "cp1252"
    elif best in ("cp1252", "cp1254", "mac_roman") and central > MIN_SHARE and _is_central(sample, best):
        best = "cp1250"
    if best == "cp1250" and _NOT_POLISH.search(sample.decode(best, "replace").lower()):
        # The letters š and ť of ISO-8859-2 are ą and a sign in Windows-1250.
        best = "iso8859_2"
    if share >= MIN_SHARE or share >= MIN_SHARE / 2 > 2 * shares[second]:
        return best
    return None


def _damaged(content: bytes, encoding: str, min_valid_bytes: int) -> str | None:
    """The text with U+FFFD for each part that is not valid, if there are few of them; otherwise None."""
    text = content.decode(encoding, errors="replace")
    beyond_ascii = len(content.translate(None, delete=bytes(range(128))))
    return text if beyond_ascii >= min_valid_bytes * text.count("\ufffd") else None


def _with_damage(content: bytes, encoding: str) -> str | None:
    return _damaged(content, encoding, MIN_OTHER_VALID_BYTES)


def _whole(content: bytes, encoding: str) -> str | None:
    try:
        return _without_part(content, encoding)
    except UnicodeDecodeError:
        return None


def wide_encoding(content: bytes) -> str | None:
    """The encoding of a text in UTF-16 or UTF-32 without a mark at its beginning; None if it is none."""
    sample = content[: 4 * _SAMPLE_LETTERS]
    if b"\0" not in sample:
        return None
    found = {}
    for encoding in _WIDE:
        try:
            # The sample may end in the middle of a letter.
            text = codecs.getincrementaldecoder(encoding)().decode(sample)
        except UnicodeDecodeError:
            continue
        if text and all(letter in "\t\n\f\r" or unicodedata.category(letter)[0] != "C" for letter in text):
            # In UTF-16, bytes in the wrong order are valid, too: of h\0 the letter U+6800.
            found[encoding] = encoding.startswith("utf-32") + sum(map(str.isascii, text)) / len(text)
    best = max(found, key=lambda each: found[each], default=None)
    return best if best and found[best] else None


def preload() -> None:
    """Loads all codecs now. Later the process may not read their files any more."""
    from charset_normalizer import from_bytes

    for encoding in (*_COMMON, *_LARGER, *_SEVEN_BITS, *_DECLARED, *_WIDE):
        codecs.lookup(encoding)
    from_bytes("Grüße und Küsse aus Zürich".encode("cp1250")).best()


def _known(declared: str | None) -> str | None:
    try:
        name = codecs.lookup(declared or "").name
    except (LookupError, ValueError):
        return None
    return _LARGER.get(name, name)


def _share(text: str | None, encoding: str, common: frozenset[str]) -> float:
    """The share of common letters among the letters beyond ASCII; 0 if the bytes are not valid in this encoding."""
    if text is None:
        return 0.0
    score = 0.0
    # A file may be large and have few of these letters.
    letters = list(islice(_BEYOND_ASCII.finditer(text), _SAMPLE_LETTERS))
    for found in letters:
        n, letter = found.start(), found[0]
        if _is_odd(encoding, letter, text[max(0, n - 4) : n], text[n + 1 : n + 2]):
            score -= 1
        elif letter in common:
            is_capital = encoding in _FREQUENT and letter.isupper() and text[n - 1 : n].isupper()
            score += _CAPITAL_SHARE if is_capital else 1
        elif b"\xb0" <= letter.encode(encoding, "ignore")[:1] <= _LESS_COMMON.get(encoding, b""):
            score += _LESS_COMMON_SHARE
    return score / len(letters) if letters else 0.0


def _without_part(content: bytes, encoding: str) -> str:
    """The text, without the part of a letter in whose middle it may end. Raises UnicodeDecodeError."""
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        if error.start < len(content) - 3:
            raise
        return content[: error.start].decode(encoding)


def _is_odd(encoding: str, letter: str, before: str, after: str) -> bool:
    """True for a letter in a place that real texts do not have."""
    last = before[-1:]
    if encoding in _WITH_ASCII_BYTES and "a" <= last <= "z" and "a" <= after <= "z":
        # The letter ł in nieprawidłowy and the next one make one character, as do šč of Slovenian. In Chinese a word
        # may stand between two of another alphabet.
        return encoding == "cp949" or letter.encode(encoding)[-1:].isalpha()
    if encoding == "big5hkscs":
        # Texts of Hong Kong have few of the characters that are only there, except for the common ones.
        return letter not in _TRADITIONAL and not letter.encode("big5", "ignore")
    if encoding in _LATIN:
        # More than two letters with accents are seldom neighbours, and no word begins in the middle of another.
        neighbours = 4 if encoding == "cp1250" else 2
        is_run = len(before) >= neighbours and not any(each.isascii() for each in before[-neighbours:])
        return is_run or (letter in "¡¿" and last.isalpha()) or _is_odd_sign(encoding, letter, before, after)
    if encoding == "cp874":
        return last.isascii() and (last.isalpha() or not letter.isalpha())
    if encoding in _FREQUENT:
        # No word has a capital letter behind a small one, or a small one behind two capital ones.
        is_mixed = (
            last.islower() if letter.isupper() else letter.islower() and before[-2:-1].isupper() and last.isupper()
        )
        is_inside = is_mixed or last in tuple(_FINAL_LETTERS)
        return not letter.isalpha() or is_inside or any(each.isascii() and each.isalpha() for each in (last, after))
    return False


def _is_odd_sign(encoding: str, letter: str, before: str, after: str) -> bool:
    """True for a sign within a word, and for a letter beside a digit that is a sign in Western texts."""
    if encoding in ("cp1250", "iso8859_2"):
        return letter.isalpha() and (before[-1:].isdigit() or after.isdigit())
    if encoding != "cp1252" or letter not in _SIGNS:
        return False
    # As in µm and m³.
    is_unit = after in tuple("mgslFA") if letter == "µ" else bool(re.search(r"(?<!\w)[cdkm]?m$", before))
    return (before[-1:].isalpha() or after.isalpha()) and not is_unit


def _is_central(sample: bytes, western: str) -> bool:
    """True if the text, whose letters fit Western or Turkish, is Polish, Hungarian, Romanian or a neighbour of them."""
    text = sample.decode("cp1250", "replace")
    if western == "cp1254":
        # Turkish and Romanian have ş and ţ at the same place.
        return bool(_NOT_TURKISH.search(text)) or not re.search("[ğýöüç]", text.lower())
    text = text.lower()
    is_central, is_western = _fits(sample, "cp1250"), _fits(sample, "cp1252")
    if is_central != (is_western and not _NOT_WESTERN.search(sample.decode("cp1252", "replace").lower())):
        return is_central
    if any(letter not in _CENTRAL for letter in text if not letter.isascii()):
        return False
    # Portuguese has õ before e only, and Estonian, which has it everywhere, no acute accents.
    return bool(re.search("[scd]z|zs", text) or (re.search("ő(?!e)", text) and re.search("[áéíóú]", text)))


def _fits(sample: bytes, encoding: str) -> bool:
    """True if one of the languages of the encoding has all letters of the text beyond ASCII."""
    letters = _letters(sample.decode(encoding, "replace").lower())
    return any(letters.issubset(alphabet) for alphabet in _ALPHABETS[encoding])


def _letters(text: str) -> set[str]:
    return {letter for letter in text if not letter.isascii() and letter.isalpha()}


def _frequency(content: bytes, encoding: str) -> float:
    """How frequent the letters of the text are in the languages of an encoding: 1 if all are the most frequent one. A
    real text has 0.3, and random letters have 0.1."""
    text = content[: 4 * _SAMPLE_LETTERS].decode(encoding, "ignore").lower()
    if encoding == "cp1253" and re.search(r"ς\w", text):
        # This form of the letter ends a word.
        return 0.0
    letters = [letter for letter in text if not letter.isascii()]
    alphabet = _FREQUENT[encoding]
    ranks = {letter: 4 * n / len(alphabet) for n, letter in enumerate(alphabet)}
    return math.exp(-sum(ranks.get(letter, 5.0) for letter in letters) / max(1, len(letters)))


def _guess(content: bytes) -> tuple[str, str]:
    """For other languages, with a library that needs more text."""
    from charset_normalizer import from_bytes

    sample = content[:262_144]
    guess = from_bytes(sample).best() if sum(byte > 127 for byte in sample) >= MIN_GUESSED_LETTERS else None
    if guess is None:
        raise UnknownEncoding
    return content.decode(guess.encoding, errors="replace"), guess.encoding
