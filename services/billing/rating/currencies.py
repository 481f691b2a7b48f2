"""Minor units of currencies (ISO 4217:2015, list one). Pure."""

from __future__ import annotations

from services.billing.rating.schemes import half_even

_NONE = "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX UYI VND VUV XAF XOF XPF"
_THREE = "BHD IQD JOD KWD LYD OMR TND"
_FOUR = "CLF UYW"
_TWO = (
    "AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY COP "
    "CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR IRR "
    "JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD NGN "
    "NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC SYP "
    "SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XAD XCD XCG YER ZAR ZMW ZWG"
)
DIGITS = {code: digits for digits, codes in ((0, _NONE), (2, _TWO), (3, _THREE), (4, _FOUR)) for code in codes.split()}
"""Currency → digits of its minor unit."""


def nanos_per_minor(currency: str) -> int:
    """Returns the nano-units of one minor unit: 10,000,000 for a cent. Raises KeyError for an unknown currency."""
    return int(10 ** (9 - DIGITS[currency]))


def format_minor(minor: int, currency: str) -> str:
    """Formats minor units as units of the currency: ``12.50``, ``1200`` for JPY."""
    digits = DIGITS[currency]
    whole, rest = divmod(abs(minor), 10**digits)
    return f"{'-' if minor < 0 else ''}{whole}" + (f".{rest:0{digits}}" if digits else "")


def to_minor(nanos: int, currency: str) -> int:
    """Rounds to minor units, half to even."""
    return half_even(nanos, nanos_per_minor(currency))
