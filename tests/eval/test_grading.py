"""grading.py: right answers in every form they are written in, near misses, texts that would hang or break a grader."""

import importlib.util
import json
import re
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest
from harness import refused

from skipkv import BackendError, ConfigError
from skipkv.eval import grading
from skipkv.eval.grading import answer_part, grade

DATA = Path(__file__).parents[3] / "shared" / "data"
KIND = {"gsm8k_test": "integer", "aime24": "integer", "math500": "math"}
COUNT = {"gsm8k_test": 1319, "aime24": 30, "math500": 500}
# A few of each kind where the benchmarks are not at hand.
BUILT_IN = {
    "integer": ["18", "-10", "70000", "33", "0"],
    "math": [
        r"\frac{14}{3}", r"\frac43", r"-\frac{3}{8}", "1.25", ".35625", r"1\frac{4}{5}", r"10,\!080", r"\$18.90",
        r"90^\circ", r"5.4 \text{ cents}", r"3\sqrt{13}", r"\left( 3, \frac{\pi}{2} \right)", "(3,4]", "1,-2",
        r"(-\infty, 2) \cup (3, \infty)", r"1 \pm \sqrt{19}", r"\{1\pm\sqrt{5},-2\}", "x=5", r"x \in [-2,7]",
        r"\begin{pmatrix} -1/3 \\ 2/3 \\ 5/3 \end{pmatrix}", r"\text{(C)}", r"\text{even}", "52_8", "6 - 5i", "2k+2",
        "5x - 7y + 11z + 4 = 0",
    ],
}  # fmt: skip
needs_math = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")


