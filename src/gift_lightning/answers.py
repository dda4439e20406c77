r"""Answers in mathematical texts: found by their anchor, and read as numbers where they are some.

Text is only matched here, never evaluated, and in time linear in its length.
"""

import re
from fractions import Fraction
from typing import NamedTuple

# Finding


_ANCHOR = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_TOKEN = re.compile(r"\s*(\{|[0-9A-Za-z](?![0-9A-Za-z.,]))")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_CONNECTOR = re.compile(r"(?:[\s$,;.&|/{}()]|\\[()\[\]]|\\q?quad|\\text|\band\b|\bor\b)*")


def final_answer(text: str) -> str | None:
    r"""The content of the last ``\boxed{}``, or else what follows ``####`` in its last line.

    Boxes with nothing but a connector between them are one answer, a list: naming candidates does
    not help. None if there is no anchor, or if the last box is not closed or lies inside another.
    """
    boxes = list(_ANCHOR.finditer(text))
    if not boxes:
        line = next((x for x in reversed(text.splitlines()) if "####" in x), None)
        return None if line is None else line.partition("####")[2].strip(" *")
    found: list[str] = []
    start = len(text)
    for box in reversed(boxes):
        content, end = _argument(text, box.end())
        if content is None or end > start:
            return None
        if found and not _CONNECTOR.fullmatch(text, end, start):
            break
        if content not in found:
            found.insert(0, content)
        start = box.start()
    return ", ".join(found)


def _argument(text: str, at: int) -> tuple[str | None, int]:
    """A command's argument, in braces or one letter, and where it ends; None if it never does."""
    token = _TOKEN.match(text, at)
    if token is None or token[1] != "{":
        return (token[1], token.end()) if token else ("", at)
    depth = 1
    for brace in _BRACE.finditer(text, token.end()):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return text[token.end() : brace.start()].strip(), brace.end()
    return None, len(text)


# Reading


class Number(NamedTuple):
    value: Fraction
    decimal: bool  # may be rounded
    percent: bool
    unit: str


class Answer(NamedTuple):
    """An answer as it is compared."""

    name: str  # of what it is assigned to, in `x = 5`
    text: str
    number: Number | None


_SIGNS = {
    "−": "-",
    "×": r"\times ",
    "÷": "/",
    "π": r"\pi ",
    "°": r"^\circ",
    "∞": r"\infty ",
    **dict.fromkeys("\u00a0\u2009\u202f", r"\,"),
}
_TRANSLATION = str.maketrans({**_SIGNS, "≤": r"\le ", "≥": r"\ge ", "√": r"\sqrt "})
_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|operatorname)\s*"
WRAPPED = re.compile(_TEXT + r"\{([^{}]*)\}")
_REWRITES = tuple(
    (re.compile(pattern, re.ASCII), by)
    for pattern, by in (
        (r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![A-Za-z])", ""),
        (r"(?<!\\)\\[!()\[\]]", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"\{,\}", ","),
        (r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))", ","),  # thin spaces between thousands
        (r"(?<!\\)\\[,;: ]|~", " "),
        (r"\\(?:degree|deg)(?![A-Za-z])|\^\s*\{\s*\\circ\s*\}", r"^\\circ"),
        (r"\\(?:lt|gt)(?![A-Za-z])", lambda m: "<" if m[0] == r"\lt" else ">"),
    )
)
_ASSIGNED = re.compile(rf"(\\?[A-Za-z]+(?:_\w|_\{{\w+\}})?|{_TEXT}\{{[^{{}}]*\}})\s*=(?!=)\s*")
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+|\d+)"
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d*)?|\.\d+)"
_NUMBER = re.compile(
    r"(?P<sign>[-+]?)\s*(?P<currency>\\?\$|[€£¥])?\s*(?P<inner>[-+]?)\s*(?:"
    rf"(?:(?P<whole>{_WHOLE})\s*)?\\frac\s*\{{\s*(?P<a>-?{_DECIMAL})\s*\}}"
    rf"\s*\{{\s*(?P<b>-?{_DECIMAL})\s*\}}"
    rf"|(?:(?P<whole2>{_WHOLE})\s+)?(?P<c>{_DECIMAL})\s*/\s*(?P<d>{_DECIMAL})"
    rf"|(?P<decimal>{_DECIMAL})"
    r"(?:(?:\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*\{?|[eE])(?P<exponent>[-+]?\d{1,2})\}?)?"
    r")\s*(?P<percent>\\?%)?(?:"
    rf"\s*{_TEXT}\{{(?P<text>[^{{}}\d]*)\}}"
    r"|\s+(?P<words>[A-Za-z]{3,}(?:[ /][A-Za-z]+){0,3})"
    r"|\s*(?P<short>[cmk]m|k?g|mg|lbs?|oz|ft|in|hrs?|min|mph|kph|ml|mL|cents?|dollars?|\^\\circ(?:\s*[CF])?)"
    r")?(?:(?<=[A-Za-z}])\s*(?P<power>\^\s*\{?[23]\}?))?",
    re.ASCII,
)
# After a number these change it or deny it, or are no words at all.
_NO_UNIT = re.compile(
    r"hundred|thousand|[mbtr]+illion|dozen|score|gross|half|halves|thirds?|quarters?|fourths?|"
    r"fifths?|tenths?|hundredths?|or|and|not|to|but|nor?|plus|minus|times|over|point|squared|"
    r"cubed|factorial|mod|modulo|pi|tau|exp|log|ln|sin|cos|tan|sec|csc|cot|sqrt|root|abs|max|"
    r"gcd|lcm|lim|det|if|else|base|choose|least|most|than|more|less|about|approx|"
    r"(?-i:[^ACFJKLNVWghlms])",  # a lone letter is a variable
    re.IGNORECASE,
)


