"""HumanEval and LiveCodeBench: is the program that a text holds right?

As published: LiveCodeBench's code stands between the last two lines that hold three backticks; what it prints is
compared line by line after stripping, then as decimals; what its function returns is compared as JSON; all tests must
pass, and each may take 6 s. HumanEval's code is a whole function or the rest of the prompt's, with 6 s for ``check``.

The verdict falls where the program is not: LiveCodeBench's expected answers never enter the sandbox, and HumanEval's
``check`` runs beside the program's process, which it calls. So a program cannot declare itself right, only guess. A
result counts as the value that it is: an object of a class that the program made fails, even if it says it is equal.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import pickletools
import re
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from decimal import Decimal, InvalidOperation
from itertools import islice
from typing import Any

from tqdm import tqdm

from skipkv.checks import no_bar
from skipkv.eval.grading import answer_part
from skipkv.eval.records import Grade
from skipkv.eval.sandbox import Sandbox, Session

MOST = 1 << 29  # bytes of an item's private tests
MODULES = "string re datetime collections heapq bisect copy math random statistics itertools functools operator io sys"
PREAMBLE = "".join(f"import {name}\nfrom {name} import *\n" for name in [*MODULES.split(), "json", "typing"])
PREAMBLE += "sys.setrecursionlimit(50000)\n"
PREAMBLE += "from builtins import *\n"  # the last, or pow would be math's
AFTER = re.compile(r"^(?:(?:class|def|if|print)\b|#|```)", re.MULTILINE)  # where a completion ends, as published


def grade(item: Any, text: str, sandbox: Sandbox) -> Grade:
    """Run the program that a text holds against all tests of its item.

    Parameters
    ----------
    item : Item
        ``more`` as the datasets have it: ``entry_point`` and ``test`` of HumanEval; of LiveCodeBench
        ``public_test_cases``, ``private_test_cases`` and ``metadata``, encoded as they are.
    text : str
        What follows its last ``</think>`` counts.
    sandbox : Sandbox

    Raises
    ------
    BackendError
        The sandbox does not open; nothing else that a text or its tests hold raises.
    """
    try:
        return (_humaneval if "entry_point" in item.more else _livecodebench)(item, text, sandbox)
    except _Wrong as wrong:
        return Grade(False, note=str(wrong))


class _Wrong(Exception):
    """Why a program is not right."""


def _humaneval(item: Any, text: str, sandbox: Sandbox) -> Grade:
    entry = item.more["entry_point"]
    code = between_fences(text)
    code = answer_part(text) if code is None else code
    if not code.strip():
        raise _Wrong("no code")
    if re.search(rf"^def {re.escape(entry)}\b", code, re.MULTILINE):
        code = "\n" + code  # replaces the prompt's, which a docstring makes a function; its imports and helpers stay
    elif end := AFTER.search(code):
        code = code[: end.start()]
    with sandbox.open() as session:
        why = session.check(item.problem + code, entry, item.problem, item.more["test"]).why
    return Grade(not why, note=why)


def _livecodebench(item: Any, text: str, sandbox: Sandbox) -> Grade:
    code = between_fences(text)
    if code is None or not code.strip():
        raise _Wrong("no code")
    tests, entry = livecodebench_tests(item.more)
    with sandbox.open() as session:
        for i, test in enumerate(tests):
            if why := _fails(session, PREAMBLE + code, entry, test):
                raise _Wrong(f"test {i}: {why}")
    return Grade(True)


def _fails(session: Session, program: str, entry: str | None, test: Mapping[str, str]) -> str:
    """Why the program fails a test, or ""."""
    expected = test["output"]
    if entry is None:
        found = session.run(program, test["input"])
        return found.why or ("" if same_lines(found.output, expected) else "another output")
    found = session.call(program, entry, [json.loads(line) for line in test["input"].split("\n")])
    return found.why or ("" if found.output == json.loads(expected) else "another result")


def between_fences(text: str) -> str | None:
    """What stands between the last two lines of the answer that hold three backticks."""
    lines = answer_part(text).split("\n")
    fences = [i for i, line in enumerate(lines) if "```" in line]
    return "\n".join(lines[fences[-2] + 1 : fences[-1]]) if len(fences) > 1 else None


def same_lines(found: str, expected: str) -> bool:
    """Whether two outputs are the same line by line, stripped, as text or as decimals."""
    ours, theirs = ([line.strip() for line in text.strip().split("\n")] for text in (found, expected))
    try:
        return len(ours) == len(theirs) and all(
            a == b or [Decimal(part) for part in a.split()] == [Decimal(part) for part in b.split()]
            for a, b in zip(ours, theirs, strict=True)
        )
    except InvalidOperation:  # not decimals
        return False


def livecodebench_tests(more: Mapping[str, Any]) -> tuple[list[dict[str, str]], str | None]:
    """An item's tests, public ones first, and the function they call; None where they are input and output."""
    try:
        tests = json.loads(more["public_test_cases"] or "[]") + _private(more["private_test_cases"] or "[]")
        entry = json.loads(more.get("metadata") or "{}").get("func_name")
        if not tests or not all(isinstance(t["input"], str) and isinstance(t["output"], str) for t in tests):
            raise ValueError("no tests, or tests without input and output")
        for test in tests if entry is not None else ():
            json.loads(test["output"]), [json.loads(line) for line in test["input"].split("\n")]
        return tests, entry
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, MemoryError) as error:
        raise _Wrong(f"its tests cannot be read: {error}") from None


def _private(text: str) -> Any:
    """JSON, or base64 of zlib of a pickled JSON text."""
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        inflate = zlib.decompressobj()
        plain = inflate.decompress(base64.b64decode(text), MOST)
        if not inflate.eof:
            raise ValueError(f"cut off, or more than {MOST} bytes")
    except (zlib.error, binascii.Error) as error:
        raise ValueError(error) from None
    for operation, argument, _ in islice(pickletools.genops(plain), 4):  # PROTO, perhaps FRAME, then the text
        if operation.name.endswith(("UNICODE", "UNICODE8")):
            return json.loads(argument)
        if operation.name not in ("PROTO", "FRAME"):
            break
    raise ValueError("the pickle holds something else than a text")


def grade_all(
    programs: Iterable[tuple[Any, str]], sandbox: Sandbox, progress: bool = True
) -> Iterator[tuple[int, Grade]]:
    """Grade (item, text) pairs on all cores at hand; their places and grades, as each ends."""
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        places = {pool.submit(grade, item, text, sandbox): i for i, (item, text) in enumerate(programs)}
        try:
            ended = as_completed(places)
            quiet = no_bar(progress)
            for future in tqdm(ended, total=len(places), unit="program", desc="grade", disable=quiet):
                yield places[future], future.result()
        except BaseException:  # also where the caller wants no more
            pool.shutdown(wait=False, cancel_futures=True)
            while any(future.running() for future in places):
                sandbox.kill()
                time.sleep(0.05)
            raise
