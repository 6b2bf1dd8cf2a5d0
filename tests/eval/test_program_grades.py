"""Grades of programs: HumanEval's own solutions and mutants of them, LiveCodeBench's rules, and programs that cheat."""

import ast
import base64
import json
import os
import pickle
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import pytest

from skipkv.eval import programs
from skipkv.eval.programs import between_fences, grade, grade_all, same_lines
from skipkv.eval.records import Grade
from skipkv.eval.sandbox import Limits, Sandbox

HUMANEVAL = Path(__file__).parents[3] / "shared/data/humaneval.jsonl"
needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not there")
pytestmark = needs_bwrap


@pytest.fixture(scope="module")
def sandbox():
    return Sandbox(limits=Limits(seconds=2))


@pytest.fixture(scope="module")
def humaneval():
    if not HUMANEVAL.exists():
        pytest.skip(f"{HUMANEVAL} is not there")
    rows = [json.loads(line) for line in HUMANEVAL.open(encoding="utf-8")]
    return [SimpleNamespace(**row, more=row) for row in rows]


def fenced(code):
    return f"So:\n```python\n{code}\n```\nDone."


def mutant(item):
    """The solution as a whole function that returns the truth value of the contrary."""
    tree = ast.parse(item.problem + item.answer)
    [function] = [node for node in tree.body if getattr(node, "name", "") == item.more["entry_point"]]
    for node in ast.walk(function):
        if isinstance(node, ast.Return) and node.value:
            node.value = ast.UnaryOp(ast.Not(), node.value)
    return ast.unparse(ast.fix_missing_locations(function))


def test_humanevals_solutions_pass_and_mutants_fail(humaneval):
    assert len(humaneval) == 164
    pairs = [(item, item.answer) for item in humaneval]
    pairs += [(item, f"<think>```\nno\n```</think>{fenced(mutant(item))}") for item in humaneval]
    grades = dict(grade_all(pairs, Sandbox(), progress=False))
    assert [(pairs[i][0].id, grades[i]) for i in range(164) if not grades[i].correct] == []
    assert [pairs[i][0].id for i in range(164, 328) if grades[i].correct] == []
    assert {grades[i].note.split(":")[0] for i in range(164, 328)} <= {"AssertionError", "TypeError"}


CHECK = """
SECRET = 'known to the check'

def check(candidate):
    assert candidate(2) == 4
    assert candidate([1]) == [1, 1]
    assert candidate(21) == 42, SECRET
"""
DOUBLE = SimpleNamespace(
    problem='import math\nHALF = 0.5\n\ndef double(x):\n    """ Twice x """\n',
    more={"entry_point": "double", "test": CHECK},
)


@pytest.mark.parametrize(
    "text, note",
    [
        ("    return 2 * x\n", None),
        ("    return int(math.floor(x / HALF)) if isinstance(x, int) else x + x\nprint(double(1", None),
        ("def double(x):\n    return 2 * x", None),
        (fenced("    return 2 * x"), None),
        (fenced("def double(x):\n    return 2 * x\nif __name__ == '__main__':\n    input()"), None),
        ("```\nno\n``` I think </think>" + fenced("import collections\ndef double(x): return 2 * x"), None),
        ("<think>" + fenced("def double(x): return 2 * x") + "</think>", "no code"),
        ("", "no code"),
        ("```python\n\n```", "no code"),
        (fenced("def double(x) return 2 * x"), "SyntaxError: "),
        ("    return 2 * x\n\n# Thus it is\nso it ends", None),
        ("    return 2 * x\n```\nIt ends.", None),
        ("    return 3 * x", "AssertionError"),
        ("    return 2 * x if x != 21 else 0", "AssertionError: known to the check"),
        ("    return x / 0", "ZeroDivisionError: division by zero"),
        ("    while True: pass", "time limit"),
        ("    return bytearray(10 << 30)", "MemoryError"),
        ("    return double(x)", "RecursionError: "),
        (fenced("def triple(x): return 2 * x"), "AssertionError"),
    ],
)
def test_humaneval(sandbox, text, note):
    found = grade(DOUBLE, text, sandbox)
    assert found == Grade(True) if note is None else not found.correct and found.note.startswith(note), found


