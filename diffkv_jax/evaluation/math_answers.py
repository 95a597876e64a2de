"""Final answers of mathematical problems: what a text says, and whether two are the same."""

import re
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?|-?\$?\.\d+")
_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")


def boxed(text: str) -> str | None:
    r"""What stands in the last closed `\boxed{...}` of `text`, or behind a `\boxed` without braces;
    None: there is none.
    """
    for match in reversed(list(_BOXED.finditer(text))):
        rest = text[match.end() :]
        if not rest.startswith("{"):
            if word := re.match(r"[^\s$.,;]+", rest):
                return word[0]
            continue
        depth = 0
        for i, letter in enumerate(rest):
            depth += (letter == "{") - (letter == "}")
            if not depth:
                return rest[1:i].strip()
    return None


def final_number(text: str) -> str | None:
    r"""The number behind the last "####", else in the last `\boxed`, else the last one at all."""
    places = [text.rsplit("####", 1)[1]] if "####" in text else []
    places += [inside] if (inside := boxed(text)) else []
    for place in places:
        if found := _NUMBER.search(place):
            return found[0]
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def same_number(found: str | None, expected: str) -> bool:
    """Whether both are the same number; commas and dollars do not count."""
    values = [_decimal(text) for text in (found or "", expected)]
    return values[0] is not None and values[0] == values[1]


def same_expression(found: str | None, expected: str) -> bool:
    """Whether both are the same but for LaTeX's ways to write it, or the same number."""
    if found is None:
        return False
    left, right = plain(found), plain(expected)
    return left == right or same_number(left, right)


_DROPPED = re.compile(
    r"\\(?:left|right|displaystyle|!|,|;|:| )|\^\{?\\circ\}?|\\(?:%|\$)|[%$~]"
    r"|\\(?:text|mbox)\s*\{\s*(?:and|or|degrees?|units?|square units|cents?|dollars?"
    r"|inches|feet|cm|meters?|hours?|minutes?)\s*\}(?:\^\{?\d\}?)?"
)
_SPELLED = (
    (re.compile(r"\\(?:dfrac|tfrac|cfrac)"), r"\\frac"),
    (re.compile(r"\\(?:text|mathrm|textbf|mathbf|mbox)\s*\{([^{}]*)\}"), r"\1"),
    (re.compile(r"\\frac\s*([^\s{\\])\s*([^\s{\\])"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\frac\s*([^\s{\\])\s*\{"), r"\\frac{\1}{"),
    (re.compile(r"\\frac\s*(\{[^{}]*\})\s*([^\s{\\])"), r"\\frac\1{\2}"),
    (re.compile(r"\\sqrt\s*([^\s{\\\[])"), r"\\sqrt{\1}"),
    (re.compile(r"\\(?:le|leq)(?![a-zA-Z])"), "<="),
    (re.compile(r"\\(?:ge|geq)(?![a-zA-Z])"), ">="),
    (re.compile(r"^(-?\d+)/(-?\d+)$"), r"\\frac{\1}{\2}"),
    (_THOUSANDS, ""),
    (re.compile(r"(?<![\d])\.(?=\d)"), "0."),
)


def plain(text: str) -> str:
    """A LaTeX expression in one spelling: no spaces, units, sizes of brackets or `x =` in front."""
    found = _DROPPED.sub("", text.strip().rstrip("."))
    if re.match(r"^[a-zA-Z](?:\s*\([a-z]\))?\s*=[^=]+$", found):
        found = found.split("=", 1)[1]
    for pattern, spelled in _SPELLED:
        found = pattern.sub(spelled, found.strip())
    return re.sub(r"\s+", "", found)


def _decimal(text: str) -> Decimal | None:
    try:
        found = Decimal(_THOUSANDS.sub("", text).replace("$", "").strip())
    except InvalidOperation:
        return None
    return found if found.is_finite() else None
