"""VAT ids of the EU, the United Kingdom, Switzerland and Norway: the form and the check digits. Pure.

The source for the EU is "VIES: VAT number construction rules", functional description 15.0, of the European Commission.
Some ids of persons are national numbers with a date of birth; the date must exist. An id of any other country is
refused, because nothing is known about it. Only VIES knows whether an id is in use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date
from typing import NamedTuple


class _Rule(NamedTuple):
    form: str
    """Regular expression of the id without the country."""
    holds: Callable[[str], bool]
    """Whether the check digits are right."""


def _digits(text: str) -> list[int]:
    return [int(sign) for sign in text if sign.isdigit()]


def _weighed(*weights: int) -> Callable[[str], int]:
    """The sum of the digits times their weights."""
    return lambda text: sum(n * weight for n, weight in zip(_digits(text), weights, strict=False))


def _luhn(text: str) -> bool:
    """ISO 7812."""
    return sum(n if place % 2 == 0 else sum(divmod(2 * n, 10)) for place, n in enumerate(_digits(text)[::-1])) % 10 == 0


def _mod_11_10(text: str) -> bool:
    """ISO 7064."""
    check = 5
    for n in _digits(text):
        check = ((check or 10) * 2 % 11 + n) % 10
    return check == 1


def _mod_97(text: str) -> bool:
    """ISO 7064, letters as numbers from 10."""
    return int("".join(str(int(sign, 36)) for sign in text)) % 97 == 1


def _austrian(text: str) -> bool:
    *body, last = _digits(text)
    return (96 - sum(sum(divmod(n * (1 + place % 2), 10)) for place, n in enumerate(body))) % 10 == last


def _french(text: str) -> bool:
    number = int(text[2:])
    # Monaco has French ids, with numbers of its own that begin with 000.
    if not (text[2:5] == "000" or _luhn(text[2:])):
        return False
    if text[:2].isdigit():
        return int(text[:2]) == (12 + 3 * number) % 97
    first, second = ("0123456789ABCDEFGHJKLMNPQRSTUVWXYZ".index(sign) for sign in text[:2])
    key = first * 24 + second - 10 if text[0].isdigit() else first * 34 + second - 100
    return (number + 1 + key // 11) % 11 == key % 11


def _date(year: int, month: int, day: int) -> bool:
    try:
        return bool(date(year, month, day))
    except ValueError:
        return False


def _bulgarian(text: str) -> bool:
    last = int(text[-1])
    if len(text) == 9:
        check = _weighed(1, 2, 3, 4, 5, 6, 7, 8)(text) % 11
        return (check if check < 10 else _weighed(3, 4, 5, 6, 7, 8, 9, 10)(text) % 11 % 10) == last
    # A person, a foreigner, or another payer.
    year, month, day = int(text[:2]), int(text[2:4]), int(text[4:6])
    century, month = {0: (1900, month), 1: (1800, month - 20), 2: (2000, month - 40)}.get((month - 1) // 20, (0, 0))
    return (
        (_date(century + year, month, day) and _weighed(2, 4, 8, 5, 10, 9, 7, 3, 6)(text) % 11 % 10 == last)
        or _weighed(21, 19, 17, 13, 11, 9, 7, 3, 1)(text) % 10 == last
        or (11 - _weighed(4, 3, 2, 7, 6, 5, 4, 3, 2)(text) % 11) % 11 == last
    )


def _cypriot(text: str) -> bool:
    # The digits at the even places count as these.
    values = (1, 0, 5, 7, 9, 13, 15, 17, 19, 21)
    total = sum(n if place % 2 else values[n] for place, n in enumerate(_digits(text)))
    return not text.startswith("12") and total % 26 == ord(text[8]) - ord("A")


def _birth_number(text: str) -> bool:
    """The number of a person in Czechia and Slovakia. Women have 50 more months; 20 more are an overflow since 2004."""
    year = 1900 + int(text[:2])
    if len(text) == 9:
        # The numbers until 1953 have no check digit.
        year -= 100 if year >= 1980 else 0
        valid = year < 1954
    else:
        year += 100 if year < 1954 else 0
        valid = int(text[:9]) % 11 % 10 == int(text[9])
    return valid and _date(year, int(text[2:4]) % 50 % 20, int(text[4:6]))


def _czech(text: str) -> bool:
    if len(text) == 8:
        return text[0] != "9" and ((11 - _weighed(8, 7, 6, 5, 4, 3, 2)(text) % 11) % 11 or 1) % 10 == int(text[7])
    if len(text) == 9 and text[0] == "6":
        return (8 - (10 - _weighed(8, 7, 6, 5, 4, 3, 2)(text[1:8]) % 11) % 11) % 10 == int(text[8])
    return _birth_number(text)


def _slovak(text: str) -> bool:
    return (text[2] in "234789" and text[0] != "0" and int(text) % 11 == 0) or _birth_number(text)


def _spanish(text: str) -> bool:
    number, last = text[:-1], text[-1]
    if number[0] in "KLMXYZ" or number.isdigit():
        # A person, with the digit that X, Y and Z stand for.
        number = number.lstrip("KLM").replace("X", "0").replace("Y", "1").replace("Z", "2")
        return number.isdigit() and last == "TRWAGMYFPDXBNJZSQVHLCKE"[int(number) % 23]
    if number[0] not in "ABCDEFGHJNPQRSUVW":
        return False
    check = next(n for n in range(10) if _luhn(f"{number[1:]}{n}"))
    return last in (str(check), "JABCDEFGHI"[check])


def _irish(text: str) -> bool:
    if not text[:7].isdigit():
        # The form until 2013.
        text = f"0{text[2:7]}{text[0]}{text[7:]}"
    letters = "WABCDEFGHIJKLMNOPQRSTUV"
    group = letters.find(text[8:] or "W")
    return group >= 0 and letters[(_weighed(8, 7, 6, 5, 4, 3, 2)(text[:7]) + 9 * group) % 23] == text[7]


def _latvian(text: str) -> bool:
    if text[0] > "3":
        return _weighed(9, 1, 4, 8, 3, 10, 2, 5, 7, 6, 1)(text) % 11 == 3
    year = 1800 + 100 * int(text[6]) + int(text[4:6])
    # The numbers of persons since 2017 begin with 32 and tell no date.
    known = text.startswith("32") or _date(year, int(text[2:4]), int(text[:2]))
    return known and (1 + _weighed(10, 5, 8, 4, 2, 1, 6, 3, 7, 9)(text)) % 11 % 10 == int(text[10])


def _british(text: str) -> bool:
    if text[:2] in ("GD", "HA"):
        # A department of the government or an authority of health.
        return (int(text[2:]) < 500) == (text[:2] == "GD")
    rest = _weighed(8, 7, 6, 5, 4, 3, 2, 10, 1)(text[:9]) % 97
    return rest == 0 or (int(text[:3]) >= 100 and rest in (42, 55))


def _lithuanian(text: str) -> bool:
    numbers = _digits(text)
    for first in (1, 3):
        check = sum(n * ((place + first - 1) % 9 + 1) for place, n in enumerate(numbers[:-1])) % 11
        if check != 10:
            return check == numbers[-1]
    return numbers[-1] == 0


_swiss = _weighed(5, 4, 3, 2, 7, 6, 5, 4)
_norwegian = _weighed(3, 2, 7, 6, 5, 4, 3, 2)
_slovene = _weighed(8, 7, 6, 5, 4, 3, 2)
_greek = _weighed(256, 128, 64, 32, 16, 8, 4, 2)
_dutch = _weighed(9, 8, 7, 6, 5, 4, 3, 2)
_polish = _weighed(6, 5, 7, 2, 3, 4, 5, 6, 7)
_portuguese = _weighed(9, 8, 7, 6, 5, 4, 3, 2)
_romanian = _weighed(7, 5, 3, 2, 1, 7, 5, 3, 2)

_RULES = {
    "AT": _Rule(r"U\d{8}", _austrian),
    "BE": _Rule(r"[01]\d{9}", lambda text: 97 - int(text[:8]) % 97 == int(text[8:])),
    "BG": _Rule(r"\d{9,10}", _bulgarian),
    "CH": _Rule(r"E\d{9}(MWST|TVA|IVA|TPV)", lambda text: (11 - _swiss(text) % 11) % 11 == int(text[9])),
    "CY": _Rule(r"\d{8}[A-Z]", _cypriot),
    "CZ": _Rule(r"\d{8,10}", _czech),
    "DE": _Rule(r"[1-9]\d{8}", _mod_11_10),
    "DK": _Rule(r"[1-9]\d{7}", lambda text: _weighed(2, 7, 6, 5, 4, 3, 2, 1)(text) % 11 == 0),
    "EE": _Rule(r"\d{9}", lambda text: _weighed(3, 7, 1, 3, 7, 1, 3, 7, 1)(text) % 10 == 0),
    "EL": _Rule(r"\d{9}", lambda text: _greek(text) % 11 % 10 == int(text[8])),
    "ES": _Rule(r"[A-Z0-9]\d{7}[A-Z0-9]", _spanish),
    "FI": _Rule(r"\d{8}", lambda text: _weighed(7, 9, 10, 5, 8, 4, 2, 1)(text) % 11 == 0),
    "FR": _Rule(r"[A-HJ-NP-Z0-9]{2}\d{9}", _french),
    "GB": _Rule(r"\d{9}|\d{12}|(GD|HA)\d{3}", _british),
    "HR": _Rule(r"\d{11}", _mod_11_10),
    "HU": _Rule(r"\d{8}", lambda text: _weighed(9, 7, 3, 1, 9, 7, 3, 1)(text) % 10 == 0),
    "IE": _Rule(r"\d[A-Z0-9+*]\d{5}[A-Z]{1,2}", _irish),
    "IT": _Rule(r"\d{11}", _luhn),
    "LT": _Rule(r"(\d{7}|\d{10})1\d", _lithuanian),
    "LU": _Rule(r"\d{8}", lambda text: int(text[:6]) % 89 == int(text[6:])),
    "LV": _Rule(r"\d{11}", _latvian),
    "MT": _Rule(r"[1-9]\d{7}", lambda text: _weighed(3, 4, 6, 7, 8, 9, 10, 1)(text) % 37 == 0),
    "NL": _Rule(r"\d{9}B(?!00)\d{2}", lambda text: _dutch(text[:8]) % 11 == int(text[8]) or _mod_97("NL" + text)),
    "NO": _Rule(r"\d{9}MVA", lambda text: (11 - _norwegian(text) % 11) % 11 == int(text[8])),
    "PL": _Rule(r"\d{10}", lambda text: _polish(text) % 11 == int(text[9])),
    "PT": _Rule(r"[1-9]\d{8}", lambda text: (11 - _portuguese(text) % 11) % 11 % 10 == int(text[8])),
    "RO": _Rule(r"[1-9]\d{1,9}", lambda text: _romanian(text[:-1].zfill(9)) * 10 % 11 % 10 == int(text[-1])),
    "SE": _Rule(r"\d{10}01", lambda text: _luhn(text[:10])),
    "SI": _Rule(r"[1-9]\d{7}", lambda text: 11 - _slovene(text) % 11 in (int(text[7]), int(text[7]) or 10)),
    "SK": _Rule(r"\d{10}", _slovak),
    "XI": _Rule(r"\d{9}|\d{12}|(GD|HA)\d{3}", _british),
}


def fault(vat_id: str, country: str) -> str:
    """Returns the fault of a VAT id of a country, or an empty text."""
    prefix = {"GR": "EL", "IM": "GB", "MC": "FR"}.get(country, country)
    rule = _RULES.get(prefix)
    if rule is None:
        return f"must be empty: no rule for VAT ids of {country} is known"
    if not vat_id.startswith(prefix):
        return f"must begin with {prefix}"
    if not re.fullmatch(rule.form, vat_id.removeprefix(prefix), re.ASCII):
        return f"does not have the form of a VAT id of {country}"
    if not rule.holds(vat_id.removeprefix(prefix)):
        return "has a wrong check digit"
    return ""
