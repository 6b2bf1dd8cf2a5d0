"""Answers in LaTeX, compared: texts in a normal form, numbers exactly, lists, intervals and matrices part by part.

    found, gold → normal → same ─→ equal texts or numbers
                                └→ parts of the same kind, each → same; what has none → symbolic
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

Symbolic = Callable[[str, str], bool]

# A word of three letters after a number is a unit unless it changes it; of shorter ones, many are products.
NO_UNITS = "hundred|thousand|million|billion|trillion|dozen|half|halves|thirds?|times|plus|minus|sin|cos|tan|log|sqrt"
SHORT_UNITS = "cm|mm|km|kg|mg|ml|mL|ft|in|lb|lbs|oz|yd|mi|hr|hrs|am|pm"
UNIT = rf"(?:(?!(?:{NO_UNITS})\b)[A-Za-z]{{3,}}|{SHORT_UNITS}|[mgsLh])"
UNITS = rf"(?:\s+|(?=(?:{SHORT_UNITS})\b)){UNIT}(?:\s*[\s/]\s*{UNIT})*\s*(?:\^[23])?[\s.]*$"
RULES = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?|displaystyle)(?![A-Za-z])\.?", ""),
        (r"(?<!\\)\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree(?![A-Za-z])|°", ""),
        (r"(?<=\d)\s*(?:\{,\}|,?(?<!\\)\\[,!;: ]|,\\!)\s*(?=\d{3}(?!\d))", ""),  # 1{,}234
        (r"(?<!\\)\\(?:[,;:! ]|q?quad(?![A-Za-z]))|~", " "),
        (r"(?<!\\)\\[$()\[\]]|\$|\*\*", ""),
        (r"\s*(?:\\%|%|\\(?:text|mathrm)\{\s*percent\s*\}|\bpercent\b)", "%"),
        (r"\\(?:text(?:bf|it|rm|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"(?<![A-Za-z\\])(?:,\s*)?(?:and|or)(?![A-Za-z])", ","),
        (r"\\(leq|geq|neq)(?:slant)?(?![A-Za-z])", lambda m: "\\" + m[1][:2]),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\times(?![A-Za-z])", r"\\cdot "),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\[lr]brace(?![A-Za-z])", lambda m: "\\{" if m[0][1] == "l" else "\\}"),
        (r"\\frac\s*([\dA-Za-z])", r"\\frac{\1}"),
        (r"(\\frac\s*\{[^{}]*\})\s*([\dA-Za-z])", r"\1{\2}"),
        (r"\\sqrt\s*([\dA-Za-z])", r"\\sqrt{\1}"),
        (r"([_^])\s*\{\s*(\w)\s*\}", r"\1\2"),
        (rf"([\d}}%)]|\\pi){UNITS}", r"\1"),
        (r"\s+", " "),
        (r"(?<![A-Za-z\d]) | (?![A-Za-z\d])", ""),
    )
]  # fmt: skip
CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup ", "±": r"\pm ", "∈": r"\in ", "≤": r"\le ",
    "≥": r"\ge ", "×": r"\times ", "·": r"\cdot ", "€": "", "£": "",
})  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.])(?<!\d,)\d{1,3}(?:,\d{3})+(?!\d|,\d)")

D = r"(?:\d+\.?\d*|\.\d+)"
NUMBER = re.compile(
    rf"([-+]?)(?:(\d+)(?:(?=\\frac)| (?=\d+/)))?(?:\\frac\{{(-?{D})\}}\{{(-?{D})\}}|({D})(?:/({D}))?)"
    r"(?:\\cdot ?10\^\{?(-?\d{1,3})\}?)?(%?)"
)
IN_BASE = re.compile(r"(\d+)_\{?(\d+)\}?")
WORDS = re.compile(r"[A-Za-z][A-Za-z ]{2,}")
NAME = re.compile(r"(?:\\?[A-Za-z]+(?:_\w)?(?:\([A-Za-z]\))?|\([A-Za-z](?:,[A-Za-z])+\))(?:=|\\in(?![a-z]))(?!.*=)")
MATRIX = re.compile(r"\\begin\{([pbB]?matrix|array)\}(?:\{[lcr|]*\})?(.*)\\end\{\1\}", re.DOTALL)
BRACKET = re.compile(r"(\\?[(\[{])|\\?[)\]}]")
RELATION = re.compile(r"[<>]|\\[lg]e(?![a-z])")


def normal(text: str) -> str:
    """One form for what differs in writing only: spaces, sizes, units, separators of thousands, short fractions."""
    text = text.translate(CHARACTERS).strip().rstrip(".,;:")
    if not re.search(r"[(\[]|\\\{", text):  # where a comma parts elements
        text = THOUSANDS.sub(lambda m: m[0].replace(",", ""), text)
    for pattern, to in RULES:
        text = pattern.sub(to, text)
    text = text.strip().rstrip(".,;:")
    return text.lower() if WORDS.fullmatch(text) else text


def number(text: str) -> tuple[Fraction, bool] | None:
    """The value of an integer, a decimal, a fraction, a mixed number or a power of ten, and whether % follows it."""
    match = NUMBER.fullmatch(re.sub(r"^([-+]?)(?=10\^)", r"\g<1>1\\cdot", text))
    if not match:
        return None
    sign, whole, over, under, top, bottom, exponent, percent = match.groups()
    try:
        value = Fraction(over or top) / Fraction(under or bottom or 1) + Fraction(whole or 0)
    except (ZeroDivisionError, ValueError):  # Python reads integers of up to 4300 digits
        return None
    return (-value if sign == "-" else value) * Fraction(10) ** int(exponent or 0), bool(percent)


def _split(text: str, separator: str) -> list[str]:
    """At separators outside of all brackets."""
    pieces, depth, begin = [], 0, 0
    for match in re.finditer(rf"{BRACKET.pattern}|({separator})", text):
        if match[2] is None:
            depth += 1 if match[1] else -1
        elif depth == 0:
            pieces.append(text[begin : match.start()])
            begin = match.end()
    return [*pieces, text[begin:]]


def _enclosed(text: str) -> bool:
    """Whether the bracket that begins it ends with it."""
    depth = 0
    for match in BRACKET.finditer(text):
        depth += 1 if match[1] else -1
        if depth == 0:
            return match.end() == len(text) and text[0] in "([{\\"
    return False


def _parts(text: str) -> tuple[str, list[str]]:
    """Kind ("()" and its like, "\\cup", "matrix 2 1", "" of sets and bare lists) and parts; one if it has none."""
    while _enclosed(text) and text[0] in "({" and len(_split(text[1:-1], ",")) == 1:
        text = text[1:-1]
    if match := MATRIX.fullmatch(text):
        rows = [row.split("&") for row in match[2].split(r"\\") if row]
        return f"matrix {len(rows)} {len(rows[0]) if rows else 0}", [cell for row in rows for cell in row]
    if len(union := _split(text, r"\\cup")) > 1:
        return r"\cup", union
    if _enclosed(text) and text.startswith(("(", "[")):
        return text[0] + text[-1], _split(text[1:-1], ",")
    bare = text[2:-2] if _enclosed(text) and text.startswith(r"\{") else text
    return "", [signed for part in _split(bare, "[,;]") for signed in _signs(part)]


def _signs(text: str) -> list[str]:
    """Both expressions that one with ± stands for."""
    if r"\pm" not in text:
        return [text]
    return [text.replace(r"\pm", a).replace(r"\mp", b).removeprefix("+") for a, b in ("+-", "-+")]


def same(found: str, gold: str, symbolic: Symbolic) -> bool:
    """Whether two normal answers are equal; symbolic: asked about expressions.

    Lists without brackets and sets have no order, and a name before ``=`` or ∈ counts only where both have one.
    """
    if found == gold:
        return bool(gold)
    a, b = number(found), number(gold)
    if a and b:
        (x, percent), (y, percent_of_gold) = a, b
        return x == y or percent != percent_of_gold and (x / 100 == y if percent else x == y / 100)
    base, of_gold = IN_BASE.fullmatch(found), IN_BASE.fullmatch(gold)  # math-verify takes 12_8 for 12
    if base or of_gold:
        return not base and found == of_gold[1]
    if WORDS.fullmatch(found) or WORDS.fullmatch(gold):
        return False
    names = NAME.match(found), NAME.match(gold)
    if bool(names[0]) != bool(names[1]):
        found, gold = (text[name.end() :] if name else text for text, name in zip((found, gold), names, strict=True))
        return same(found, gold, symbolic)
    (kind, these), (kind_of_gold, those) = _parts(found), _parts(gold)
    if kind == kind_of_gold and len(these) == len(those):
        if [kind, len(these)] == ["", 1]:
            return symbolic(found, gold) if (these, those) == ([found], [gold]) else same(these[0], those[0], symbolic)
        if kind in ("", r"\cup"):
            return all(_take(these, part, symbolic) for part in those)
        return all(same(*pair, symbolic) for pair in zip(these, those, strict=True))
    return bool(RELATION.search(found) or RELATION.search(gold)) and symbolic(found, gold)


def _take(parts: list[str], gold: str, symbolic: Symbolic) -> bool:
    """Whether one of the parts is the same; it is taken out."""
    for i, part in enumerate(parts):
        if same(part, gold, symbolic):
            del parts[i]
            return True
    return False
