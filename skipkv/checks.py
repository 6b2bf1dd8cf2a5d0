"""The one place that checks a number, a choice, an array: what is wrong is named, with what is allowed."""

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from skipkv import _skipkv
from skipkv.errors import ConfigError

CONSTANTS: dict[str, Any] = _skipkv.constants()  # limits, bits and names of the core

INT_MAX = 2**31 - 1
POSITION_MAX = (1 << 30) - 1
Kind = TypeVar("Kind")


def plain(value: float) -> str:
    """A number as people write it: whole ones without a point or an exponent."""
    return str(int(value)) if value == value // 1 else f"{value:g}"


def shown(value: Any) -> str:
    """A value as a message quotes it: in one line, short, whatever it is."""
    try:
        return " ".join(map(str.strip, f"{value!r:.80}".splitlines()))  # arrays have many
    except Exception:  # an integer of more digits than Python writes, or an object whose own code fails
        return f"<{type(value).__name__}>"


def wrong(name: str, value: Any, allowed: str) -> ConfigError:
    """To be raised for a value that is not allowed."""
    return ConfigError(f"{name} is {shown(value)}; allowed: {allowed}")


def is_a(value: Any, kind: type | tuple[type, ...]) -> bool:
    """Whether it is a number of this kind, Integral or Real; NumPy calls a span of time one, Python True."""
    return isinstance(value, kind) and not isinstance(value, (bool, np.timedelta64))


def integer(name: str, value: Any, low: int = 0, high: int | None = INT_MAX) -> int:
    """The value as an int; ConfigError outside of low … high."""
    if not is_a(value, Integral) or value < low or (high is not None and value > high):
        raise wrong(name, value, f"integers from {low}{'' if high is None else f' to {high}'}")
    return int(value)


def items(value: Any) -> list | None:
    """What an iterable holds; None for a text, and for what cannot be iterated."""
    try:
        found = None if isinstance(value, (str, bytes)) else iter(value)
    except Exception:  # that of its own __iter__, too
        return None
    return None if found is None else list(found)


def many(value: Any) -> list:
    """What an iterable holds; a text, or what is none, is one item itself."""
    found = items(value)
    return [value] if found is None else found


def integers(name: str, value: Any, low: int = 0, high: int | None = INT_MAX) -> list[int]:
    """One integer, or many, each of low … high."""
    return [integer(name, one, low, high) for one in many(value)]


def number(name: str, value: Any, low: float, high: float, allowed: str | None = None) -> float:
    """The value as a float; ConfigError outside of low … high."""
    try:
        found = float(value) if is_a(value, Real) else math.nan
    except OverflowError:  # an integer, or a fraction, beyond all floats
        found = math.nan
    if not low <= found <= high:  # NaN compares false
        raise wrong(name, value, allowed or f"numbers from {low} to {high}")
    return found


def pair(name: str, value: Any, high: int = INT_MAX) -> tuple[int, int]:
    """Two integers from 0 to high."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise wrong(name, value, "two integers from 0")
    return integer(name, value[0], 0, high), integer(name, value[1], 0, high)


def one_of(name: str, value: Any, allowed: Iterable[Any], write: Any = repr) -> Any:
    """The value if it is one of those allowed, and of the same type: True is not 1."""
    allowed = list(allowed)
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise wrong(name, value, ", ".join(map(write, allowed)))
    return value


def flag(name: str, value: Any) -> bool:
    return one_of(name, value, (False, True))


def no_bar(progress: Any) -> bool | None:
    """What tqdm takes as ``disable``: a bar is for a terminal, where progress is wanted."""
    return None if flag("progress", progress) else True


def instance(name: str, value: Any, kind: type[Kind]) -> Kind:
    """The value if it is of this class."""
    if not isinstance(value, kind):
        raise wrong(name, value, f"a {kind.__name__}")
    return value


def text_of(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    return value


def path_of(name: str, value: Any, allowed: str = "a path") -> Path:
    """The name of a file; ConfigError for what none can have."""
    try:
        found = os.fspath(value)
        possible = isinstance(found, str) and "\0" not in found and os.fsencode(found)
    except Exception:  # a lone surrogate, or that of its own __fspath__
        possible = False
    if not possible:
        raise wrong(name, value, allowed)
    return Path(found)


def array_of(value: Any) -> np.ndarray | None:
    """The value as an array of integers or floats, a copy, so that what is checked stays as it is; None otherwise."""
    try:
        array = np.array(value)
    except Exception:  # rows of different lengths, or that of its own __array__
        return None
    return array if array.dtype.kind in "iuf" else None


def floats(name: str, value: Any, shape: str, most: float = math.inf) -> np.ndarray:
    """The value as finite float32 up to ``most``, of as many axes as ``shape`` names, the last as long as it says."""
    array = array_of(value)
    if array is None:
        raise ConfigError(f"{name}: expected numbers [{shape}], found {type(value).__name__}")
    wanted = shape.split(", ")
    last = wanted[-1]
    if array.ndim != len(wanted) or (last.isdigit() and array.shape[-1] != int(last)):
        raise ConfigError(f"{name}: expected [{shape}], found shape {list(array.shape)}")
    with np.errstate(over="ignore"):  # refused here
        array = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(array).all():
        raise ConfigError(f"{name}: expected finite numbers, found others")
    if np.abs(array).max(initial=0) > most:
        raise ConfigError(f"{name}: expected numbers from {-most:g} to {most:g}, found others")
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
