"""Continuous batching over the core's session: requests wait, rows run, a finished row's place is taken at once.

prompts × samples → queue → rows (open, or fork a prefilled prompt) → forward → sample → text → Generation
"""

import math
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import compress
from typing import Any

import numpy as np

from skipkv.checks import (
    check_fields,
    checked,
    flag,
    integer,
    integers,
    items,
    many,
    number,
    one_of,
    plain,
    shown,
    wrong,
)  # fmt: skip
from skipkv.engine import CACHES, FORWARD_TOKENS, MEMORY_MAX, TRACES, Engine, Recorder, Row, trace_level
from skipkv.errors import BackendError, CapacityError, CheckpointError, ConfigError, warn
from skipkv.load.checkpoint import GENERATION
from skipkv.load.template import check_variables
from skipkv.load.tokenizer import Stream
from skipkv.methods import Method
from skipkv.results import Event, Generation
from skipkv.steering import Steering

TEXTS = 1 << 20  # of one run at most


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
    repetition_penalty : float
        What the logit of every token of prompt and text is divided by, or multiplied with where it is below 0, before
        all else, greedy too; 1: off.
    """

    temperature: float = checked(0.0, number, 0, 1000)
    top_k: int = checked(0, integer)
    top_p: float = checked(1.0, number, 0, 1)
    min_p: float = checked(0.0, number, 0, 1)
    seed: int = checked(0, integer, 0, 2**64 - 1)
    # What lies beyond would take logits out of float32's range.
    repetition_penalty: float = checked(1.0, number, 1e-30, 1e30)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class Options(Sampling):
    """What `Model.generate` and `Model.stream` may be told besides prompts, method and steering.

    Parameters
    ----------
    temperature, top_k, top_p, min_p, seed, repetition_penalty
        See `Sampling`; greedy by default.
    max_new_tokens : int
    context : int, optional
        Tokens of a prompt and its text together, where that is less than the model's own context.
    stop : str or sequence of str
        Texts that end a generation, special tokens included; left out of its text.
    stop_ids : iterable of int, optional
        Tokens that end it; by default those of generation_config.json, or else of config.json and the tokenizer.
    n : int
        Samples of every prompt; they share one prefill.
    rows : int
        Sequences in flight at once.
    memory_limit : int, optional
        A hard cap in bytes; rows wait where they do not fit. On the CPU it is on the cache, on a GPU on all its memory
        that the run takes beside the weights: cache, queries, sentences and workspace. Vectors of sentences that close
        while rows run are not refused, but keep new rows waiting.
    trace : bool or "scores"
        Record what was kept; with ``"scores"`` every candidate's scores, too.
    cache : "bf16", "f32" or "q8"
        Type in which keys and values are kept.
    grouping : bool
        Static groups of prompts of similar length, as the published comparison forms them (METHOD §8).
    padding : "none" or "reserve"
        ``"reserve"`` takes what padding would hold in such a group off a row's budget.
    full_length : float, optional
        Mean length of full-cache runs; only for ``stats.compression_of_full``.
    brake : int
        k > 0: after k sentences in a row that each repeat an earlier one, α is raised to its maximum; after 2k,
        ``</think>`` is forced.
    template : mapping, optional
        Variables of the chat template, such as ``{"enable_thinking": False}``, ``tools`` or ``documents``; with chats.
    sampling : "checkpoint", optional
        Sample as generation_config.json recommends (`recommended`) in all that the call does not say.
    admit : callable, optional
        ``admit(prompt, sample)`` of the indices, once for each sequence, right before its prompt's first row is opened;
        those of which it is false are left out. The others are what they are without it.

    Raises
    ------
    ConfigError
        A value is out of range.
    """

    max_new_tokens: int = checked(4096, integer, 1)
    context: int | None = checked(None, integer, 2)
    stop: str | Sequence[str] = ()
    stop_ids: Iterable[int] | None = None
    n: int = checked(1, integer, 1)
    rows: int = checked(16, integer, 1)
    memory_limit: int | None = checked(None, integer, 1, MEMORY_MAX)
    trace: bool | str = checked(False, one_of, TRACES)
    cache: str = checked("bf16", one_of, CACHES)
    grouping: bool = checked(False, flag)
    padding: str = checked("none", one_of, ("none", "reserve"))
    full_length: float | None = checked(None, number, math.ulp(0.0), 2**31, "numbers above 0")
    brake: int = checked(0, integer)
    template: Mapping[str, Any] | None = checked(None, check_variables)
    sampling: str | None = checked(None, one_of, ("checkpoint",))
    admit: Callable[[int, int], bool] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        stop = tuple(many(self.stop))
        if any(not isinstance(s, str) or not s for s in stop):
            raise wrong("stop", self.stop, "texts that are not empty")
        object.__setattr__(self, "stop", stop)
        if self.stop_ids is not None:
            object.__setattr__(self, "stop_ids", tuple(many(self.stop_ids)))
        if self.admit is not None and not callable(self.admit):
            raise wrong("admit", self.admit, "a function")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Options":
        """From keywords; ConfigError for one that there is not."""
        names = [f.name for f in fields(cls)]
        first = len(fields(Sampling))
        unknown = values.keys() - set(names)
        if unknown:
            allowed = ", ".join(names[first:] + names[:first])
            raise ConfigError(f"option {shown(min(unknown))} is unknown; allowed: {allowed}")
        return cls(**values)


def recommended(engine: Engine) -> dict[str, Any]:
    """Fields of `Sampling` by generation_config.json, where it samples with transformers' defaults for what it omits.

    Raises
    ------
    CheckpointError
        One of them is out of range.
    """
    given = {key: value for key, value in engine.generation.items() if value is not None}
    try:
        found, names = {}, []
        if one_of("do_sample", given.get("do_sample", False), (False, True)):
            found, names = {"temperature": 1.0, "top_k": 50}, ["temperature", "top_k", "top_p", "min_p"]
        found |= {name: given[name] for name in (*names, "repetition_penalty") if name in given}
        made = asdict(Sampling(**found))
    except ConfigError as error:
        raise CheckpointError(f"{engine.name}: {GENERATION}: {error}") from None
    return {name: made[name] for name in found}


def choose(engine: Engine, given: Mapping[str, Any]) -> Options:
    """A call's options; a warning where nothing is said of a recommendation that they do not follow."""
    options = Options.of(given)
    try:
        advice = recommended(engine)
    except CheckpointError:
        if options.sampling:
            raise
        return options
    left = {name: value for name, value in advice.items() if name not in given}
    if options.sampling:
        if not advice:
            engine._say_once(f"{engine.name} recommends no sampling; greedy where the call says nothing else")
        return replace(options, **left)
    if "temperature" in given:  # whoever says how to sample, or that it is greedy, knows
        left = {name: value for name, value in left.items() if name == "repetition_penalty"}
    missed = [f"{name}={plain(value)}" for name, value in left.items() if value != getattr(options, name)]
    if missed:
        text = f"{engine.name} recommends {', '.join(missed)}, which this run leaves out"
        engine._say_once(f"{text}; sampling='checkpoint' follows it")
    return options


