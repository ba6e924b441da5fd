"""What people and models write for a number → a float, or nothing.

What comes in: `1,299.50`, `1.234,50`, `$1 299`, `١٢٣`, `12 USD`. What goes out: the number, None where the text is no
single number. Surprise: one separator before three digits (`1,234`, `1.234`) means one thing here and another there, so
`decimal` decides. Nothing else is guessed: digits that are grouped wrongly are no number.
"""

import math
import re
import unicodedata
from typing import Literal

Decimal = Literal[".", ","]

SPACES = "\u00a0\u202f\u2009'\u2019"  # that stand between groups of three digits and mean nothing else
PLAIN = str.maketrans({"\u2212": "-", "\u2013": "-", "\u066b": ".", "\u066c": ",", **dict.fromkeys(SPACES, " ")})
CODE = r"[A-Z]{3}"  # USD, EUR, as ISO 4217 has them
SCIENTIFIC = re.compile(r"(\d+\.?\d*|\.\d+)[eE][+-]?\d+")
GROUPED = re.compile(r"\d{1,3}(,\d{3})+|\d{1,2}(,\d{2})+,\d{3}")  # in threes; in India in twos before the last three


def read_number(text: str, decimal: Decimal = ".") -> float | None:
    """The number that a text is, with its sign, currency or percent sign.

    Args:
        decimal: what one separator before exactly three digits means: the decimal sign, or else the other one is it.
    """
    digits = "".join(str(unicodedata.decimal(sign)) if sign.isdecimal() else sign for sign in text)
    body = _without_currency(digits.translate(PLAIN).strip().rstrip(".,;:!?").strip())
    sign = -1.0 if body.startswith("-") else 1.0
    body = _without_currency(body[body.startswith(("+", "-")) :].strip())  # -$5
    written = body if SCIENTIFIC.fullmatch(body) else _plain(body, decimal)
    if written is None:
        return None
    number = sign * float(written)
    return number if math.isfinite(number) else None


def _without_currency(text: str) -> str:
    """Without one unit before or after: a currency sign, its code, a percent sign."""
    text = re.sub(rf"^{CODE}\s*(?=[-+\d.])|(?<=[\d.])\s*{CODE}$", "", text)
    if text and unicodedata.category(text[0]) == "Sc":
        text = text[1:]
    if text and (text[-1] == "%" or unicodedata.category(text[-1]) == "Sc"):
        text = text[:-1]
    return text.strip()


def _plain(body: str, decimal: Decimal) -> str | None:
    """Digits with at most one decimal point; None where separators make no sense."""
    if not re.fullmatch(r"[\d.,][\d., ]*", body) or not re.search(r"\d", body):
        return None
    point = _decimal_sign(body, decimal)
    whole, _, fraction = body.rpartition(point) if point else (body, "", "")
    separators = set(re.findall(r"[., ]", whole))
    if not re.fullmatch(r"\d*", fraction) or len(separators) > 1 or (point and point in separators):
        return None
    if separators:
        if not GROUPED.fullmatch(whole.replace(separators.pop(), ",")):
            return None
        whole = re.sub(r"\D", "", whole)
    return f"{whole or '0'}.{fraction or '0'}" if whole or fraction else None


def _decimal_sign(body: str, decimal: Decimal) -> str:
    """Which separator is the decimal one; empty: none is."""
    kinds = [sign for sign in ".," if sign in body]
    if len(kinds) == 2:
        return max(kinds, key=body.rfind)
    if not kinds or body.count(kinds[0]) > 1:
        return ""
    before, _, after = body.partition(kinds[0])
    is_ambiguous = len(after) == 3 and 1 <= len(before) <= 3 and before != "0"
    return "" if is_ambiguous and kinds[0] != decimal else kinds[0]
