"""Whether a text's answer is right.

    text → its answer ─→ the same by our rule (`skipkv.eval.latex`), or by the published one
"""

from __future__ import annotations

import importlib.util
import re
import threading
from pathlib import Path

from skipkv.checks import one_of, text_of
from skipkv.errors import BackendError
from skipkv.eval import latex, published
from skipkv.eval.records import Grade
from skipkv.load.process import Process

SECONDS = 2  # of all comparisons of one answer by sympy, whose process may take as long to start again
BYTES = 1 << 30  # of address space for them
LAST = 1 << 20  # characters that are looked at; a text of 32k tokens has an eighth of it
LONGEST = 1000  # characters of an answer; the longest of the benchmarks have a tenth of it

BOXED = re.compile(r"\\boxed\{([^{}]*)\}")
BRACES = re.compile(r"(\\?f?boxed\s*\{)|\\.|(\{)|\}", re.DOTALL)
MARK = re.compile(r"(?i)\banswer\b(?:\s*\*\*)?(?:\s+is\b|\s*[:=]|[ *]*\n)|^[ \t]*####", re.MULTILINE)
DELIMITED = re.compile(
    r"(?:\$\$([^$]+)\$\$|\$([^$]+)\$(?!\d)|\\\((.+?)\\\)|\\\[(.+?)\\\]|\*\*(.+?)\*\*)(?!\s*(?:,|and|or)\s*[$\\])",
    re.DOTALL,
)
SENTENCE = re.compile(r"\n|\.(?:\s|$)")

_threads = threading.local()  # a process a thread: none waits for what another's answer takes


class _Ended(Exception):
    """sympy's process ended."""


def answer_part(text: str) -> str:
    """What follows the last ``</think>``, without a thought that has begun and not ended."""
    return text.rpartition("</think>")[2].partition("<think>")[0]


def _boxed(text: str) -> str:
    """What the last box that holds something holds."""
    opened, last = [], None
    for brace in BRACES.finditer(text):
        if brace[1] or brace[2]:
            opened.append(brace.end() if brace[1] else 0)
        elif brace[0] == "}" and opened and (begin := opened.pop()) and begin < brace.start():
            last = slice(begin, brace.start())
    if last is None:
        return ""
    found = text[last].strip()
    return (_boxed(found) if len(found) <= LONGEST else "") or found  # a box may stand in a box


def _marked(text: str) -> str:
    """What follows the last mark, to the end of its formula, sentence or line."""
    marks = [mark.end() for mark in MARK.finditer(text)]
    rest = text[marks[-1] :][: 2 * LONGEST].lstrip(" \t\n:=") if marks else ""
    rest = rest.removeprefix("**").lstrip()
    match = DELIMITED.match(rest)
    return (match[match.lastindex] if match else SENTENCE.split(rest, maxsplit=1)[0]).strip(" *`\n")


def grade(kind: str, text: str, answer: str, rule: str = "default") -> Grade:
    """Find a text's answer and compare it with the right one, within 5 s whatever the text, in any thread.

    Parameters
    ----------
    kind : "integer", "math" or "boxed"
        "boxed" is the last ``\\boxed{…}`` without braces in it, character by character, under either rule.
    text : str
        Of the model, thoughts included.
    answer : str
        The right one.
    rule : "default" or "official"
        default: the answer stands after ``</think>``, in the last ``\\boxed{…}`` that holds something, or else after
        the last "answer is", "answer:" or ``####``. It is right if its normal form is that of the right one, its value
        exactly the same, or it is a list, interval or matrix of the same kind whose parts are right; math-verify
        compares expressions. Units are left out, and 50 % is both 50 and 0.5.

        official: `skipkv.eval.published`. The answer stands anywhere, thoughts included: after the last "boxed", or
        else after "answer is", or else it is the last number. It is right if the texts differ in case and brackets at
        most, if the numbers are within a relative 1e-4 after a factor of 1, 100 or 0.01, if tuples or matrices have
        such parts, or if sympy finds the expressions equal or as close.

    Raises
    ------
    ConfigError
        There is no such kind or rule, or something is no text.
    BackendError
        math-verify is not installed, or its process cannot be started; not for "integer" by default, nor "boxed".
    """
    one_of("kind", kind, ("integer", "math", "boxed"), str)
    one_of("rule", rule, ("default", "official"), str)
    text_of("text", text)
    text_of("answer", answer)
    if kind == "boxed":
        found = [None, *BOXED.findall(text)][-1]
        return Grade(found is not None and found.strip() == answer, found, "" if found else "no answer")
    if (kind == "math" or rule == "official") and importlib.util.find_spec("math_verify") is None:
        raise BackendError("grading needs math-verify (pip install 'skipkv[eval]')")
    text = (text if rule == "official" else answer_part(text))[-LAST:]
    found = published.answer(text) if rule == "official" else _boxed(text) or _marked(text)
    if not found:
        return Grade(False, None, "no answer")
    if len(found) > LONGEST:
        return Grade(False, found[:LONGEST], f"the answer has {len(found)} characters")
    try:
        if rule == "official":
            correct = published.same(published.form(found), published.form(answer), _asking(published.TOLERANCE))
        elif kind == "integer":
            value = latex.normal(found)
            value = value if "," in value else value.rpartition("=")[2]  # 12 + 6 = 18
            correct = latex.same(value, latex.normal(answer), lambda found, gold: False)
        else:
            correct = latex.same(latex.normal(found), latex.normal(answer), _asking(0.0))
    except _Ended as error:
        return Grade(False, found, f"the comparison {error}")
    except RecursionError:
        return Grade(False, found, "the answer is nested too deep")
    return Grade(correct, found)


def _asking(tolerance: float) -> latex.Symbolic:
    """Asks sympy, for a few seconds over all calls."""
    left = SECONDS

    def symbolic(found: str, gold: str) -> bool:
        nonlocal left
        if not hasattr(_threads, "process"):
            program = Path(__file__).with_name("symbolic.py")  # which is not imported here: math-verify is optional
            _threads.process = Process("math answers need", str(program), BYTES)
        answer = _threads.process.ask([found, gold, tolerance], max(left, 0.01))
        left -= _threads.process.took
        if isinstance(answer, str):
            raise _Ended(answer)
        return answer[0]

    return symbolic
