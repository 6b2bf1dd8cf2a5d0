"""Eviction methods: frozen dataclasses made from the core's own table, so that names, defaults and ranges exist once.

skipkv.RKV(budget=1024, mix=0.07) == skipkv.parse_method("rkv:budget=1024,mix=0.07")
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields, make_dataclass, replace
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from skipkv import _skipkv
from skipkv.checks import CONSTANTS, array_of, flag, is_a, items, many, one_of, plain, shown, wrong
from skipkv.errors import ConfigError

TABLE, PARAMETERS = _skipkv.methods()
CLASS_NAMES = {"full": "Full", "streaming": "Streaming", "h2o": "H2O", "h2o-last": "H2OLast", "tova": "TOVA",
               "snapkv": "SnapKV", "knorm": "KNorm", "keydiff": "KeyDiff", "rkv": "RKV", "skipkv": "SkipKV",
               "random": "Random", "blend": "Blend"}  # fmt: skip

# Bits of csrc/policies.h: what a method is and needs, and what a custom score may ask for.
BITS: dict[str, int] = CONSTANTS["needs"]
SUMS, SHARED, COMPACTS = BITS["sums"], BITS["shared"], BITS["compacts"]
NEEDS = {"queries": BITS["queries"], "sums": SUMS, "penalties": BITS["penalty"], "importance": BITS["importance"],
         "redundancy": BITS["redundancy"]}  # fmt: skip

SHARED_PARAMETERS = ("protect", "allocate", "evict", "compat")  # of every method

# Deviations of the released code, each a bit.
COMPAT: dict[str, int] = CONSTANTS["compat"]
SENTENCE_COMPAT = ("latest-flag", "empty-sentences", "prompt-marker", "thoughts-anywhere", "thoughts-on-grid",
                   "steer-prompt-end")  # fmt: skip
# What "official" means for each method: SkipKV's code for itself; the baselines' code leaves slots in order of score.
OFFICIAL = {"skipkv": ("pairs", "lost-heads"), "rkv": ("score-order",), "snapkv": ("score-order",),
            "h2o-last": ("score-order",)}  # fmt: skip


def _compat(value: Any) -> tuple[str, ...]:
    """What a ``compat`` argument names; ConfigError for what is called nothing."""
    named = () if value is None else tuple(many(value))
    for name in named:
        if not isinstance(name, str) or (name != "official" and name not in COMPAT):
            raise wrong("compat", name, f"None, 'official' or some of {', '.join(COMPAT)}")
    return named


def compat_names(method: str, compat: str | Iterable[str] | None) -> tuple[str, ...]:
    """The deviations that a ``compat`` argument names, ``"official"`` spelled out; ConfigError for unknown ones."""
    names: list[str] = []
    for name in _compat(compat):
        names += [*SENTENCE_COMPAT, *OFFICIAL.get(method, ())] if name == "official" else [name]
    return tuple(dict.fromkeys(names))


def compat_bits(method: str, compat: str | Iterable[str] | None) -> int:
    return sum(COMPAT[name] for name in compat_names(method, compat))


def _budget(value: Any) -> Any:
    """An int, or nested tuples of them for [n_layers] or [n_layers, n_kv_heads]; hashable, one form for one meaning."""
    array = array_of(value)
    whole = array is not None and bool(((array == np.rint(array)) & (array < 2**31) & (array > -(2**31))).all())
    if not whole or array.ndim > 2 or array.size == 0:
        raise wrong("budget", value, "an integer, or integers [n_layers] or [n_layers, n_kv_heads]")
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.size == 1:
        return int(array.reshape(()))
    return tuple(int(x) if array.ndim == 1 else tuple(map(int, x)) for x in array)


def _protect(value: str) -> tuple[int, bool]:
    """(positions below this number, and the prompt) that are kept outright. Parts may be joined by ``+``."""
    first, prompt = 0, False
    for part in value.split("+") if isinstance(value, str) else [""]:
        sinks = re.fullmatch(r"sinks:(\d{1,9})", part)
        if sinks:
            first = max(first, int(sinks[1]))
        elif part == "prompt":
            prompt = True
        elif part != "none":
            raise wrong("protect", value, "none, prompt, sinks:N")
    return first, prompt


@dataclass(frozen=True)
class Method:
    """Base of all eviction methods; `skipkv.methods.CLASSES` maps names to classes.

    Parameters
    ----------
    protect : str
        Slots kept outright besides the newest: ``"none"``, ``"prompt"``, ``"sinks:N"`` (positions below N).
    allocate : "head" or "layer"
        ``"layer"``: the heads of a layer share their budgets, given out by score over all of them (Ada-KV, METHOD §5).
    evict : bool
        False: score and trace, but drop nothing (the kept sets are virtual).
    compat : None, "official" or names
        Deviations of the released code to reproduce, all or one by one (`skipkv.methods.COMPAT`). Not reproduced are
        its left pads in the cache, its one compaction counter for a batch, and bfloat16 similarities.

    Raises
    ------
    ConfigError
        A parameter is out of range; the message names it, its value and what is allowed.
    """

    name: ClassVar[str]

    protect: str = field(default="none", kw_only=True)
    allocate: str = field(default="head", kw_only=True)
    evict: bool = field(default=True, kw_only=True)
    compat: Any = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if "budget" in self._parameters():
            object.__setattr__(self, "budget", _budget(self.budget))
        named = _compat(self.compat)
        object.__setattr__(self, "compat", "official" if named == ("official",) else named or None)
        flag("evict", self.evict)
        one_of("allocate", self.allocate, ("head", "layer"), str)
        for name in [name for name in self._parameters() if name != "budget"]:
            value, p = getattr(self, name), PARAMETERS[name]
            if not is_a(value, (int, float, np.integer, np.floating)):
                raise wrong(name, value, "a number")
            if abs(value) > 2**63:  # more than the core can be asked about
                raise wrong(name, value, f"numbers from {plain(p['low'])} to {plain(p['high'])}")
            if p["kind"] != "f" and value == value // 1:
                object.__setattr__(self, name, int(value))
        _skipkv.check_method(self.as_dict(None), 0)

    @classmethod
    def _parameters(cls) -> list[str]:
        return TABLE[cls.name]["parameters"].split()

    @property
    def needs(self) -> int:
        """Bits of `BITS`."""
        return _skipkv.method_needs(self.as_dict(None))

    @property
    def compacts(self) -> bool:
        """Whether it ever drops anything."""
        return bool(self.needs & COMPACTS)

    def as_dict(self, shape: tuple[int, int] | None) -> dict[str, Any]:
        """As the core takes it; shape (n_layers, n_kv_heads) of the model, None for the budget's own."""
        values: dict[str, Any] = {"name": self.name, "protect": _protect(self.protect),
                                  "allocate": self.allocate, "evict": self.evict,
                                  "compat": compat_bits(self.name, self.compat)}  # fmt: skip
        for name in self._parameters():
            values[name] = getattr(self, name)
        if "budget" in values:
            budget = np.array(values["budget"], np.int64)
            budget = budget.reshape(-1, 1) if budget.ndim < 2 else budget
            most = CONSTANTS["max_budget"]
            if budget.max() > most or budget.min() < 1:
                worst = budget.max() if budget.max() > most else budget.min()
                raise ConfigError(f"budget is {worst}; allowed: integers from 1 to {most}")
            if shape is not None:
                # One number, or as many rows as layers: a row of heads is no layer's but where there is one.
                if budget.size > 1 and budget.shape not in ((shape[0], 1), shape):
                    found = list(np.shape(self.budget))
                    raise ConfigError(
                        f"budget: expected a number, [{shape[0]}] or [{shape[0]}, {shape[1]}], found shape {found}"
                    )
                budget = np.broadcast_to(budget, shape)
            values["budget"] = np.ascontiguousarray(budget, np.int32)
        return values

    def check_prompt(self, n_prompt: int, reserve: int = 0) -> None:
        """Refuse a prompt that this method's protection and budget cannot hold."""
        _skipkv.check_method(self.as_dict(None), n_prompt, reserve)

    def with_(self, **changes: Any) -> "Method":
        """A copy with some parameters changed."""
        allowed = [*self._parameters(), *SHARED_PARAMETERS]
        unknown = [name for name in changes if name not in allowed]
        if unknown:
            raise ConfigError(f"{self.name} has no parameter {unknown[0]!r}; allowed: {', '.join(allowed)}")
        return replace(self, **changes)

    def __str__(self) -> str:
        """As `parse_method` reads it, but a score is its name; defaults are left out, arrays of budgets written out."""
        parts = []
        for f in fields(self):
            value = getattr(self, f.name)
            if f.init and f.repr and (f.default is MISSING or value != f.default):
                value = getattr(value, "__name__", value)
                rows = value if isinstance(value, tuple) else (value,)
                text = "/".join("+".join(map(str, row)) if isinstance(row, tuple) else str(row) for row in rows)
                parts.append(f"{f.name}={text}")
        return ":".join([self.name, ",".join(parts)] if parts else [self.name])


