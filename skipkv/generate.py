"""Continuous batching over the core's session: requests wait, rows run, a finished row's place is taken at once.

prompts × samples → queue → rows (open, or fork a prefilled prompt) → forward → sample → text → Generation
"""

from __future__ import annotations

import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from skipkv import _skipkv
from skipkv.errors import BackendError, CapacityError, ConfigError
from skipkv.methods import SUMS, Method
from skipkv.steering import Steering
from skipkv.trace import Compaction, Trace

if TYPE_CHECKING:
    from skipkv.checkpoint import ModelConfig
    from skipkv.model import Model

PAGE = 64  # slots
FORWARD_TOKENS = 512  # of one forward: long prompts are fed in chunks beside the rows that decode


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Parameters
    ----------
    temperature : float
        0: greedy, ties to the lower id.
    top_k : int
        Only the k most likely; 0: all.
    top_p : float
        The fewest most likely tokens that hold this share of the probability; 1: all.
    min_p : float
        Tokens at least this likely relative to the most likely one; 0: all.
    seed : int
        Draws depend on it, the prompt's index, the sample's index and the position; never on the batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, kinds, low, high in (
            ("temperature", Real, 0, 1000), ("top_k", Integral, 0, 2**31 - 1), ("top_p", Real, 0, 1),
            ("min_p", Real, 0, 1), ("seed", Integral, 0, 2**64 - 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
                what = "integers" if kinds is Integral else "numbers"
                raise ConfigError(f"{name} is {value!r}; allowed: {what} from {low} to {high}")
            object.__setattr__(self, name, int(value) if kinds is Integral else float(value))


@dataclass
class Stats:
    """Counts of one generation. Bytes are of the key/value cache.

    Attributes
    ----------
    prompt_tokens, new_tokens : int
    thinking_tokens, answer_tokens : int
        Fed inside ``<think> … </think>``, and after it; the last new token is not fed.
    seconds : float
        From the row's opening to its end; rows of a batch share the machine.
    live_bytes, peak_bytes, full_bytes : int
        Of this row: at its end, at most, and what a full cache of its length would take.
    pool_bytes, pool_peak_bytes : int
        Of the whole run: set aside, and most in use, when this row ended.
    compactions, evicted : int
        Compactions of the row; slots dropped over all layers and heads.
    pairs : int
        Pairs of keys that the redundancy score looked at.
    compression : float
        Slots held at the end as a share of those that a full cache of this row's length holds.
    compression_of_full : float or None
        The same against the length ``full_length`` given to the run.
    sentences, flagged, thoughts : int
        Finished sentences; those that a later one repeats; N_o, re-checking ones while thinking.
    steered : int
        Tokens that were steered.
    braked : int
        Token count at which the loop brake first stepped in; 0: never.
    """

    prompt_tokens: int
    new_tokens: int
    thinking_tokens: int
    answer_tokens: int
    seconds: float
    live_bytes: int
    peak_bytes: int
    full_bytes: int
    pool_bytes: int
    pool_peak_bytes: int
    compactions: int
    evicted: int
    pairs: int
    compression: float
    compression_of_full: float | None
    sentences: int
    flagged: int
    thoughts: int
    steered: int
    braked: int = 0


@dataclass
class Generation:
    """One finished (or interrupted) text.

    Attributes
    ----------
    text : str
        The new text, special tokens left out; a stop string and what follows it too.
    tokens : list of int
        The new tokens, the stop token included.
    finish_reason : str
        ``"stop"`` (stop id or string), ``"length"`` (max_new_tokens), ``"context"`` (the model's context is full),
        ``"interrupted"``.
    prompt_tokens : list of int
    prompt, sample : int
        Indices: which prompt of the call, which of its ``n`` samples.
    stats : Stats or None
        None where an interrupted run never opened the row.
    trace : Trace or None
    """

    text: str
    tokens: list[int]
    finish_reason: str
    prompt_tokens: list[int]
    prompt: int
    sample: int
    stats: Stats | None = None
    trace: Trace | None = None


@dataclass(frozen=True)
class Event:
    """A piece of a text as it grows. ``generation`` is there with the last piece."""

    prompt: int
    sample: int
    token: int | None
    text: str
    generation: Generation | None = None


@dataclass
class Request:
    """Everything a run needs beside the model; made by `Model.generate`."""

    prompts: list[list[int]]
    method: Method
    steering: list[Steering | None]
    sampling: Sampling
    max_new_tokens: int
    stop_ids: frozenset[int]
    stop: tuple[str, ...]
    n: int
    rows: int
    memory_limit: int | None
    trace: int
    cache: str
    grouping: bool = False
    padding: str = "none"
    full_length: float | None = None
    brake: int = 0

    def capacity(self, prompt: int, context: int) -> int:
        # The last new token is never fed.
        return min(len(self.prompts[prompt]) + self.max_new_tokens - 1, context)


class Interrupt:
    """While active, the first Ctrl-C only sets a flag, so that a run can end between two steps; the next one raises.

    Streams may end in any order, and in another thread: what is over hands its signal on to what was there before it.
    """

    def __enter__(self) -> Interrupt:
        self.seen = self._over = False
        self._previous = None
        previous = signal.getsignal(signal.SIGINT)
        # Where SIGINT is ignored, or kills the process, it stays so.
        if callable(previous) and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self._over:
            self._previous(number, frame)
        elif self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *_: object) -> None:
        self._over = True
        handler = signal.getsignal(signal.SIGINT)
        if handler != self._note or threading.current_thread() is not threading.main_thread():
            return
        while isinstance(of := getattr(handler, "__self__", None), Interrupt) and of._over:
            handler = of._previous
        signal.signal(signal.SIGINT, handler)


@dataclass(eq=False)
class _Row:
    number: int
    prompt: int
    sample: int
    ids: list[int]  # prompt and new tokens
    n_prompt: int
    limit: int  # ids that may be fed before this row is full
    fed: int = 0
    template: bool = False  # holds a prompt but for its last token, to be forked
    begun: float = field(default_factory=time.perf_counter)
    pieces: list[str] = field(default_factory=list)
    held_back: str = ""  # text that may turn out to begin a stop string
    stream: Any = None
    compactions: list[Compaction] = field(default_factory=list)
    bytes: list[tuple[int, int]] = field(default_factory=list)
    alphas: dict[int, float] = field(default_factory=dict)
    forced: deque[int] = field(default_factory=deque)  # tokens that the brake puts in place of sampled ones
    braked: int = 0
    brake_level: int = 0
    repeating: int = 0  # when the brake last looked
    thinking: int = 0


def check_steering(config: ModelConfig, steering: Steering) -> None:
    """Refuse what does not fit the model."""
    if len(steering.vector) != config.hidden:
        raise ConfigError(f"steering vector: expected shape [{config.hidden}], found [{len(steering.vector)}]")
    if steering.layer >= config.n_layers:
        raise ConfigError(f"steering layer is {steering.layer}; allowed: 0 to {config.n_layers - 1}")


def pages(session: Any, method: Method) -> dict[str, int]:
    """Slots of a page of one head, its bytes under the method, and those that a full cache takes for it."""
    size = session.ledger()["page_bytes"]
    # A full cache keeps no sums of attention: a float32 of every slot of a page.
    full = size - (4 * PAGE if method.needs & SUMS else 0)
    return {"page_slots": PAGE, "page_bytes": size, "full_page_bytes": full}


class Run:
    """One call of generate or stream. Iterating over `events` does the work."""

    def __init__(self, model: Model, request: Request) -> None:
        self.model, self.request = model, request
        self.config = model.config
        shape = (self.config.n_layers, self.config.n_kv_heads)
        # One row more than asked for, where samples are forked: the prompt waits in it.
        n_rows = max(1, min(request.rows, len(request.prompts) * request.n)) + (request.n > 1)
        self.session = _skipkv.Session(
            model._core, rows=n_rows, tokens=max(FORWARD_TOKENS, n_rows), cache=request.cache, threads=model.threads,
            memory_limit=request.memory_limit or (1 << 62), method=request.method.as_dict(shape),
            vocabulary=model._vocabulary_for(request.method), trace=request.trace,
        )  # fmt: skip
        self.logits = np.empty((n_rows, self.config.vocab), np.float32)
        self.active: list[_Row] = []
        self.template: _Row | None = None
        self.outputs: dict[tuple[int, int], Generation] = {}
        self.queue: deque[tuple[int, int]] = deque(
            (prompt, sample) for prompt in self._order() for sample in range(request.n)
        )
        self.reserves = self._reserves()
        self._check()

    # -- before the first step

    def _order(self) -> list[int]:
        prompts = range(len(self.request.prompts))
        return sorted(prompts, key=lambda i: len(self.request.prompts[i])) if self.request.grouping else list(prompts)

    def _groups(self) -> list[list[int]]:
        """Prompts that would share a padded batch: consecutive ones, as many as there are rows."""
        order, size = self._order(), self.request.rows
        return [order[i : i + size] for i in range(0, len(order), size)]

    def _reserves(self) -> dict[int, int]:
        if self.request.padding == "none":
            return dict.fromkeys(range(len(self.request.prompts)), 0)
        lengths = [len(prompt) for prompt in self.request.prompts]
        return {i: max(lengths[j] for j in group) - lengths[i] for group in self._groups() for i in group}

    def _check(self) -> None:
        """Refuse now what could not run later."""
        request = self.request
        for i, prompt in enumerate(request.prompts):
            if not prompt:
                raise ConfigError(f"prompt {i} is empty; allowed: at least one token")
            wrong = [t for t in prompt if not 0 <= t < self.config.vocab]
            if wrong:
                raise ConfigError(f"prompt {i} holds token {wrong[0]}; allowed: 0 to {self.config.vocab - 1}")
            context, limit, steering = self.config.context, request.memory_limit, request.steering[i]
            if len(prompt) > context:
                raise ConfigError(f"prompt {i} has {len(prompt)} tokens; allowed: up to the context of {context}")
            if steering:
                check_steering(self.config, steering)
            request.method.check_prompt(len(prompt), self.reserves[i])
            if limit:
                need = self.session.row_bytes(request.capacity(i, context), len(prompt))
                if need > limit:
                    raise CapacityError(f"prompt {i} needs {need} bytes of cache; memory_limit is {limit}")

    # -- rows

    def _open(self, prompt: int, sample: int, template: bool) -> _Row:
        ids = self.request.prompts[prompt]
        steering = self.request.steering[prompt]
        capacity = self.request.capacity(prompt, self.config.context)
        number = self.session.open(
            capacity, n_prompt=len(ids), prompt=prompt, sample=sample, reserve=self.reserves[prompt],
            steering=steering.as_tuple() if steering else None,
        )  # fmt: skip
        row = _Row(number, prompt, sample, list(ids[: -1 if template else None]), len(ids), capacity, template=template)
        row.stream = self.model.tokenizer.stream() if self.model.tokenizer else None
        return row

    def _fork(self, template: _Row, sample: int) -> _Row:
        number = self.session.fork(template.number, template.limit, sample)
        return self._from_template(template, number, sample)

    def _from_template(self, template: _Row, number: int, sample: int) -> _Row:
        ids = list(self.request.prompts[template.prompt])
        row = _Row(number, template.prompt, sample, ids, len(ids), template.limit, fed=len(ids) - 1)
        row.alphas = dict(template.alphas)
        row.stream = self.model.tokenizer.stream() if self.model.tokenizer else None
        return row

    def _samples_waiting(self, prompt: int) -> int:
        return sum(1 for waiting, _ in self.queue if waiting == prompt)

    def _admit(self) -> None:
        """Open what fits. A prompt with several samples is prefilled once, but for its last token, and forked."""
        request = self.request
        if request.grouping and self.active:
            return  # static groups: all of one end before the next begins
        while self.queue and len(self.active) < request.rows:
            prompt, sample = self.queue[0]
            template = self.template
            try:
                if template is not None:
                    if template.fed < len(template.ids):
                        return  # its prompt is not through yet
                    if self._samples_waiting(prompt) == 1:  # the last one needs no copy
                        self.active.append(self._from_template(template, template.number, sample))
                        self.template = None
                    else:
                        self.active.append(self._fork(template, sample))
                elif self._samples_waiting(prompt) > 1 and len(request.prompts[prompt]) > 1:
                    # Opened as the last sample, which will take the row over.
                    self.template = self._open(prompt, max(s for p, s in self.queue if p == prompt), template=True)
                    return
                else:
                    self.active.append(self._open(prompt, sample, template=False))
                self.queue.popleft()
            except CapacityError:
                if self.active:
                    return  # a row that ends makes room
                if template is None:
                    raise
                # Prompt and copy do not fit together: the prompt's row becomes its last sample, the others are
                # prefilled again.
                last = max(s for p, s in self.queue if p == template.prompt)
                self.active.append(self._from_template(template, template.number, last))
                self.queue.remove((template.prompt, last))
                self.template = None

    # -- steps

    def events(self, stacklevel: int = 3) -> Iterator[Event]:
        """Work until everything is done or interrupted; yields every new token.

        Warnings point at whoever iterates, or with a higher ``stacklevel`` at a caller further out.
        """
        with Interrupt() as interrupt:
            while self.queue or self.active or self.template:
                if interrupt.seen:
                    yield from self._interrupted()
                    return
                self._admit()
                yield from self._step()
        self._warn(stacklevel)

    def _step(self) -> Iterator[Event]:
        rows = self.active + ([self.template] if self.template else [])
        room = max(FORWARD_TOKENS, len(rows))
        spans: list[tuple[_Row, int]] = []
        # Rows that decode first; the prompts share what is left.
        for row in sorted(rows, key=lambda row: len(row.ids) - row.fed > 1):
            n = min(len(row.ids) - row.fed, room)
            if n > 0:
                n = self.session.chunk(row.number, n)
                spans.append((row, n))
                room -= n
        tokens = [t for row, n in spans for t in row.ids[row.fed : row.fed + n]]
        logits = self.logits[: len(spans)]
        steered = self.session.forward(
            np.array([(row.number, n) for row, n in spans], np.int32), np.array(tokens, np.int32), logits
        )
        self._note(spans, steered)
        ready = [i for i, (row, _) in enumerate(spans) if row.fed == len(row.ids) and not row.template]
        if not ready:
            return
        s = self.request.sampling
        sequences = np.array([(spans[i][0].prompt, spans[i][0].sample, len(spans[i][0].ids)) for i in ready], np.int64)
        chosen = self.session.sample(logits[ready], sequences, s.seed, s.temperature, s.top_k, s.top_p, s.min_p)
        if not np.isfinite(logits[ready, chosen]).all():
            raise BackendError("the logits are not finite: a weight is not, or what steering adds is too large")
        for i, token in zip(ready, chosen.tolist(), strict=True):
            row = spans[i][0]
            yield self._accept(row, row.forced.popleft() if row.forced else token)

    def _note(self, spans: list[tuple[_Row, int]], steered: list[tuple[int, float]]) -> None:
        """What the forward did to each row: tokens fed, α, compactions."""
        first = 0
        by_number = {row.number: row for row, _ in spans}
        for row, n in spans:
            for index, alpha in steered:
                if first <= index < first + n:
                    row.alphas[row.fed + index - first] = alpha
            row.fed += n
            first += n
            if self.request.brake and not row.template:
                self._brake(row)
        for number, step, layer, head, before, kept, scores in self.session.trace():
            row = by_number[number]
            if not row.bytes or row.bytes[-1][0] != step:
                row.bytes.append((step, self.session.state(number)["live_bytes"]))
            row.compactions.append(Compaction(step, layer, head, before, kept, scores))

    def _brake(self, row: _Row) -> None:
        """After k sentences in a row that each repeat an earlier one, steer to the utmost; after 2k end thinking."""
        k, state = self.request.brake, self.session.state(row.number)
        repeating, thinks = state["repeating"], state["thinking_tokens"] > row.thinking
        row.thinking = state["thinking_tokens"]
        # A prompt that repeats itself is no loop, until what is generated goes on repeating.
        news = repeating != row.repeating and row.fed > row.n_prompt
        row.repeating = repeating
        level = 2 if repeating >= 2 * k and thinks else 1 if repeating >= k else 0
        if not news or level <= row.brake_level:
            return
        row.braked = row.braked or row.fed
        self.session.brake(row.number)
        if level == 2:
            row.forced.extend(self.model.end_of_thinking)
        row.brake_level = level

    def _accept(self, row: _Row, token: int) -> Event:
        """One more token of a row, its text, and the row's end if this was the last."""
        row.ids.append(token)
        text = row.stream.push(token) if row.stream else ""
        reason = None
        if token in self.request.stop_ids:
            reason = "stop"
        elif len(row.ids) - row.n_prompt >= self.request.max_new_tokens:
            reason = "length"
        elif len(row.ids) > row.limit:
            reason = "context"
        if reason and row.stream:
            text += row.stream.flush()
        text, stopped = self._cut(row, text, last=reason is not None)
        row.pieces.append(text)
        if stopped:
            reason = "stop"
        return Event(row.prompt, row.sample, token, text, self._finish(row, reason) if reason else None)

    def _cut(self, row: _Row, text: str, last: bool) -> tuple[str, bool]:
        """Text that may be shown: what could still begin a stop string is held back."""
        if not self.request.stop:
            return text, False
        text = row.held_back + text
        found = [at for at in (text.find(stop) for stop in self.request.stop) if at >= 0]
        if found:
            return text[: min(found)], True
        keep = 0
        for stop in () if last else self.request.stop:
            for n in range(min(len(stop) - 1, len(text)), keep, -1):
                if text.endswith(stop[:n]):
                    keep = n
                    break
        row.held_back = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def _finish(self, row: _Row, reason: str) -> Generation:
        generation = self._generation(row, reason)
        self.session.close(row.number)
        self.active.remove(row)
        self.outputs[row.prompt, row.sample] = generation
        return generation

    def _generation(self, row: _Row, reason: str) -> Generation:
        new = row.ids[row.n_prompt :]
        return Generation(
            "".join(row.pieces), new, reason, row.ids[: row.n_prompt], row.prompt, row.sample,
            self._stats(row), self._trace(row) if self.request.trace else None,
        )  # fmt: skip

    def _stats(self, row: _Row) -> Stats:
        state, ledger, config = self.session.state(row.number), self.session.ledger(), self.config
        n_heads = config.n_layers * config.n_kv_heads
        full = self.request.full_length
        page = pages(self.session, self.request.method)["full_page_bytes"]
        return Stats(
            prompt_tokens=row.n_prompt, new_tokens=len(row.ids) - row.n_prompt,
            thinking_tokens=state["thinking_tokens"], answer_tokens=state["answer_tokens"],
            seconds=time.perf_counter() - row.begun,
            live_bytes=state["live_bytes"], peak_bytes=state["peak_bytes"],
            full_bytes=-(-row.fed // PAGE) * n_heads * page, pool_bytes=ledger["pool_bytes"],
            pool_peak_bytes=ledger["peak_bytes"], compactions=state["compactions"], evicted=state["evicted"],
            pairs=state["pairs"], compression=state["slots"] / max(1, row.fed * n_heads),
            compression_of_full=state["slots"] / (full * n_heads) if full else None, sentences=state["sentences"],
            flagged=state["flagged"], thoughts=state["thoughts"], steered=state["steered"], braked=row.braked,
        )  # fmt: skip

    def _trace(self, row: _Row) -> Trace:
        texts = self.model.tokenizer.token_texts if self.model.tokenizer else None
        steering = self.request.steering[row.prompt]
        sampling = self.request.sampling
        settings = {"model": self.model.name, "prompt": row.prompt, "sample": row.sample, "seed": sampling.seed,
                    "temperature": sampling.temperature,
                    "steering": steering.describe() if steering else None,
                    **pages(self.session, self.request.method)}  # fmt: skip
        return Trace(
            list(row.ids), [texts[i] if texts else str(i) for i in row.ids], row.n_prompt, self.config.n_layers,
            self.config.n_kv_heads, str(self.request.method), row.compactions, self.session.sentences(row.number)[0],
            row.alphas, row.bytes, settings,
        )  # fmt: skip

    def _interrupted(self) -> Iterator[Event]:
        for row in list(self.active):
            if row.stream:
                row.pieces.append(row.held_back + row.stream.flush())
            text = row.pieces[-1] if row.pieces else ""
            yield Event(row.prompt, row.sample, None, text, self._finish(row, "interrupted"))
        for prompt, sample in self.queue:
            ids = self.request.prompts[prompt]
            generation = Generation("", [], "interrupted", list(ids), prompt, sample)
            self.outputs[prompt, sample] = generation
            yield Event(prompt, sample, None, "", generation)

    def _warn(self, stacklevel: int) -> None:
        stats = [g.stats for g in self.outputs.values() if g.stats]
        if self.request.method.compacts and stats and not any(s.compactions for s in stats):
            longest = max(s.prompt_tokens + s.new_tokens for s in stats)
            text = f"{self.request.method} never compacted: the longest of {len(stats)} rows has {longest} tokens"
            warnings.warn(text, stacklevel=stacklevel)
        steered = [g for g in self.outputs.values() if g.stats and self.request.steering[g.prompt]]
        if steered and not any(g.stats.steered for g in steered):
            scope = self.request.steering[steered[0].prompt].scope
            warnings.warn(
                f"steering steered no token: none in scope {scope!r} holds a blank line", stacklevel=stacklevel
            )

    def results(self, complete: bool = True) -> list[Generation]:
        """In order of prompt and sample; with complete=False only those that have ended."""
        keys: Sequence = sorted(self.outputs)
        if complete:
            keys = [(p, s) for p in range(len(self.request.prompts)) for s in range(self.request.n)]
        return [self.outputs[key] for key in keys]
