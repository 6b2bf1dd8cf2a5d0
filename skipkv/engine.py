"""A checkpoint in memory as runs use it: core, configuration, tokenizer, threads; sessions, and what is told of a row.

ids → session → forward, chunk by chunk → Row: tokens fed, α, compactions, bytes → Recorder → Stats, Trace
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from skipkv import _skipkv, sentences
from skipkv.checks import CONSTANTS, integer, is_a, items, one_of, shown, wrong
from skipkv.errors import ConfigError, warn
from skipkv.load.checkpoint import hash_files
from skipkv.load.config import ModelConfig
from skipkv.load.template import check_variables
from skipkv.load.tokenizer import Tokenizer
from skipkv.methods import SUMS, Method, parse_method
from skipkv.results import Stats
from skipkv.steering import Steering
from skipkv.trace import Compaction, Sentence, Trace

Prompt = str | Sequence[int] | Sequence[dict]
PAGE = CONSTANTS["page"]  # slots
FORWARD_TOKENS = 512  # of one forward: long prompts are fed in chunks beside the rows that decode
DEFAULT_THREADS = 64  # at most, unless more are asked for
CGROUP = Path("/sys/fs/cgroup")
QUOTAS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))  # microseconds of computing in a period
MEMORY_MAX = 1 << 62  # bytes
CACHES = sorted(CONSTANTS["cache_dtypes"])
TRACES = (False, True, "scores")


def cpu_count() -> int:
    """Processors that this process may run on, or that its share of their time comes to."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for names in QUOTAS:
        with suppress(OSError, ValueError):  # there is no such file, or it says "max"
            quota, period = (int(n) for name in names for n in (CGROUP / name).read_text().split())
            if quota > 0:
                return min(count, -(-quota // period))
    return count


def count_threads(threads: int | None) -> int:
    """Threads that compute; all processors of this process by default, and no more, as the rest would only wait."""
    count = cpu_count()
    if threads is None:
        return min(count, DEFAULT_THREADS)
    if integer("threads", threads, 1, CONSTANTS["max_threads"]) > count:
        warn(f"threads is {threads}, but this process has {count} processor{'s' if count > 1 else ''}: {count} compute")
    return min(int(threads), count)


def trace_level(trace: Any) -> int:
    """What the core records: False nothing, True kept sets, "scores" those of every candidate, too."""
    one_of("trace", trace, TRACES)
    return CONSTANTS["trace"][trace if isinstance(trace, str) else "kept" if trace else "none"]


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(is_a(v, kind) for v in value)


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and value.dtype.kind in "iu"
    return _is_list_of(value, Integral)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or _is_ids(value) or _is_list_of(value, dict)


class Engine:
    """What a model is made of; `skipkv.Model` adds what it can do and says what the attributes are."""

    def __init__(
        self, core: _skipkv.Model, config: ModelConfig, tokenizer: Tokenizer | None, name: str,
        generation: dict[str, Any], threads: int, eos: int | list[int] | None = None, path: Path | None = None,
    ) -> None:  # fmt: skip
        self._core, self.config, self.tokenizer, self.name = core, config, tokenizer, name
        self.generation, self.threads, self._eos, self._path = generation, threads, eos, path
        self._vocabularies: dict[str, tuple] = {}
        self._said: set[str] = set()

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: {self.config.family}, {self._core.n_bytes} bytes, {self._core.variant}>"

    @property
    def dtype(self) -> str:
        """Type of the weights."""
        return self._core.dtype

    @cached_property
    def hashes(self) -> dict[str, str]:
        """SHA-256 of the checkpoint's files by name, as they are when it is first asked for; none without files."""
        return hash_files(self._path) if self._path else {}

    @property
    def stop_ids(self) -> frozenset[int]:
        """eos_token_id of generation_config.json; without it, that of config.json and the tokenizer's."""
        given = self.generation.get("eos_token_id")
        found = [given] if given is not None else [self._eos, self.tokenizer.eos_id if self.tokenizer else None]
        return frozenset(i for eos in found if eos is not None for i in (eos if isinstance(eos, list) else [eos]))

    @property
    def end_of_thinking(self) -> list[int]:
        """Ids that write ``</think>``."""
        return self.tokenizer.spell("</think>") if self.tokenizer else []

    def _vocabulary_for(self, method: Method) -> tuple | None:
        """See `skipkv.sentences.vocabulary`; delimiters and markers of the released code under compat="official"."""
        kind = "official" if method.compat == "official" else "auto"
        if self.tokenizer and kind not in self._vocabularies:
            self._vocabularies[kind] = sentences.vocabulary(self.tokenizer, kind, kind)
        return self._vocabularies.get(kind)

    @property
    def vocabulary(self) -> tuple:
        """See `skipkv.sentences.vocabulary`."""
        found = self._vocabulary_for(parse_method(None))
        if found is None:
            raise ConfigError(f"{self.name} has no tokenizer")
        return found

    def encode(self, prompt: Prompt, template: Mapping[str, Any] | None = None) -> list[int]:
        """Ids of a prompt.

        Parameters
        ----------
        prompt : text, ids or messages
            A chat's text is made by the checkpoint's own template.
        template : mapping, optional
            Variables of that template, such as ``{"enable_thinking": False}``, ``tools`` or ``documents``; for chats.

        Raises
        ------
        ConfigError
            It is none of these, or cannot be encoded; or a template's variables are malformed or not for it.
        """
        variables = {} if template is None else check_variables("template", template)
        if variables and not _is_list_of(prompt, dict):
            found = f"allowed with chat messages only, found {shown(prompt)}"
            raise ConfigError(f"template is {shown(variables)}; {found}")
        if _is_ids(prompt):
            return [int(t) for t in prompt]
        if not _is_prompt(prompt):
            raise wrong("prompt", prompt, "a text, token ids, or a list of messages")
        if self.tokenizer is None:
            raise ConfigError(f"{self.name} has no tokenizer; allowed: prompts as token ids")
        if not isinstance(prompt, str):
            return self.tokenizer.chat(prompt, **variables)
        ids = self.tokenizer.encode(prompt)
        if ids[:1] == ids[1:2]:
            plain = self.tokenizer.encode(prompt, add_special_tokens=False)
            if len(plain) < len(ids) and ids[1 : 1 + len(plain)] == plain:
                token = self.tokenizer.token_texts[ids[0]]
                self._say_once(f"the prompt begins with {token!r}, and the tokenizer adds another: leave one out")
        return ids

    def _say_once(self, text: str) -> None:
        """Warn of a likely mistake, once for this model."""
        if text not in self._said:
            self._said.add(text)
            warn(text)

    def encode_all(self, prompts: Prompt | Iterable[Prompt], template: Mapping | None = None) -> list[list[int]]:
        """Ids of one prompt or of many."""
        if _is_prompt(prompts):
            return [self.encode(prompts, template)]
        found = None if isinstance(prompts, dict) else items(prompts)
        if found is None:
            raise wrong("prompts", prompts, "a text, token ids, messages, or many of them")
        return [self.encode(prompt, template) for prompt in found]

    def check_ids(self, what: str, ids: Iterable[int]) -> None:
        """Refuse tokens that the model does not have."""
        beyond = [t for t in ids if not 0 <= t < self.config.vocab]
        if beyond:
            raise ConfigError(f"{what} holds token {shown(beyond[0])}; allowed: 0 to {self.config.vocab - 1}")

    def check_steering(self, steering: Any) -> None:
        """Refuse what is neither None nor a Steering, or does not fit the model."""
        if steering is None:
            return
        if not isinstance(steering, Steering):
            raise wrong("steering", steering, "a Steering or None")
        if len(steering.vector) != self.config.hidden:
            raise ConfigError(f"steering vector: expected shape [{self.config.hidden}], found [{len(steering.vector)}]")
        if steering.layer >= self.config.n_layers:
            raise ConfigError(f"steering layer is {steering.layer}; allowed: 0 to {self.config.n_layers - 1}")

    def _session(
        self, method: Method, cache: str, *, rows: int = 1, tokens: int = FORWARD_TOKENS, trace: int = 0,
        memory_limit: int | None = None,
    ) -> _skipkv.Session:  # fmt: skip
        """A session whose forwards take up to ``tokens`` tokens of ``rows`` rows."""
        shape = (self.config.n_layers, self.config.n_kv_heads)
        return _skipkv.Session(
            self._core, rows=rows, tokens=tokens, cache=one_of("cache", cache, CACHES), threads=self.threads,
            trace=trace, memory_limit=memory_limit or MEMORY_MAX, method=method.as_dict(shape),
            vocabulary=self._vocabulary_for(method),
        )  # fmt: skip


@dataclass(eq=False)
class Row:
    """One row of a session and what its forwards did; alphas, compactions and bytes as in `Trace`."""

    number: int  # of the session
    n_prompt: int  # tokens
    steering: Steering | None
    fed: int = 0  # tokens so far
    braked: int = 0  # token count at which the loop brake first stepped in; 0: never
    begun: float = field(default_factory=time.perf_counter)
    alphas: dict[int, float] = field(default_factory=dict)
    compactions: list[Compaction] = field(default_factory=list)
    bytes: list[tuple[int, int]] = field(default_factory=list)


def chunks(session: _skipkv.Session, row: Row, ids: np.ndarray, limit: int) -> Iterator[tuple[slice, np.ndarray]]:
    """The largest parts in which ids may be fed to a row: where each lies, and its spans; each forward before the next.

    A part ends where a compaction is due, so that the row passes the states of decoding.
    """
    first = 0
    while first < len(ids):
        n = session.chunk(row.number, min(limit, len(ids) - first))
        yield slice(first, first + n), np.array([[row.number, n]], np.int32)
        first += n


class Recorder:
    """Keeps account of a session's rows: the one place where statistics and traces are made."""

    def __init__(self, engine: Engine, session: _skipkv.Session, method: Method) -> None:
        self.engine, self.session, self.method = engine, session, method
        # Bytes of a page of one head. A full cache keeps no sums of attention: a float32 of every slot of a page.
        self.page_bytes = session.ledger()["page_bytes"]
        self.full_page_bytes = self.page_bytes - (4 * PAGE if method.needs & SUMS else 0)

    def note(self, spans: Sequence[tuple[Row, int]], steered: Sequence[tuple[int, float]]) -> None:
        """What a forward of these spans did to its rows."""
        first = 0
        for row, n in spans:
            row.alphas |= {row.fed + i - first: alpha for i, alpha in steered if first <= i < first + n}
            row.fed += n
            first += n
        by_number = {row.number: row for row, _ in spans}
        for number, step, *rest in self.session.trace():
            row = by_number[number]
            if not row.bytes or row.bytes[-1][0] != step:
                row.bytes.append((step, self.session.state(number)["live_bytes"]))
            row.compactions.append(Compaction(step, *rest))

    def stats(self, row: Row, n_tokens: int, full_length: float | None = None) -> Stats:
        """Of a row of so many tokens, prompt included."""
        state, ledger, config = self.session.state(row.number), self.session.ledger(), self.engine.config
        n_heads = config.n_layers * config.n_kv_heads
        counted = ("thinking_tokens", "answer_tokens", "live_bytes", "peak_bytes", "compactions", "evicted", "pairs",
                   "sentences", "flagged", "thoughts", "steered")  # fmt: skip
        return Stats(
            prompt_tokens=row.n_prompt, new_tokens=n_tokens - row.n_prompt, seconds=time.perf_counter() - row.begun,
            full_bytes=-(-row.fed // PAGE) * n_heads * self.full_page_bytes,
            pool_bytes=ledger["pool_bytes"], pool_peak_bytes=ledger["peak_bytes"],
            compression=state["slots"] / max(1, row.fed * n_heads),
            compression_of_full=state["slots"] / (full_length * n_heads) if full_length else None,
            braked=row.braked, **{name: state[name] for name in counted},
        )  # fmt: skip

    def trace(self, row: Row, ids: Sequence[int], **settings: Any) -> Trace:
        """Of a row of these tokens; settings: what else it was made with."""
        engine = self.engine
        texts = engine.tokenizer.token_texts if engine.tokenizer else None
        settings |= {
            "model": engine.name, "steering": row.steering.describe() if row.steering else None, "page_slots": PAGE,
            "page_bytes": self.page_bytes, "full_page_bytes": self.full_page_bytes,
        }  # fmt: skip
        return Trace(
            [int(i) for i in ids], [texts[i] if texts else str(i) for i in ids], row.n_prompt, engine.config.n_layers,
            engine.config.n_kv_heads, self.method, row.compactions,
            [Sentence(*s) for s in self.session.sentences(row.number)[0]], row.alphas, row.bytes, settings,
        )  # fmt: skip