def _make(name: str) -> type[Method]:
    row = TABLE[name]
    columns: list[Any] = []
    doc = [f"{row['summary']}.", "", "Parameters", "----------"]
    for parameter in row["parameters"].split():
        p = PARAMETERS[parameter]
        kind = "float" if p["kind"] == "f" else "int"
        required = p["default"] is None
        columns.append((parameter, kind) if required else (parameter, kind, field(default=p["default"], kw_only=True)))
        default = "" if required else f", default {p['default']}"
        odd = "odd, " if p["kind"] == "o" else ""
        doc += [f"{parameter} : {kind}", f"    {p['summary']} ({odd}{plain(p['low'])} to {plain(p['high'])}{default})."]
    doc += [", ".join(SHARED_PARAMETERS), "    See `skipkv.Method`."]
    made = make_dataclass(
        CLASS_NAMES[name], columns, bases=(Method,), frozen=True, namespace={"name": name, "__module__": __name__}
    )
    made.__doc__ = "\n".join(doc)
    return made


CLASSES: dict[str, type[Method]] = {name: _make(name) for name in CLASS_NAMES}
Full, Streaming, H2O, H2OLast, TOVA, SnapKV, KNorm, KeyDiff, RKV, SkipKV, Random, Blend = CLASSES.values()