ANY = "class Any:\n    def __eq__(self, other): return True\n    __hash__ = None\n"
CHEATS = {
    "leaves": "import os; os._exit(0)",
    "exits": "import sys; sys.exit(0)",
    "leaves when called": "import os\ndef double(x): os._exit(0)",
    "exits when called": "import sys\ndef double(x): sys.exit(0)",
    "equals all": f"{ANY}def double(x): return Any()",
    "a number that equals all": "class N(int):\n    def __eq__(self, o): return True\ndef double(x): return N()",
    "a list that equals all": f"{ANY}class L(list, Any): pass\ndef double(x): return L()",
    "replaces builtins": "import builtins\nbuiltins.AssertionError = builtins.print = builtins.compile = None\n"
    "builtins.exec = builtins.repr = lambda *_: True\ndef double(x): return 5",
    "replaces modules": "import json, pickle, sys\njson.dumps = lambda *_: '{\"output\": null}'\n"
    "pickle.loads = pickle.load = pickle.dump = lambda *_: None\nsys.modules.clear()\ndef double(x): return 5",
    "runs code in pickles": "class R:\n    def __reduce__(self):\n"
    "        return exec, (\"import sys; sys.modules['__main__'].Program.call = lambda s, x: 2 * x\",)\n"
    "def double(x): return R()",
    "changes classes": "import fractions\nclass R:\n    def __reduce__(self):\n"
    "        return (fractions.Fraction, (1,), (None, {'__eq__': list}))\ndef double(x): return R()",
    "answers itself": "import os\nfor fd in range(64):\n    try: os.write(fd, b'{\"output\": null}\\n' * 9)\n"
    "    except OSError: pass\ndef double(x): return 5",
    "answers through others": "import glob\nfor path in glob.glob('/proc/*/fd/*'):\n"
    "    try: open(path, 'w').write('{\"output\": null}\\n' * 9)\n    except OSError: pass\ndef double(x): return 5",
    "closes": "import os; os.closerange(0, 64)\ndef double(x): return 5",
    "writes modules": "for name in 'json pickle decimal collections'.split():\n"
    "    open(name + '.py', 'w').write('import os; os._exit(0)')\ndef double(x): return 5",
    "looks around": """
import gc, glob, os, sys

def known():
    frame = sys._getframe()
    while frame:
        yield from map(repr, [frame.f_locals, frame.f_globals])
        frame = frame.f_back
    yield from (str(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple, str)))
    for path in glob.glob("/proc/*/mem") + glob.glob("/proc/*/environ") + glob.glob("/proc/*/cmdline"):
        try:
            with open(path, "rb") as file:
                if path.endswith("mem"):
                    for line in open(path.replace("mem", "maps")):
                        start, end = (int(part, 16) for part in line.split()[0].split("-"))
                        file.seek(start)
                        yield repr(file.read(end - start))
                else:
                    yield repr(file.read())
        except (OSError, ValueError, OverflowError):
            pass

def double(x):
    # Joined where it is looked for, so that what is found is not the program's own.
    return 2 * x if any(" ".join(["known", "to", "the", "check"]) in text for text in known()) else 5
""",
}


@pytest.mark.parametrize("program", CHEATS.values(), ids=CHEATS)
def test_a_program_cannot_declare_itself_right(sandbox, program):
    found = grade(DOUBLE, fenced(f"def double(x): return 5\n{program}"), sandbox)
    assert not found.correct and found.note, found


def livecodebench(tests, func_name=None, private="[]", **more):
    public = json.dumps([{"input": given, "output": expected, "testtype": "stdin"} for given, expected in tests])
    metadata = json.dumps({"func_name": func_name} if func_name else {})
    more = {"public_test_cases": public, "private_test_cases": private, "metadata": metadata} | more
    return SimpleNamespace(problem="Add.", more=more)


ADD = [("1 2\n", "3\n"), ("10 20", "30"), ("0.5 1", "1.5")]
READ = "a, b = map(float, input().split())\n"


@pytest.mark.parametrize(
    "program, note",
    [
        (READ + "print(a + b)", None),
        (READ + "print(f'  {a + b:.3f}  \\n\\n')", None),
        ("def main():\n    x, y = input().split()\n    print(Decimal(x) + Decimal(y) if 0 else float(x) + float(y))\n"
         "if __name__ == '__main__':\n    main(); exit(1)", None),
        ("print(sum(map(float, stdin.read().split())), flush=True); os = pow(2, 3, 5); assert os == 3", None),
        (READ + "print(a + b if a < 10 else 0)", "test 1: another output"),
        (READ + "print(a + b, 'x')", "test 0: another output"),
        (READ + "print(a + b); print(1)", "test 0: another output"),
        (READ + "print(a + b if a < 10 else a / 0)", "test 1: ZeroDivisionError: float division by zero"),
        (READ + "print(a + b)\nif a == 0.5: import os; os.kill(os.getpid(), 9)", "test 2: ended by signal 9"),
        (READ + "while a > 1: pass\nprint(a + b)", "test 1: time limit"),
        ("while True: print('3' * 100000)", "test 0: OSError"),
        ("print(3", "test 0: SyntaxError"),
        ("", "no code"),
    ],
)  # fmt: skip
def test_livecodebench_programs(sandbox, program, note):
    found = grade(livecodebench(ADD), fenced(program), sandbox)
    assert found == Grade(True) if note is None else not found.correct and found.note.startswith(note), found


