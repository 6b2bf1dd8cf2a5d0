"""The one place that checks a number, a choice, an array: what is wrong is named, with what is allowed."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from typing import Any

import numpy as np

from skipkv import _skipkv
from skipkv.errors import ConfigError

CONSTANTS: dict[str, Any] = _skipkv.constants()  # limits, bits and names of the core

INT_MAX = 2**31 - 1
POSITION_MAX = (1 << 30) - 1


def plain(value: float) -> str:
    """A number as people write it: whole ones without a point or an exponent."""
    return str(int(value)) if value == value // 1 else f"{value:g}"


def integer(name: str, value: Any, low: int = 0, high: int | None = INT_MAX) -> int:
    """The value as an int; ConfigError outside of low … high."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < low or (high is not None and value > high):
        most = "" if high is None else f" to {high}"
        raise ConfigError(f"{name} is {value!r:.80}; allowed: integers from {low}{most}")
    return int(value)


def number(name: str, value: Any, low: float, high: float, allowed: str | None = None) -> float:
    """The value as a float; ConfigError outside of low … high."""
    if isinstance(value, bool) or not isinstance(value, Real) or not low <= value <= high:  # NaN compares false
        raise ConfigError(f"{name} is {value!r:.80}; allowed: {allowed or f'numbers from {low} to {high}'}")
    return float(value)


def pair(name: str, value: Any, high: int = INT_MAX) -> tuple[int, int]:
    """Two integers from 0 to high."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"{name} is {value!r:.80}; allowed: two integers from 0")
    return integer(name, value[0], 0, high), integer(name, value[1], 0, high)


def one_of(name: str, value: Any, allowed: Iterable[Any], write: Any = repr) -> Any:
    """The value if it is one of those allowed, and of the same type: True is not 1."""
    allowed = list(allowed)
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise ConfigError(f"{name} is {value!r:.80}; allowed: {', '.join(map(write, allowed))}")
    return value


def floats(name: str, value: Any, shape: str) -> np.ndarray:
    """The value as finite float32, of as many axes as ``shape`` names, the last as long as it says."""
    try:
        if np.iscomplexobj(value):
            raise TypeError
        array = np.array(value, np.float32, order="C", ndmin=1)  # a copy: what is checked stays as it is
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: expected numbers [{shape}], found {type(value).__name__}") from None
    wanted = shape.split(", ")
    last = wanted[-1]
    if array.ndim != len(wanted) or (last.isdigit() and array.shape[-1] != int(last)):
        raise ConfigError(f"{name}: expected [{shape}], found shape {list(array.shape)}")
    if not np.isfinite(array).all():
        raise ConfigError(f"{name}: expected finite numbers, found others")
    return array


def checked(default: Any, check: Callable, *allowed: Any) -> Any:
    """A dataclass field that `check_fields` gives to ``check(name, value, *allowed)``; None stands where it may."""
    return field(default=default, metadata={"check": check, "allowed": allowed})


def check_fields(made: Any) -> None:
    """Check, and convert, the `checked` fields of a frozen dataclass."""
    for f in fields(made):
        value = getattr(made, f.name)
        if "check" in f.metadata and (value is not None or f.default is not None):
            object.__setattr__(made, f.name, f.metadata["check"](f.name, value, *f.metadata["allowed"]))