@dataclass(frozen=True)
class Custom(Method):
    """A score of your own, in Python.

    Parameters
    ----------
    score : callable
        ``score(c) -> float array [c.n_candidates]``, higher is kept, called for every KV head of a compaction with
        ``c.keys`` [L, head_dim], ``c.positions`` [L], ``c.n_candidates`` (the L slots less the newest ``window``),
        ``c.layer``, ``c.head`` and what ``needs`` names. The arrays are the function's to keep.
    budget : int or array
        Slots that a KV head keeps.
    needs : sequence of str
        Of ``"queries"`` (``c.queries`` [group, <= window, head_dim], oldest first), ``"penalties"`` (λ of each slot's
        sentence [L]), ``"sums"`` (attention received [L]), ``"importance"`` [n_candidates], ``"redundancy"`` [L].
    interval, window, tau
        As for the other methods.

    Raises
    ------
    ConfigError
        Also during a run: the score has the wrong shape or holds NaN. What ``score`` raises ends the run and passes
        through.
    """

    name: ClassVar[str] = "custom"

    score: Callable[[SimpleNamespace], Any]
    budget: Any
    needs_: Sequence[str] = field(default=(), kw_only=True, repr=False)
    interval: int = field(default=PARAMETERS["interval"]["default"], kw_only=True)
    window: int = field(default=PARAMETERS["window"]["default"], kw_only=True)
    tau: float = field(default=PARAMETERS["tau"]["default"], kw_only=True)

    def __init__(self, score: Callable, needs: Sequence[str] = (), *, budget: Any, **parameters: Any) -> None:
        if not callable(score):
            raise wrong("score", score, "a function")
        needed = items(needs)
        for name in [needs] if needed is None else needed:
            if needed is None or not isinstance(name, str) or name not in NEEDS:
                raise wrong("needs", name, f"some of {', '.join(NEEDS)}")
        values = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        for name in parameters:
            if name not in values or name == "needs_":
                raise ConfigError(f"custom has no parameter {name!r}; allowed: {', '.join(self._parameters())}")
        for name, value in (values | parameters | {"score": score, "budget": budget, "needs_": tuple(needed)}).items():
            object.__setattr__(self, name, value)
        self.__post_init__()

    def as_dict(self, shape: tuple[int, int] | None) -> dict[str, Any]:
        function = self.score
        extra = {
            "score": lambda values: function(SimpleNamespace(**values)),
            "needs": sum(NEEDS[name] for name in set(self.needs_)),
        }
        return super().as_dict(shape) | extra

    def with_(self, **changes: Any) -> "Custom":
        values = {
            name: getattr(self, name)
            for name in ("score", "budget", "interval", "window", "tau", *SHARED_PARAMETERS)
        }
        return Custom(**(values | {"needs": self.needs_} | changes))


def parse_method(method: str | Method | None) -> "Method":
    """A method from its string, ``"name:parameter=value,…"``; a `Method` is returned as it is, None is ``full``.

    Budgets of layers are written with slashes, ``"rkv:budget=512/256/128/128"``, those of a layer's heads with plus
    signs: ``"rkv:budget=64+32/32+16"``.
    """
    if method is None:
        return Full()
    if isinstance(method, Method):
        return method
    if not isinstance(method, str):
        raise wrong("method", method, "a method or its string")
    name, _, text = method.partition(":")
    if name not in CLASSES:
        raise wrong("method", name, ", ".join(CLASSES))
    allowed = [*TABLE[name]["parameters"].split(), *SHARED_PARAMETERS]
    values: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or key not in allowed or key in values:
            what = "is given twice" if key in values else "is no parameter of it" if equals else "has no value"
            raise ConfigError(f"method {shown(method)}: {shown(key)} {what}; allowed: {', '.join(allowed)}")
        values[key] = _parse_value(key, value)
    if "budget" in allowed and "budget" not in values:
        raise ConfigError(f"method {method!r}: {name} needs a budget")
    return CLASSES[name](**values)


def _parse_value(key: str, text: str) -> Any:
    if key in ("protect", "allocate"):
        return text
    if key == "evict":
        if text.lower() not in ("true", "false"):
            raise wrong("evict", text, "False, True")
        return text.lower() == "true"
    if key == "compat":
        names = tuple(text.split("/"))
        return names[0] if names == ("official",) else names
    try:
        if key == "budget" and ("/" in text or "+" in text[1:]):
            rows = [tuple(int(x) for x in row.split("+")) for row in text.split("/")]
            return tuple(row[0] if len(row) == 1 else row for row in rows)
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError:
        raise wrong(key, text, "a number") from None
