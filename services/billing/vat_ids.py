"""VAT ids: the form, and the check digits of the countries of the EU whose rule for all payers is one line. Pure.

The source is "VIES: VAT number construction rules", functional description 15.0, of the European Commission. Other
countries, and Bulgaria, Cyprus, Czechia, Ireland, Latvia, Slovakia and Spain, whose numbers of persons have rules of
their own, have their form only. Only VIES knows whether an id is in use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple


class _Rule(NamedTuple):
    form: str
    """Regular expression of the id without the country."""
    holds: Callable[[str], bool] = lambda _: True
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
    # A key of letters has a rule that is not public.
    return not text[:2].isdigit() or (_luhn(text[2:]) and int(text[:2]) == (12 + 3 * int(text[2:])) % 97)


def _lithuanian(text: str) -> bool:
    numbers = _digits(text)
    for first in (1, 3):
        check = sum(n * ((place + first - 1) % 9 + 1) for place, n in enumerate(numbers[:-1])) % 11
        if check != 10:
            return check == numbers[-1]
    return numbers[-1] == 0


_slovene = _weighed(8, 7, 6, 5, 4, 3, 2)
_greek = _weighed(256, 128, 64, 32, 16, 8, 4, 2)
_dutch = _weighed(9, 8, 7, 6, 5, 4, 3, 2)
_polish = _weighed(6, 5, 7, 2, 3, 4, 5, 6, 7)
_portuguese = _weighed(9, 8, 7, 6, 5, 4, 3, 2)
_romanian = _weighed(7, 5, 3, 2, 1, 7, 5, 3, 2)

_RULES = {
    "AT": _Rule(r"U\d{8}", _austrian),
    "BE": _Rule(r"[01]\d{9}", lambda text: 97 - int(text[:8]) % 97 == int(text[8:])),
    "BG": _Rule(r"\d{9,10}"),
    "CY": _Rule(r"\d{8}[A-Z]"),
    "CZ": _Rule(r"\d{8,10}"),
    "DE": _Rule(r"[1-9]\d{8}", _mod_11_10),
    "DK": _Rule(r"[1-9]\d{7}", lambda text: _weighed(2, 7, 6, 5, 4, 3, 2, 1)(text) % 11 == 0),
    "EE": _Rule(r"\d{9}", lambda text: _weighed(3, 7, 1, 3, 7, 1, 3, 7, 1)(text) % 10 == 0),
    "EL": _Rule(r"\d{9}", lambda text: _greek(text) % 11 % 10 == int(text[8])),
    "ES": _Rule(r"[A-Z0-9]\d{7}[A-Z0-9]"),
    "FI": _Rule(r"\d{8}", lambda text: _weighed(7, 9, 10, 5, 8, 4, 2, 1)(text) % 11 == 0),
    "FR": _Rule(r"[A-HJ-NP-Z0-9]{2}\d{9}", _french),
    "HR": _Rule(r"\d{11}", _mod_11_10),
    "HU": _Rule(r"\d{8}", lambda text: _weighed(9, 7, 3, 1, 9, 7, 3, 1)(text) % 10 == 0),
    "IE": _Rule(r"\d[A-Z0-9+*]\d{5}[A-Z]{1,2}"),
    "IT": _Rule(r"\d{11}", _luhn),
    "LT": _Rule(r"(\d{7}|\d{10})1\d", _lithuanian),
    "LU": _Rule(r"\d{8}", lambda text: int(text[:6]) % 89 == int(text[6:])),
    "LV": _Rule(r"\d{11}"),
    "MT": _Rule(r"[1-9]\d{7}", lambda text: _weighed(3, 4, 6, 7, 8, 9, 10, 1)(text) % 37 == 0),
    "NL": _Rule(r"\d{9}B(?!00)\d{2}", lambda text: _dutch(text[:8]) % 11 == int(text[8]) or _mod_97("NL" + text)),
    "PL": _Rule(r"\d{10}", lambda text: _polish(text) % 11 == int(text[9])),
    "PT": _Rule(r"[1-9]\d{8}", lambda text: (11 - _portuguese(text) % 11) % 11 % 10 == int(text[8])),
    "RO": _Rule(r"[1-9]\d{1,9}", lambda text: _romanian(text[:-1].zfill(9)) * 10 % 11 % 10 == int(text[-1])),
    "SE": _Rule(r"\d{10}01", lambda text: _luhn(text[:10])),
    "SI": _Rule(r"[1-9]\d{7}", lambda text: 11 - _slovene(text) % 11 in (int(text[7]), int(text[7]) or 10)),
    "SK": _Rule(r"[1-9]\d{9}"),
}
_OTHER = _Rule(r"[A-Z0-9+*]{2,12}")


def fault(vat_id: str, country: str) -> str:
    """Returns the fault of a VAT id of a country, or an empty text."""
    prefix = "EL" if country == "GR" else country
    rule = _RULES.get(prefix, _OTHER)
    if not vat_id.startswith(prefix):
        return f"must begin with {prefix}"
    if not re.fullmatch(rule.form, vat_id.removeprefix(prefix), re.ASCII):
        return f"does not have the form of a VAT id of {country}"
    if not rule.holds(vat_id.removeprefix(prefix)):
        return "has a wrong check digit"
    return ""