def penalise(logits: np.ndarray, ids: Iterable[int], penalty: float) -> None:
    """Apply a repetition penalty to logits [vocab], once for each of the ids that stand in a text."""
    if penalty != 1:
        seen = list(set(ids))
        found = logits[seen]
        logits[seen] = np.where(found < 0, found * penalty, found / penalty)


def pad(lengths: Sequence[int], rows: int, grouping: bool) -> tuple[list[int], list[int]]:
    """The order in which prompts are taken, and what padding each would hold in its batch of so many rows."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__) if grouping else list(range(len(lengths)))
    padding = [0] * len(lengths)
    for first in range(0, len(order), rows):
        group = order[first : first + rows]
        longest = max(lengths[i] for i in group)
        for i in group:
            padding[i] = longest - lengths[i]
    return order, padding


class Interrupt:
    """While active, the first Ctrl-C only sets a flag, so that a run can end between two steps; the next one raises.

    One inside another begins with what the outer one has seen.
    """

    seen = False

    def __enter__(self) -> "Interrupt":
        self._previous = None
        previous = signal.getsignal(signal.SIGINT)
        # Where SIGINT is ignored, or kills the process, it stays so.
        if callable(previous) and threading.current_thread() is threading.main_thread():
            outer = getattr(previous, "__self__", None)
            self.seen |= isinstance(outer, Interrupt) and outer.seen
            self._previous = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: Any) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True

    def __exit__(self, *_: object) -> None:
        if self._previous and signal.getsignal(signal.SIGINT) == self._note:
            signal.signal(signal.SIGINT, self._previous)


@dataclass(eq=False, kw_only=True)
class _Row(Row):
    prompt: int
    sample: int
    ids: list[int]  # prompt and new tokens
    limit: int  # ids that may be fed before this row is full
    template: bool = False  # holds a prompt but for its last token, to be forked
    stream: Stream | None = None
    pieces: list[str] = field(default_factory=list)
    held_back: str = ""  # text that may turn out to begin a stop string, skipped special tokens included
    shown: list[bool] = field(default_factory=list)  # of its characters: not of such a token
    forced: deque[int] = field(default_factory=deque)  # tokens that the brake puts in place of sampled ones
    brake_level: int = 0
    repeating: int = 0  # when the brake last looked
    thinking: int = 0


class Run:
    """One call of generate or stream. Iterating over `events` does the work.

    Parameters
    ----------
    engine : Engine
    prompts : sequence of ids
    method : Method
    steering : Steering, or one (or None) for every prompt
    options : Options

    Raises
    ------
    ConfigError, CapacityError
        Something of it could not run.
    """

    def __init__(
        self, engine: Engine, prompts: Sequence[list[int]], method: Method,
        steering: Steering | Iterable[Steering | None] | None, options: Options,
    ) -> None:  # fmt: skip
        self.engine, self.config, self.prompts, self.method, self.options = (
            engine, engine.config, prompts, method, options)  # fmt: skip
        if len(prompts) * options.n > TEXTS:
            raise ConfigError(f"{len(prompts)} prompts with n={options.n}; allowed: up to {TEXTS} texts")
        each = items(steering)
        self.steering = [steering] * len(prompts) if each is None else each
        wrong = any(s is not None and not isinstance(s, Steering) for s in self.steering)
        if wrong or len(self.steering) != len(prompts):
            raise ConfigError(f"steering: expected a Steering, or one or None for each of {len(prompts)} prompts")
        self.stop_ids = engine.stop_ids
        if options.stop_ids is not None:
            self.stop_ids = frozenset(integers("stop_ids", options.stop_ids, 0, self.config.vocab - 1))
        for name in ("brake", "stop"):
            if getattr(options, name) and engine.tokenizer is None:
                raise ConfigError(f"{name} needs a tokenizer, which this model has not")
        self.context = self.config.context  # tokens that may be fed
        if options.context:
            self.context = min(self.context, options.context - 1)  # the last new token is never fed
        # One row more than asked for, where samples are forked: the prompt waits in it.
        n_rows = max(1, min(options.rows, len(prompts) * options.n)) + (options.n > 1)
        self.session = engine._session(
            method, options.cache, rows=n_rows, tokens=max(FORWARD_TOKENS, n_rows), trace=trace_level(options.trace),
            memory_limit=options.memory_limit,
        )  # fmt: skip
        self.recorder = Recorder(engine, self.session, method)
        self.logits = np.empty((n_rows, self.config.vocab), np.float32)
        self.active: list[_Row] = []
        self.template: _Row | None = None
        self.outputs: dict[tuple[int, int], Generation] = {}
        order, padding = pad([len(prompt) for prompt in prompts], options.rows, options.grouping)
        self.queue = deque((prompt, sample) for prompt in order for sample in range(options.n))
        self.asked: int | None = None  # the last prompt that `Options.admit` was asked about
        self.apart: int | None = None  # the last prompt that did not fit beside a sample of its own
        self.reserves = padding if options.padding == "reserve" else [0] * len(prompts)
        self._check()

    def _check(self) -> None:
        """Refuse now what could not run later."""
        context, limit = self.context, self.options.memory_limit
        reach = self.config.reach if context == self.config.context else context
        if limit and self.prompts:  # what the session may come to take beside its rows
            capacity = max(self._capacity(i) for i in range(len(self.prompts)))
            fixed = self.session.fixed_bytes(capacity, min(max(map(len, self.prompts)), capacity))
        for i, (prompt, steering) in enumerate(zip(self.prompts, self.steering, strict=True)):
            if not prompt:
                raise ConfigError(f"prompt {i} is empty; allowed: at least one token")
            self.engine.check_ids(f"prompt {i}", prompt)
            if len(prompt) > context:
                raise ConfigError(f"prompt {i} has {len(prompt)} tokens; allowed: up to {reach}")
            self.engine.check_steering(steering)
            self.method.check_prompt(len(prompt), self.reserves[i])
            if limit:
                need = self.session.row_bytes(self._capacity(i), len(prompt))
                if need + fixed > limit:
                    beside = f" beside {fixed} of workspace" if fixed else ""
                    raise CapacityError(f"prompt {i} needs {need} bytes of cache{beside}; memory_limit is {limit}")

    def _capacity(self, prompt: int) -> int:
        # The last new token is never fed.
        return min(len(self.prompts[prompt]) + self.options.max_new_tokens - 1, self.context)

    # -- rows

    def _open(self, prompt: int, sample: int, template: bool) -> _Row:
        ids, steering = list(self.prompts[prompt]), self.steering[prompt]
        limit = len(ids) if template else self._capacity(prompt)
        number = self.session.open(
            limit, n_prompt=len(ids), prompt=prompt, sample=sample, reserve=self.reserves[prompt],
            steering=steering.as_tuple() if steering else None,
        )  # fmt: skip
        row = _Row(number, len(ids), steering, prompt=prompt, sample=sample, ids=ids, limit=limit, template=template,
                   stream=self._stream())  # fmt: skip
        if template:
            row.ids.pop()
        return row

    def _stream(self) -> Stream | None:
        return self.engine.tokenizer.stream() if self.engine.tokenizer else None

    def _fork(self, sample: int) -> _Row:
        """A row that goes on from the prefilled prompt."""
        t, limit = self.template, self._capacity(self.template.prompt)
        number = self.session.fork(t.number, limit, sample)
        return _Row(number, t.n_prompt, t.steering, t.fed, alphas=dict(t.alphas), prompt=t.prompt, sample=sample,
                    ids=list(self.prompts[t.prompt]), limit=limit, stream=self._stream())  # fmt: skip

    def _drop_template(self) -> None:
        self.session.close(self.template.number)
        self.template = None

    def _is_in_the_way(self) -> bool:
        """Whether a row fits in place of the prompt that waits, and may decode more than the prompts cost it."""
        t, limit = self.template, self.options.memory_limit
        if not t or not limit or t.n_prompt > self.options.max_new_tokens:
            return False
        capacity, ledger = self._capacity(t.prompt), self.session.ledger()
        held, row = (self.session.row_bytes(n, t.n_prompt) for n in (t.limit, capacity))
        fixed = self.session.fixed_bytes(capacity, t.n_prompt)
        rest = ledger["ring_bytes"] + ledger["sentence_bytes"] if fixed else 0
        return ledger["reserved_bytes"] + rest + fixed - held + row <= limit

    def _ask(self) -> bool:
        """Whether a sequence waits, once those of the next prompt that are not admitted have left the queue."""
        admit = self.options.admit
        while admit and self.queue and self.queue[0][0] != self.asked:
            self.asked = self.queue[0][0]
            keys = []
            while self._is_next(self.asked):
                keys.append(self.queue.popleft())
            self.queue.extendleft(reversed([key for key in keys if admit(*key)]))
        return bool(self.queue)

    def _is_next(self, prompt: int, after: int = 0) -> bool:
        """Whether a sample of this prompt stands behind so many others."""
        return len(self.queue) > after and self.queue[after][0] == prompt

    def _admit(self) -> None:
        """Open what fits. A prompt with several samples is prefilled once, but for its last token, and forked."""
        if self.options.grouping and self.active:
            return  # static groups: all of one end before the next begins
        while len(self.active) < self.options.rows and self._ask():
            (prompt, sample), template = self.queue[0], self.template
            shared = self._is_next(prompt, 1) and len(self.prompts[prompt]) > 1 and prompt != self.apart
            try:
                if template is None:
                    row = self._open(prompt, sample, template=shared)
                    if shared:
                        self.template = row
                        return
                elif template.fed < len(template.ids):
                    return  # its prompt is not through yet
                else:
                    row = self._fork(sample)
            except CapacityError:
                if self.active and not self._is_in_the_way():
                    return  # a row that ends makes room
                if not shared and template is None:
                    raise
                self.apart = prompt  # each of its samples is prefilled by itself
                if template:
                    self._drop_template()
                continue
            self.active.append(row)
            self.queue.popleft()
            if template and not self._is_next(prompt):
                self._drop_template()

    # -- steps

    def events(self) -> Iterator[Event]:
        """As `steps`; Ctrl-C is taken only while they work, for between two of them it is the caller's."""
        interrupt = Interrupt()
        steps = self.steps(interrupt)
        while True:
            with interrupt:
                event = next(steps, None)
            if event is None:
                return
            yield event

    def steps(self, interrupt: Interrupt) -> Iterator[Event]:
        """Work until everything is done or interrupted; yields every new token."""
        while self.queue or self.active:
            if interrupt.seen:
                yield from self._interrupted()
                return
            self._admit()
            yield from self._step()
        self._warn()

    def _step(self) -> Iterator[Event]:
        rows = self.active + ([self.template] if self.template else [])
        if not rows:  # all that waited was refused
            return
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
        ready = [i for i, (row, n) in enumerate(spans) if row.fed + n == len(row.ids) and not row.template]
        s, best = self.options, np.empty(len(spans), np.int32)
        greedy = not s.temperature and s.repetition_penalty == 1
        steered = self.session.forward(
            np.array([(row.number, n) for row, n in spans], np.int32), np.array(tokens, np.int32),
            self.logits[: len(spans)] if ready else None, best=best if greedy else None,
        )  # fmt: skip
        self.recorder.note(spans, steered)
        if self.options.brake:
            for row, _ in spans:
                self._brake(row)
        if not ready:
            return
        chosen = best[ready] if greedy else self._draw(ready, [spans[i][0] for i in ready])
        if (chosen < 0).any():
            raise BackendError("the logits are not finite: a weight is not, or what steering adds is too large")
        for i, token in zip(ready, chosen.tolist(), strict=True):
            row = spans[i][0]
            yield self._accept(row, row.forced.popleft() if row.forced else token)

    def _draw(self, lines: list[int], rows: list[_Row]) -> np.ndarray:
        """The next token of each row, whose logits are in those lines; -1 where its own is not finite."""
        s, logits = self.options, self.logits[lines]
        for line, row in zip(logits, rows, strict=True):
            penalise(line, row.ids, s.repetition_penalty)
        sequences = np.array([(row.prompt, row.sample, len(row.ids)) for row in rows], np.int64)
        chosen = self.session.sample(logits, sequences, s.seed, s.temperature, s.top_k, s.top_p, s.min_p)
        return np.where(np.isfinite(np.take_along_axis(logits, chosen[:, None], 1)[:, 0]), chosen, -1)

    def _brake(self, row: _Row) -> None:
        """After k sentences in a row that each repeat an earlier one, steer to the utmost; after 2k end thinking."""
        if row.template:
            return
        k, state = self.options.brake, self.session.state(row.number)
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
            row.forced.extend(self.engine.end_of_thinking)
        row.brake_level = level

    def _accept(self, row: _Row, token: int) -> Event:
        """One more token of a row, its text, and the row's end if this was the last."""
        row.ids.append(token)
        text = row.stream.push(token) if row.stream else ""
        reason = None
        if token in self.stop_ids:
            reason = "stop"
        elif len(row.ids) - row.n_prompt >= self.options.max_new_tokens:
            reason = "length"
        elif len(row.ids) > row.limit:
            reason = "context"
        if reason and row.stream:
            text += row.stream.flush()
        text, stopped = self._cut(row, text, row.stream.skipped(token) if row.stream else "", last=reason is not None)
        row.pieces.append(text)
        if stopped:
            reason = "stop"
        return Event(row.prompt, row.sample, token, text, self._finish(row, reason) if reason else None)

    def _cut(self, row: _Row, text: str, special: str, last: bool) -> tuple[str, bool]:
        """Text that may be shown, and whether a stop string ends it; what could still begin one is held back.

        Stop strings are searched in the text with its special tokens, of which none is shown.
        """
        if not self.options.stop:
            return text, False
        shown = row.shown + [True] * len(text) + [False] * len(special)
        text = row.held_back + text + special
        found = [at for at in (text.find(stop) for stop in self.options.stop) if at >= 0]
        begun = (n for stop in self.options.stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        end = min(found) if found else len(text) - (0 if last else max(begun, default=0))
        row.held_back, row.shown = text[end:], shown[end:]
        return "".join(compress(text[:end], shown)), bool(found)

    def _finish(self, row: _Row, reason: str) -> Generation:
        o, n = self.options, row.n_prompt
        settings = {"prompt": row.prompt, "sample": row.sample} | {f.name: getattr(o, f.name) for f in fields(Sampling)}
        generation = Generation(
            self.method, row.steering, "".join(row.pieces), row.ids[n:], reason, row.ids[:n], row.prompt, row.sample,
            self.recorder.stats(row, len(row.ids), o.full_length),
            self.recorder.trace(row, row.ids, **settings) if o.trace else None,
        )  # fmt: skip
        self.session.close(row.number)
        self.active.remove(row)
        self.outputs[row.prompt, row.sample] = generation
        return generation

    def _interrupted(self) -> Iterator[Event]:
        for row in list(self.active):
            text, _ = self._cut(row, row.stream.flush() if row.stream else "", "", last=True)
            row.pieces.append(text)
            yield Event(row.prompt, row.sample, None, text, self._finish(row, "interrupted"))
        for prompt, sample in self.queue:
            ids = list(self.prompts[prompt])
            generation = Generation(self.method, self.steering[prompt], "", [], "interrupted", ids, prompt, sample)
            self.outputs[prompt, sample] = generation
            yield Event(prompt, sample, None, "", generation)

    def _warn(self) -> None:
        stats = [g.stats for g in self.outputs.values() if g.stats]
        if self.method.compacts and stats and not any(s.compactions for s in stats):
            longest = max(s.prompt_tokens + s.new_tokens for s in stats)
            warn(f"{self.method} never compacted: the longest of {len(stats)} rows has {longest} tokens")
        steered = [g for g in self.outputs.values() if g.stats and self.steering[g.prompt]]
        if steered and not any(g.stats.steered for g in steered):
            scope = self.steering[steered[0].prompt].scope
            warn(f"steering steered no token: none in scope {scope!r} holds a blank line")

    def results(self) -> list[Generation]:
        """What has ended, in order of prompt and sample."""
        return [self.outputs[key] for key in sorted(self.outputs)]