_UNITS = {
    written: unit
    for unit, others in {
        "second": "s sec",
        "minute": "min",
        "hour": "h hr",
        "inch": "in",
        "foot": "ft feet",
        "yard": "yd",
        "mile": "mi",
        "mile per hour": "mph",
        "millimeter": "mm millimetre",
        "centimeter": "cm centimetre",
        "meter": "m metre",
        "kilometer": "km kilometre",
        "gram": "g",
        "kilogram": "kg kilo",
        "milligram": "mg",
        "pound": "lb",
        "ounce": "oz",
        "liter": "l litre",
        "milliliter": "ml millilitre",
        "degree": "circ deg",
        "c": "celsius",
        "f": "fahrenheit",
    }.items()
    for written in others.split()
}


def read(text: str) -> Answer:
    text = " ".join(text.translate(_TRANSLATION).split())
    for pattern, by in _REWRITES:
        text = pattern.sub(by, text)
    text = bare(text)
    name = ""
    if assigned := _ASSIGNED.match(text):
        name, text = assigned[1], bare(text[assigned.end() :])
    number = _number(text)
    if number is None and WRAPPED.search(text):
        unwrapped = bare(WRAPPED.sub(r" \1 ", text))
        number = _number(unwrapped)
    return Answer(name, text, number)


def bare(text: str) -> str:
    """Without math delimiters, brackets around a lone value, and a final full stop."""
    while True:
        before, text = text, re.sub(r"(?<!\.)\.$", "", text.strip()).strip()
        if len(text) > 1 and text[0] == text[-1] == "$" and text[-2] != "\\":
            text = text[1:-1]
        inside = text[1:-1]
        braces, value = text[:1] + text[-1:] == "{}", text[:1] + text[-1:] == "()"
        if (braces or (value and "," not in inside)) and not re.search(r"[{}()]", inside):
            text = inside
        if text == before:
            return text


def _number(text: str) -> Number | None:
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    unit = match["text"] or match["words"] or match["short"] or ""
    words = re.findall(r"[A-Za-z]+", unit)
    if any(_NO_UNIT.fullmatch(word) for word in words):
        return None
    over, under = match["a"] or match["c"], match["b"] or match["d"]
    if over is not None:
        bottom, whole = _fraction(under), match["whole"] or match["whole2"]
        if not bottom or (whole and not 0 < _fraction(over) < bottom):
            return None
        value = _fraction(over) / bottom + (_fraction(whole) if whole else 0)
    else:
        value = _fraction(match["decimal"]) * Fraction(10) ** int(match["exponent"] or 0)
    if match["sign"] and match["inner"]:
        return None
    if "-" in (match["sign"], match["inner"]):
        value = -value
    percent = bool(match["percent"]) or words[:1] in (["percent"], ["pct"])
    unit = "" if percent else " ".join(map(_unit, words))
    unit += (match["power"] or "").strip("^{} ")
    if match["currency"]:
        unit = unit or {"€": "euro", "£": "pound", "¥": "yen"}.get(match["currency"], "dollar")
    return Number(value, "." in (match["decimal"] or ""), percent, unit)


def _unit(word: str) -> str:
    """One word for the short and the long form, for one and for many."""
    word = word.lower()
    if word not in _UNITS and not word.endswith("ss"):
        word = re.sub(r"(?<=x|h)e$|(?<=ss)e$", "", word.removesuffix("s"))
    return _UNITS.get(word, word)


def _fraction(digits: str) -> Fraction:
    return Fraction(digits.replace(",", "").removesuffix("."))
