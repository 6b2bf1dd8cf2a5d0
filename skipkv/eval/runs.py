"""The methods of an evaluation: as they are asked for, named, and written down with all that their texts depend on."""

from __future__ import annotations

import hashlib
import inspect
import re
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from skipkv.checks import many, wrong
from skipkv.errors import ConfigError
from skipkv.methods import Custom, Method, parse_method
from skipkv.steering import Steering, describe_run, parse_run

SHARE = re.compile(r"budget=(\d+(?:\.\d+)?)%")
ANY = 1 << 20  # a budget that holds whatever is protected, until a share is known
FIRST_CAP = 4096  # of the full cache, where a task's cap depends on its texts


@dataclass(eq=False)
class MethodRun:
    """One method of an evaluation.

    Attributes
    ----------
    method, steering
    share : float or None
        Its budget as a share of the full cache's mean length.
    line : dict or None
        What stands in ``runs.jsonl``; None until budget and cap are known.
    cap : int
        New tokens at most.
    """

    method: Method
    steering: Steering | None
    share: float | None = None
    line: dict[str, Any] | None = None
    cap: int = FIRST_CAP

    @property
    def name(self) -> str:
        name = describe_run(self.method, self.steering)
        if self.share is None:
            return name
        budget = f"budget={self.method.budget}"
        return name.replace(budget, f"{budget} ({100 * self.share:g} %)", 1)


def parse_methods(methods: Any) -> list[MethodRun]:
    """What `evaluate` is asked for, one by one."""
    runs = []
    for one in many(methods):
        method, steering = one if isinstance(one, tuple) and len(one) == 2 else (one, None)
        parts = [t.strip() for t in method.split(";") if t.strip()] if isinstance(method, str) else [method]
        runs += [_parse(part, steering) for part in parts]
    if not runs:
        raise wrong("methods", methods, 'methods separated by ";"')
    return runs


def _parse(text: str | Method, vector: Steering | None) -> MethodRun:
    if not isinstance(text, str):
        return MethodRun(parse_method(text), vector)
    found = SHARE.search(text)
    method, steering = parse_run(SHARE.sub(f"budget={ANY}", text, count=1) if found else text)
    share = float(found[1]) / 100 if found else None
    if share is not None and not 0 < share <= 1:
        raise ConfigError(f"budget is {found[1]}%; allowed: shares of the full cache's mean length up to 100%")
    return MethodRun(method, vector or steering, share)


def parameters(method: Method) -> dict[str, Any]:
    """Every parameter of a method, those at their defaults too; of a score its source, but not what it closes over."""
    values = {f.name: getattr(method, f.name) for f in fields(method)}
    if isinstance(method, Custom):
        score = method.score
        values["score"] = getattr(score, "__qualname__", type(score).__qualname__)
        with suppress(OSError, TypeError):
            values["source"] = inspect.getsource(score)
    return {"name": method.name} | values


def steering_text(steering: Steering | None) -> str | None:
    """All of a steering, its vector by its hash."""
    if steering is None:
        return None
    values = steering.describe() | {"sha256": hashlib.sha256(steering.vector.tobytes()).hexdigest()}
    return "steer:" + ",".join(f"{name}={value}" for name, value in values.items())
