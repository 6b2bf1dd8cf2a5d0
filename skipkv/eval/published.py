"""The published rule: Qwen2.5-Math's, as R-KV's repository (Zefan-Cai/R-KV) has it in ``evaluation/``.

Its ``parser.py`` finds answers and brings them into one form, its ``grader.py`` compares; it comes from Hendrycks' MATH
through PRM800K and ToRA, and is loose: ``[a, b]`` is ``(a, b)``, 0.5 is 50. This is the rule, not its code: units are
those of `skipkv.eval.latex`, numbers written as words are not read, and math-verify reads LaTeX for sympy.
"""

from __future__ import annotations

import math
import re

from skipkv.eval.latex import UNITS, WORDS, Symbolic

TOLERANCE = 1e-4  # relative
RULES = [
    (re.compile(pattern), to)
    for pattern, to in (
        (r"^\s*\\(?:text|mbox)\{([A-Za-z][A-Za-z\s-]*)\}\s*$", r"\1"),
        (r"\n|\.+\s*$|\\!|\\left|\\right|\^\{?\\circ\}?|\\?\$|\\[()]", ""),
        (r"\\(?:begin\{array\}\{.*?\}|begin\{bmatrix\})", r"\\begin{pmatrix}"),
        (r"\\end\{(?:array|bmatrix)\}", r"\\end{pmatrix}"),
        (r"\\[td]frac", r"\\frac"),
        (r"\\(ne|le|ge)q", r"\\\1"),
        (r"\\([{}])", r"\1"),
        (r"(?<=\S)\s*\\text\{[^{}]*\}$", ""),
        (rf"(?<=[\d}}]){UNITS}", ""),
        (r"\\text\{(.*?)\}", r"\1"),
        (r"[xyz](?:=|\\in|\\to)", ""),
        (r"\\emptyset", "{}"),
        (r"\(-\\infty,\s*\\infty\)", r"\\mathbb{R}"),
        (r"\\?%|\\mbox\{.*?\}|\\mathbf|and", ""),
        (r"(^|[ {])\.(?=\d)", r"\g<1>0."),
        (r"(\d)\.0*(?!\d)", r"\1"),
        (r"^[^=]{0,2}=(?=[^=]*$)", ""),
        (r"\\sqrt(\w+)", r"\\sqrt{\1}"),
        (r"\s", ""),
        (r"\\frac(\w)", r"\\frac{\1}"),
        (r"\\frac(\{[^{}]*\})(\w)", r"\\frac\1{\2}"),
        (r"^(-?\d+|[^/]*sqrt[^/]*)/(-?\d+|[^/]*sqrt[^/]*)$", r"\\frac{\1}{\2}"),
    )
]
LAST_NUMBER = re.compile(r"-?\d*\.?\d+")
TUPLE = re.compile(r"[(\[].+[)\]]")
MATRIX = re.compile(r"\\begin\{pmatrix\}(.*)\\end\{pmatrix\}")


def answer(text: str) -> str:
    """A text's answer: after the last "boxed", or "answer is", or its last number."""
    after = text.rpartition("boxed")[2]
    if "boxed" not in text:
        for phrase in ("he answer is", "final answer is"):
            if phrase in text:
                return text.rpartition(phrase)[2].strip().lstrip(":")
        numbers = LAST_NUMBER.findall(text.replace(",", ""))
        return numbers[-1] if numbers else ""
    if not after.startswith("{"):
        return after.partition("$")[0].strip()
    depth = 0
    for brace in re.finditer("[{}]", after):
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return after[1 : brace.start()]
    return after[1:]


def form(text: str) -> str:
    """An answer as it is compared."""
    for pattern, to in 2 * RULES:  # as published: some rules see what others have left
        text = pattern.sub(to, text.strip())
    return text


def _value(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def same(found: str, gold: str, symbolic: Symbolic) -> bool:
    """Whether two answers in the compared form are equal; symbolic: asked about expressions, with `TOLERANCE`."""
    if found.lower() == gold.lower():
        return True
    a, b = _value(found), _value(gold)
    if a is not None and b is not None:
        return any(math.isclose(a, b * scale, rel_tol=TOLERANCE) for scale in (0.01, 1, 100))
    if not found:
        return False
    if _bare(found, gold) == _bare(gold, found):
        return True
    if TUPLE.fullmatch(found) and TUPLE.fullmatch(gold) and _all(found[1:-1], gold[1:-1], [","], symbolic):
        return True
    matrices = MATRIX.fullmatch(found), MATRIX.fullmatch(gold)
    if all(matrices) and _all(matrices[0][1], matrices[1][1], [r"\\", "&"], symbolic):
        return True
    sides, of_gold = found.split("="), gold.split("=")
    if len(sides) == 2 and len(of_gold) == 1 and len(sides[0]) <= 2:
        return same(sides[1], gold, symbolic)
    if len(of_gold) == 2 and len(sides) == 1 and len(of_gold[0]) <= 2:
        return same(found, of_gold[1], symbolic)
    # sympy reads neither lists nor words; math-verify does.
    return not ("," in found + gold or WORDS.fullmatch(found)) and symbolic(found, gold)


def _bare(text: str, other: str) -> str:
    """Without braces and parentheses, and without the brackets around it unless the other has parentheses there."""
    if text[:1] + text[-1:] == "[]" and other[:1] != "(":
        text = text[1:-1]
    return re.sub(r"[(){}]", "", text).lower()


def _all(found: str, gold: str, separators: list[str], symbolic: Symbolic) -> bool:
    if not separators:
        return same(found, gold, symbolic)
    parts, those = found.split(separators[0]), gold.split(separators[0])
    return len(parts) == len(those) and all(
        _all(*pair, separators[1:], symbolic) for pair in zip(parts, those, strict=True)
    )