@pytest.mark.parametrize(
    "program, note",
    [
        ("class Solution:\n    def gcd(self, xs: List[int], k):\n        return [x + k for x in xs]", None),
        ("def gcd(xs, k):\n    return tuple(x + k for x in xs)", None),
        ("def gcd(xs, k):\n    print('debugging'); return [float(x + k) for x in xs]", None),
        ("import numpy\ndef gcd(xs, k): return [x + k for x in xs[:1]] + [x + k for x in xs[1:]]\ninput = None", None),
        ("def gcd(xs, k): return [x + k for x in xs] if k else []", "test 1: another result"),
        ("def gcd(xs, k): return {x + k for x in xs}", "test 0: TypeError: Object of type set"),
        ("def gcd(xs, k): return (x + k for x in xs)", "test 0: TypeError"),
        ("def gcd(xs): return xs", "test 0: TypeError"),
        ("def gcd(xs, k): exit(0)", "test 0: ended before it returned"),
        ("class Solution:\n    def lcm(self, xs, k): return xs", "test 0: TypeError"),
    ],
)
def test_livecodebench_functions(sandbox, program, note):
    item = livecodebench([("[1, 2]\n3", "[4, 5]"), ("[7]\n0", "[7]"), ("[]\n0", "[]")], "gcd")
    found = grade(item, fenced(program), sandbox)
    assert found == Grade(True) if note is None else not found.correct and found.note.startswith(note), found


def packed(pickled):
    return base64.b64encode(zlib.compress(pickled)).decode()


PRIVATE = json.dumps([{"input": "5 5", "output": "10", "testtype": "stdin"}])


class Reduced:
    def __reduce__(self):
        return os.mkdir, ("/tmp/skipkv-was-here",)


@pytest.mark.parametrize("encoded", [PRIVATE, *(packed(pickle.dumps(PRIVATE, protocol)) for protocol in range(6))])
def test_private_tests_count(sandbox, encoded):
    item = livecodebench(ADD, private=encoded)
    assert grade(item, fenced(READ + "print(a + b)"), sandbox).correct
    found = grade(item, fenced(READ + "print(a + b if a != 5 else 0)"), sandbox)
    assert found == Grade(False, note="test 3: another output")


@pytest.mark.parametrize(
    "encoded",
    [
        packed(pickle.dumps(Reduced())),
        packed(pickle.dumps([Reduced()])),
        packed(b"cos\nsystem\n(S'touch /tmp/skipkv-was-here'\ntR."),
        packed(b"\x80\x04" + b"r\xff\xff\xff\xff" + b"N."),
        packed(pickle.dumps("[[" * 100000)),
        packed(pickle.dumps(PRIVATE)[:-20]),
        packed(b"\0" * (2 << 20)),
        packed(pickle.dumps(json.dumps([{"input": "x" * (2 << 20), "output": ""}]))),
        packed(pickle.dumps(PRIVATE))[:-8],
        packed(b""),
        "eJw=",
        "no base64 é",
        "{}",
        '[{"input": 3, "output": "4"}]',
        '[{"input": "3"}]',
        "[3]",
    ],
)
def test_private_tests_that_lie_are_that_items_failure(sandbox, monkeypatch, encoded):
    monkeypatch.setattr(programs, "MOST", 1 << 20)
    found = grade(livecodebench(ADD, private=encoded), fenced(READ + "print(a + b)"), sandbox)
    assert not found.correct and found.note.startswith("its tests cannot be read: ")
    assert not Path("/tmp/skipkv-was-here").exists()


def test_an_item_without_tests_is_not_passed(sandbox):
    assert "no tests" in grade(livecodebench([]), fenced("print(1)"), sandbox).note
    assert "cannot be read" in grade(livecodebench(ADD, metadata="[]"), fenced("print(1)"), sandbox).note


def test_between_the_last_two_fences():
    assert between_fences("a\n```py\nb\n```\nc\n ```\nd\n\ne\n```") == "d\n\ne"
    assert between_fences("```\na") is None and between_fences("a") is None


@pytest.mark.parametrize(
    "found, expected, same",
    [
        ("a\n b \n", "a\nb", True),
        ("1.0 2", "1 2.00", True),
        ("1e2", "100", True),
        ("1\n\n2", "1\n2", False),
        ("1 2", "12", False),
        ("yes", "YES", False),
        ("1 x", "1.0 x", False),
        ("nan", "NaN", False),
        ("snan", "1", False),
        ("", "", True),
        ("0", "", False),
    ],
)
def test_lines(found, expected, same):
    assert same_lines(found, expected) is same


def test_who_wants_no_more_grades_ends_the_programs(sandbox):
    """Each place comes once; the first ends, the others are ended."""
    endless = Sandbox(limits=Limits(seconds=60))
    texts = ["    return 2 * x", *["    while True: pass"] * 9]
    grades = grade_all([(DOUBLE, text) for text in texts], endless, progress=False)
    assert next(grades) == (0, Grade(True))
    grades.close()
    assert not endless._running
    texts = ["    return 2 * x", "    return x"] * 4
    graded = dict(grade_all([(DOUBLE, text) for text in texts], sandbox, progress=False))
    assert [graded[i].correct for i in range(8)] == [True, False] * 4