def answers(name):
    """(kind, right answer) of a benchmark, or of the built-in table."""
    if name == "built-in":
        return [(kind, answer) for kind, found in BUILT_IN.items() for answer in found]
    path = DATA / f"{name}.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path}")
    found = [(KIND[name], json.loads(line)["answer"]) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(found) == COUNT[name]
    return found


def exact(answer):
    """The value of an integer, a decimal or a fraction without anything beside it."""
    answer = re.sub(r"^(-?)\\[dt]?frac\s*\{?(\d+?)\}?\s*\{?(\d+)\}?$", r"\1\2/\3", answer)
    return Fraction(answer) if re.fullmatch(r"-?(\d+(/\d+)?|\d*\.\d+)", answer) else None


def decimal(value):
    """Exact, or None."""
    for places in range(1, 8):
        if (value * 10**places).denominator == 1:
            scaled = abs(int(value * 10**places))
            return f"{'-' * (value < 0)}{scaled // 10**places}.{scaled % 10**places:0{places}d}"
    return None


def number_forms(value):
    sign, n, m = "-" * (value < 0), abs(value.numerator), value.denominator
    plain = f"{sign}{n}" if m == 1 else rf"{sign}\frac{{{n}}}{{{m}}}"
    for unit in (" cm", r"\text{ cm}", r" \text{ cm}^2", r"\,\mathrm{m}", r"\%", r"^\circ", r"^{\circ}", " degrees",
                 " dollars", r"\text{ miles per hour}", r"\mbox{ inches}"):  # fmt: skip
        yield plain + unit
    yield from (rf"\${plain}", rf"\text{{{plain}}}" if m == 1 else plain, f"x = {plain}", rf"\left({plain}\right)")
    if decimal(value):
        yield decimal(value)
    if m == 1:
        yield rf"{sign}\frac{{{3 * n}}}{{3}}"
        for comma in (",", "{,}", r"\,", r",\!") if n >= 1000 else ():
            yield sign + f"{n:,}".replace(",", comma)
    else:
        yield from (f"{sign}{n}/{m}", rf"{sign}\dfrac{{{n}}}{{{m}}}", rf"{sign}\tfrac{{{n}}}{{{m}}}",
                    rf"\frac{{{sign}{n}}}{{{m}}}", rf"{sign}\frac {{{n}}} {{{m}}}")  # fmt: skip
        if n > m:
            yield rf"{sign}{n // m}\frac{{{n % m}}}{{{m}}}"


def forms(kind, answer):
    """Other ways to write an answer."""
    yield answer
    value = exact(answer)
    if value is not None:
        yield from number_forms(value)
    if kind == "integer":
        yield answer.zfill(3) if value >= 0 else answer
        return
    yield f"  {answer} "
    yield answer.replace("frac", "dfrac").replace("ddfrac", "dfrac")
    yield answer.replace("frac", "tfrac").replace("dtfrac", "tfrac")
    if not re.search(r"\d,(\\!)?\s*\d{3}$", answer) and not exact(answer):
        yield re.sub(r"([,+=-])", r" \1 ", answer)
    yield answer.replace(r"\left", "").replace(r"\right", "")
    yield re.sub(r"(?<!\\left)(?<!\\)([(\[])", r"\\left\1", re.sub(r"(?<!\\right)(?<!\\)([)\]])", r"\\right\1", answer))
    yield answer.replace("pmatrix", "bmatrix")
    yield re.sub(r"(-?)(\d+)/(\d+)", r"\1\\frac{\2}{\3}", answer)
    yield re.sub(r"\\text\{(.*?)\}", r"\1", answer)
    yield re.sub(r"\\text\{\((\w)\)\}", r"\1", answer)
    yield re.sub(r"_\{?(\d)\}?$", r"_{\1}", answer)
    if not re.search(r"=|\\in |,|[a-z]{3}\}|\(|_", answer):
        yield f"x = {answer}"
    if re.match(r"[xy] ?=|x \\in", answer):
        yield re.sub(r"^[xy] ?=|^x \\in", "", answer)
    if re.fullmatch(r"-?\d(, ?-?\d)+", answer):
        parts = answer.split(",")
        yield from (",".join(parts[::-1]), rf"\{{{answer}\}}", r"\text{ and }".join(parts), "x=" + ", x=".join(parts))
    if r"\cup" in answer:
        yield r" \cup ".join(answer.split(r"\cup")[::-1])
    if (pair := answer.partition(r"\pm"))[1] and "," not in answer:
        yield f"{pair[0]}+{pair[2]}, {pair[0]}-{pair[2]}"


def texts(answer):
    """Where a text may say its answer."""
    yield rf"<think>\boxed{{-77}}</think>So it is $\boxed{{{answer}}}$."
    yield rf"First \boxed{{\frac{{-77}}{{78}}}}, no: \[\boxed{{ {answer} }}\]"
    yield rf"\boxed{{\boxed{{{answer}}}}}"
    yield rf"Provide it as \boxed{{}}. Final answer:  \boxed{{{answer}}}"
    yield f"Answer: 78.\nFinal answer: {answer}"
    yield f"</think>**Answer:** {answer}."
    yield f"**Final Answer**\n\n\\[ {answer} \\]\n"
    yield f"I think\n#### {answer}\n"
    if "$" not in answer:
        yield f"The final answer is: ${answer}$. I hope it is correct."


@needs_math
@pytest.mark.parametrize("name", ["built-in", *COUNT])
def test_a_right_answer_is_right_in_every_form(name):
    wrong, seen = [], set()
    for kind, answer in answers(name):
        for form in {*forms(kind, answer)} if (kind, answer) not in seen else ():
            for text in texts(form) if form == answer else [rf"\boxed{{{form}}}", f"**Answer:** {form}."]:
                if not (found := grade(kind, text, answer)).correct:
                    wrong.append((answer, text, found))
        seen.add((kind, answer))
    assert not wrong, "\n".join([f"{len(wrong)}", *map(str, wrong[:40])])


EQUAL = [  # expressions, relations and texts beyond the forms of the benchmarks' answers
    (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"), (r"\frac{\sqrt{3}}{3}", r"\sqrt{3}/3"),
    (r"3\sqrt{13}", r"\sqrt{117}"), (r"\frac{3}{2}", "1 1/2"), ("2k+2", "2(k+1)"), ("6 - 5i", "-5i + 6"),
    ("x^3+3x-6", "-6+x^3+3x"), ("p - q", "-q+p"), (r"\frac{11+9a}{20}", r"\frac{11}{20}+\frac{9a}{20}"),
    ("y = 2x + 3", "y = 3 + 2x"), ("y = 2x + 3", "2x+3"), ("5x - 7y + 11z + 4 = 0", "-5x + 7y - 11z - 4 = 0"),
    ("(3,4]", r"3 < x \le 4"), (r"x \in [-2,7]", r"-2 \leq x \leq 7"), (r"\frac{20000}{\pi}", r"20000 \pi^{-1}"),
    (r"10^{-3}", "0.001"), (r"6.72 \times 10^{-5}", ".0000672"), (r"\frac{1}{2}", r"50\%"), ("0.12", r"12\%"),
    ("(1,2)", r"\left(\frac{2}{2}, 2.0\right)"), ("1,2,3", "3, 1 and 2"), (r"2\pi", "2π"), ("-3", "−3"),
    (r"\frac{1}{2},3", r"x = 3 \text{ or } x = 0.5"), (r"(1,2)\cup(3,4)", r"(3,4) ∪ (1,2)"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{bmatrix}1&2\\3&\frac{8}{2}\end{bmatrix}"),
    (r"\text{Evelyn}", "evelyn"), (r"\text{(C)}", r"\textbf{(C)}"), ("18+2\\pi", "2(9+\\pi)"), ("5r^5", "5 r^{5}"),
    ("33", "m + n = 33"), (r"2^{10}", "1024"), (r"\emptyset", r"\varnothing"),
]  # fmt: skip
NEAR = [
    ("5", "6"), ("5", "-5"), ("-5", "5"), ("5", "4.99999999"), ("5", "50"), ("5", "0.5"), ("5", r"5\text{ million}"),
    ("5", "5 thousand"), ("5", "5, 6"), ("5", r"5 \text{ or } 6"), ("5", "5x"), ("5", "2x=5+x"), ("5", "5^2"),
    ("5", "5!"), ("5", "1 5"), ("12", "1 2"), ("12", "1  2"), ("12", r"0.12 \text{ m}"), ("12", r"120 \text{ mm}"),
    ("12", r"12_8"), ("12", "0.12"), ("1234", "12,34"), ("1234", "1,23"), ("1234", "1.234"), ("100200", "(100,200)"),
    ("0.5", "5"), ("0.5", ".05"), (r"\frac{1}{2}", r"5\%"), (r"\frac{1}{2}", "50"), (r"\frac{1}{2}", r"\frac{2}{1}"),
    (r"\frac{1}{3}", "0.33"), (r"\frac{1}{3}", "0.333333"), (r"\frac{1}{3}", "0.3333333333"), (r"\frac{2}{3}", "0.67"),
    (r"\frac{1}{2}", r"-\frac{1}{2}"), (r"1\frac{4}{5}", r"\frac{4}{5}"), (r"1\frac{4}{5}", r"\frac{14}{5}"),
    (r"10^{-3}", "10^3"), ("10^{10}", "1010"), (r"\sqrt{2}", "1.41"), (r"\sqrt{2}", "1.4142136"), (r"\sqrt{2}", "2"),
    (r"3\sqrt{13}", r"13\sqrt{3}"), (r"\pi", "3.14"), (r"\pi", r"\frac{22}{7}"), (r"2\pi", r"\pi"), (r"\pi", "180"),
    ("90^\\circ", r"\frac{\pi}{2}"), (".0000672", "6.7 \\times 10^{-5}"), (".0000672", ".000067"), (".0000672", "0"),
    ("(1,2)", "(2,1)"), ("(1,2)", "[1,2]"), ("(1,2)", "(1,2]"), ("(1,2)", "1,2"), ("(1,2)", r"\{1,2\}"),
    ("(1,2)", "(1,2,3)"), ("(1,2)", "(1,3)"), ("[1,2)", "(1,2]"), ("1,2", "(1,2)"), ("(3,4]", r"3 \le x \le 4"),
    ("(3,4]", "3<x<4"), ("(3,4]", "x > 3"), (r"(-\infty,2)", r"(\infty,2)"), (r"(-\infty,2)", r"(-\infty,2]"),
    (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2)"), (r"(-\infty,2)\cup(3,\infty)", r"(-\infty,2]\cup(3,\infty)"),
    (r"(0,9)\cup(9,36)", "(0,36)"), ("1,-2", "1"), ("1,-2", "1,2"), ("1,-2", "1,-2,3"), ("1,-2", "1,1"),
    (r"\{1,2,3\}", r"\{1,2\}"), (r"1 \pm \sqrt{19}", r"1+\sqrt{19}"), (r"1 \pm \sqrt{19}", r"\sqrt{19} \pm 2"),
    (r"1\pm\sqrt{19}", r"1\mp\sqrt{91}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 & 2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ -2 \end{pmatrix}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", "(1,2)"), ("x=5", "y=5"), ("x=5", "x=6"), ("y = 2x + 3", "y = 3x + 2"),
    ("y = 2x + 3", "x = 2y + 3"), ("x^2", "x^3"), ("x^2", "x_2"), ("3x", "3"), ("2k+2", "2k"),
    ("5x - 7y + 11z + 4 = 0", "5x - 7y + 11z - 4 = 0"), ("5x - 7y + 11z + 4 = 0", "0"), ("6-5i", "6+5i"),
    ("52_8", "52_9"), ("52_8", "42"), (r"\text{(C)}", r"\text{(B)}"), (r"\text{even}", r"\text{odd}"),
    (r"\text{even}", "neve"), (r"\text{Evelyn}", "Eve"), (r"\cot x", r"\tan x"), (r"\text{east}", r"\text{west}"),
    (r"\emptyset", "0"), (r"(a+5)(b+2)", "(a+2)(b+5)"), ("5", ""), ("5", r"\text{five?}"),
]  # fmt: skip
UNSAID = [  # (right answer, text): it stands there, but not as the answer
    ("5", ""), ("5", "So the total is 5."), ("5", r"<think>\boxed{5}</think>"),
    ("5", r"<think>\boxed{5}</think> \boxed{6}"), ("5", r"<think> So \boxed{5}"),
    ("5", r"\boxed{5} <think> no, </think> it is \boxed{6}"), ("5", r"\boxed{5}, no: \boxed{6}"),
    ("5", "Answer: 5\nThe final answer is 6."), ("5", r"\boxed{}"), ("5", r"\boxed{5"), ("5", "Final answer: "),
    ("5", r"Answer: 5, and therefore \boxed{10}"), ("", r"\boxed{}"), ("", ""),
]  # fmt: skip


@needs_math
@pytest.mark.parametrize("answer, found", EQUAL)
def test_what_means_the_same_is_right(answer, found):
    assert grade("math", rf"\boxed{{{found}}}", answer) == grade("math", f"Answer: ${found}$", answer)
    assert grade("math", rf"\boxed{{{found}}}", answer).correct


@needs_math
@pytest.mark.parametrize("answer, found", NEAR)
def test_a_near_miss_is_wrong(answer, found):
    box = rf"\boxed{{{found}}}"
    for text in (box, rf"\boxed{{{answer}}}{box}" if found else "", f"**Final answer:** ${found}$."):
        assert not grade("math", text, answer).correct, text
        if exact(answer) and exact(answer).denominator == 1:
            assert not grade("integer", text, answer).correct, text


@needs_math
@pytest.mark.parametrize("kind", ["integer", "math"])
@pytest.mark.parametrize("answer, text", UNSAID)
def test_only_what_is_said_as_the_answer_counts(kind, answer, text):
    assert not grade(kind, text, answer).correct


def test_why_an_answer_is_wrong():
    assert grade("integer", "a", "5").note == grade("integer", "a", "5", "default").note == "no answer"
    assert grade("integer", r"\boxed{" + "9" * 2000 + "}", "5").note == "the answer has 2000 characters"
    assert grade("integer", r"so \boxed{ 6 }", "5").found == "6"


def test_the_answer_follows_the_thoughts():
    assert answer_part("a</think>b</think>c") == "c"
    assert answer_part("a") == "a"
    assert answer_part("<think>a</think>b<think>c") == "b"


DEEP = 20_000
HOSTILE = {
    "2 MB of letters": "a" * 2_000_000,
    "2 MB of digits": r"\boxed{" + "9" * 2_000_000 + "}",
    "2 MB of spaces": "answer" + " " * 2_000_000,
    "2 MB of lines": "\n" * 2_000_000,
    "2 MB of backslashes": "\\" * 2_000_000,
    "answers": "answer is " * 200_000,
    "marks": "####\n" * 400_000,
    "boxes": r"\boxed{1}" * 200_000,
    "unclosed boxes": r"\boxed{" * 1_000_000,
    "nested boxes": r"\boxed{" * 200_000 + "7" + "}" * 200_000,
    "closing braces": "}" * 1_000_000,
    "thoughts": "<think></think>" * 100_000,
    "dollars": "Answer: " + "$" * 1_000_000,
    "deep braces": r"\boxed{" + "{" * DEEP + "7" + "}" * DEEP + "}",
    "braces within the limit": r"\boxed{" + "{" * 400 + "7" + "}" * 400 + "}",
    "brackets within the limit": r"\boxed{" + "(" * 400 + "7" + ")" * 400 + "}",
    "tuples within the limit": r"\boxed{" + "(7," * 240 + "8" + ")" * 240 + "}",
    "fractions within the limit": r"\boxed{" + r"\frac{1}{" * 90 + "x" + "}" * 90 + "}",
    "roots within the limit": r"\boxed{" + r"\sqrt{" * 110 + "x" + "}" * 110 + "}",
    "lists within the limit": r"\boxed{" + "x," * 450 + "}",
    "signs within the limit": r"\boxed{" + r"\pm" * 300 + "}",
    "spaces within the limit": r"\boxed{1" + " " * 900 + "x}",
    "commas within the limit": r"\boxed{" + "1,222" * 190 + "}",
    "a tower": r"\boxed{9^{9^{9^{9^{9}}}}}",
    "stars": r"\boxed{9**9**9**9}",
    "a large power": r"\boxed{7^{123456789}+x}",
    "an exponent": r"\boxed{1e999999999}",
    "a polynomial": r"\boxed{(a+b+c+d+e+f+g+h)^{400}-1}",
    "NUL": "\\boxed{7\0}",
    "lone surrogates": "\\boxed{\ud83d\udc00+x}",
    "controls": "\\boxed{" + "".join(map(chr, range(32))) + "}",
    "code": r"\boxed{__import__('os').system('exit')}",
    "foreign digits": "\\boxed{٣}",
    "superscripts": "\\boxed{²}",
}


@needs_math
def test_a_hostile_text_ends_in_a_grade_within_5_seconds_in_any_thread(monkeypatch):
    limit = 5 - grading.SECONDS + 0.5
    monkeypatch.setattr(grading, "SECONDS", 0.5)  # what hangs does so for ever
    failures = []

    def work(answer, rule, names):
        for name in names:
            for kind in ("integer", "math", "boxed") if rule == "default" else ("math",):
                grade("math", r"\boxed{2(x+1)}", "2x+2")  # so that a process stands: its start is not this text's doing
                begun = time.monotonic()
                try:
                    found = grade(kind, HOSTILE[name], answer, rule)
                except BaseException as error:
                    found = error
                if getattr(found, "correct", None) is not False or time.monotonic() - begun > limit:
                    failures.append((name, kind, rule, time.monotonic() - begun, found))

    threads = [
        threading.Thread(target=work, args=(r"\sqrt{2}+x", "default", [*HOSTILE])),
        threading.Thread(target=work, args=("5", "official", [*HOSTILE][::-1])),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_math
def test_a_comparison_that_hangs_says_so_and_harms_no_other(monkeypatch):
    monkeypatch.setattr(grading, "SECONDS", 1)
    assert grade("math", HOSTILE["a large power"], r"\sqrt{2}+x").note == "the comparison needs more time"
    assert grade("math", r"\boxed{2(x+1)}", "2x+2").correct


@needs_math
def test_a_slow_start_costs_no_answer(monkeypatch, tmp_path):
    program = Path(grading.__file__).with_name("symbolic.py").read_text(encoding="utf-8")
    program = f"import time\ntime.sleep({grading.SECONDS + 1})\n{program}"
    (tmp_path / "symbolic.py").write_text(program, encoding="utf-8")
    monkeypatch.setattr(grading, "__file__", str(tmp_path / "grading.py"))
    found = []
    thread = threading.Thread(  # a new thread has no process yet
        target=lambda: found.append(grade("math", r"\boxed{(2(x+1),2(y+1),2(z+1))}", "(2x+2,2y+2,2z+2)"))
    )
    thread.start()
    thread.join()
    assert found[0].correct


@needs_math
def test_the_benchmarks_answers_take_a_minute_at_most():
    begun = time.monotonic()
    for name in COUNT:
        for kind, answer in answers(name):
            assert grade(kind, rf"\boxed{{{answer}}}", answer).correct
    assert time.monotonic() - begun < 60


OFFICIAL_ONLY = [  # (kind, right answer, text) that the published rule finds right
    ("integer", "5", "So the total is 5."), ("integer", "5", r"<think>\boxed{5}</think>"),
    ("integer", "5", r"\boxed{500}"), ("math", "(1,2)", r"\boxed{[1,2]}"), ("math", r"\frac{1}{2}", r"\boxed{0.50004}"),
    ("math", r"\frac{\sqrt{2}}{2}", r"\boxed{0.70711}"),
]  # fmt: skip
DEFAULT_ONLY = [("math", "1,-2", r"\boxed{-2,1}"), ("math", r"1 \pm \sqrt{19}", r"\boxed{1-\sqrt{19}, 1+\sqrt{19}}")]


@needs_math
def test_where_the_published_rule_differs():
    for kind, answer, text in OFFICIAL_ONLY:
        assert (grade(kind, text, answer, "official").correct, grade(kind, text, answer).correct) == (True, False), text
    for kind, answer, text in DEFAULT_ONLY:
        assert (grade(kind, text, answer, "official").correct, grade(kind, text, answer).correct) == (False, True), text
    for answer in ("7", "-5", "0.05001", "55"):
        assert not grade("integer", rf"\boxed{{{answer}}}", "5", "official").correct


@needs_math
@pytest.mark.parametrize("name", ["built-in", *COUNT])
def test_both_rules_find_the_benchmarks_answers_right(name):
    differ = [
        (answer, rule)
        for kind, answer in answers(name)
        for rule in ("default", "official")
        if not grade(kind, rf"So \boxed{{{answer}}}.", answer, rule).correct
    ]
    assert differ == []


def test_what_is_refused():
    with refused("kind is 'maths'; allowed: integer, math, boxed", ConfigError):
        grade("maths", "", "")
    with refused("rule is 'strict'; allowed: default, official", ConfigError):
        grade("math", "", "", "strict")


def test_what_needs_math_verify_says_so(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for kind, rule in (("math", "default"), ("math", "official"), ("integer", "official")):
        with refused("grading needs math-verify (pip install 'skipkv[eval]')", BackendError):
            grade(kind, r"\boxed{5}", "5", rule)
    assert grade("integer", r"\boxed{5}", "5").correct and grade("boxed", r"\boxed{5}", "5").correct


@pytest.mark.parametrize("text, right", [
    (r"\boxed{ab}", True), (r"\boxed{ ab }", True), (r"\boxed{b} \boxed{ab}", True), (r"\boxed{ab} \boxed{b}", False),
    (r"\boxed{ab} \boxed{{b}}", True), (r"\boxed{AB}", False), (r"\boxed{}", False), ("ab", False), ("", False),
])  # fmt: skip
def test_an_exact_answer_is_that_of_the_last_box_without_braces(text, right):
    assert grade("boxed", text, "ab").correct == right
