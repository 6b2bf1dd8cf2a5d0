"""A loaded model: generate, stream, logits, replay."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from tqdm import tqdm

from skipkv import _skipkv, sentences
from skipkv.checkpoint import GENERATION, Checkpoint, ModelConfig, open_checkpoint
from skipkv.errors import BackendError, CheckpointError, ConfigError
from skipkv.generate import FORWARD_TOKENS, Event, Generation, Request, Run, Sampling, check_steering, pages
from skipkv.methods import Method, parse_method
from skipkv.steering import Steering
from skipkv.tokenizer import Tokenizer
from skipkv.trace import Compaction, Trace

Prompt = str | Sequence[int] | Sequence[dict]
TEXTS = 1 << 20  # of one run at most
LOGIT_TOKENS = 128  # of one forward where every token's logits are wanted: they are wide


def cpu_count() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(
    source: str | os.PathLike[str],
    device: str = "cpu",
    dtype: str = "auto",
    threads: int | None = None,
    progress: bool = True,
) -> Model:
    """Load a checkpoint.

    Parameters
    ----------
    source : str or path
        A directory as transformers saves it, a Hugging Face hub id, or ``"tiny"``, the model that comes with skipkv.
    device : str
        ``"cpu"``. The variant of its kernels is the best that this processor runs; ``SKIPKV_CPU=generic|avx2|avx512``
        in the environment forces one.
    dtype : str
        Of the weights: ``"auto"`` (bf16 if the matrices are stored so, else f32), ``"f32"``, ``"bf16"``.
    threads : int, optional
        All processors of this process by default.
    progress : bool
        Show a bar (on a terminal) and report name, parameters and bytes on standard error.

    Raises
    ------
    CheckpointError
        Something is wrong with a file.
    ConfigError, BackendError
        A parameter is out of range; this machine cannot run what was asked for.
    """
    if not isinstance(source, (str, os.PathLike)):
        raise ConfigError(f"source is {source!r:.80}; allowed: a directory, a hub id, or tiny")
    if device != "cpu":
        known = "this version computes on the CPU only" if device == "cuda" else "allowed: cpu"
        raise BackendError(f"device is {device!r}; {known}")
    if dtype not in ("auto", "f32", "bf16"):
        raise ConfigError(f"dtype is {dtype!r}; allowed: auto, f32, bf16")
    with open_checkpoint(source) as checkpoint:
        tokenizer = Tokenizer(checkpoint.path, checkpoint.config.vocab)
        core = _skipkv.Model(
            checkpoint.config.as_dict(),
            checkpoint.dtype if dtype == "auto" else dtype,
            os.environ.get("SKIPKV_CPU") or None,
        )
        _check_eos(checkpoint)
        model = Model(core, checkpoint.config, tokenizer, checkpoint.name, checkpoint.generation, _threads(threads))
        _bind(core, checkpoint, model.threads, progress)
        if progress:
            kind = checkpoint.dtype if dtype == "auto" else dtype
            print(
                f"{checkpoint.name}: {checkpoint.config.family}, {checkpoint.n_parameters / 1e6:.1f} M parameters, "
                f"{core.n_bytes / 1e6:.1f} MB as {kind}, {core.variant}, {model.threads} threads", file=sys.stderr,
            )  # fmt: skip
        return model


def _threads(threads: int | None) -> int:
    if threads is None:
        return _may_thread(min(cpu_count(), 64))
    return _may_thread(integer("threads", threads, 1, 1024))


_team = {"used": False, "lost": False}  # whether OpenMP's threads have computed here; whether a fork left them behind
os.register_at_fork(after_in_child=lambda: _team.update(lost=_team["used"]))


def _may_thread(threads: int) -> int:
    if threads > 1 and _team["lost"]:
        raise BackendError("this process was forked after skipkv had computed; allowed: threads=1, or to spawn it")
    _team["used"] |= threads > 1
    return threads


def _check_eos(checkpoint: Checkpoint) -> None:
    eos, vocab = checkpoint.generation.get("eos_token_id"), checkpoint.config.vocab
    for i in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        if type(i) is not int or not 0 <= i < vocab:
            where = f"{checkpoint.path / GENERATION}: eos_token_id is {eos!r:.80}"
            raise CheckpointError(f"{where}; allowed: an id from 0 to {vocab - 1}, or a list of such")


def _bind(core: _skipkv.Model, checkpoint: Checkpoint, threads: int, progress: bool) -> None:
    """Pack tensor by tensor; the mapped pages of each are given back at once."""
    quiet = None if progress else True
    with tqdm(
        total=checkpoint.n_bytes, unit="B", unit_scale=True, desc=checkpoint.name, leave=False, disable=quiet
    ) as bar:
        for name, tensor in checkpoint.tensors.items():
            core.bind(name, tensor.dtype.lower(), tensor.shape, checkpoint.view(name), threads)
            checkpoint.release(name)
            bar.update(tensor.n_bytes)


@dataclass(frozen=True, eq=False)
class Replay:
    """A recorded text under a method.

    Attributes
    ----------
    logprobs : float64 [n - 1]
        Log-probability of tokens 1 … n − 1, each given those before it.
    logits : float32 [n, vocab] or None
        Where asked for.
    stats : dict
        Counts of the row (``skipkv._skipkv.Session.state``).
    trace : Trace or None
    """

    logprobs: np.ndarray
    logits: np.ndarray | None
    stats: dict[str, Any]
    trace: Trace | None


class Model:
    """A model in memory; made by `load`. Methods may run in several Python threads at once.

    Attributes
    ----------
    name : str
    config : ModelConfig
    tokenizer : Tokenizer
    generation : dict
        generation_config.json as it is.
    """

    def __init__(
        self,
        core: _skipkv.Model,
        config: ModelConfig,
        tokenizer: Tokenizer | None,
        name: str,
        generation: dict[str, Any],
        threads: int,
    ) -> None:
        self._core, self.config, self.tokenizer, self.name = core, config, tokenizer, name
        self.generation, self._n_threads = generation, threads
        self._vocabularies: dict[bool, tuple | None] = {}

    def __repr__(self) -> str:
        return f"<Model {self.name!r}: {self.config.family}, {self._core.n_bytes} bytes, {self._core.variant}>"

    @property
    def threads(self) -> int:
        """Threads that compute.

        Raises
        ------
        BackendError
            This process was forked from one whose threads had computed: they are not here, and waiting for them would
            never end.
        """
        return _may_thread(self._n_threads)

    @property
    def dtype(self) -> str:
        """Type of the weights: ``"f32"`` or ``"bf16"``."""
        return self._core.dtype

    @property
    def stop_ids(self) -> frozenset[int]:
        """eos_token_id of generation_config.json; without it, the tokenizer's."""
        eos = self.generation.get("eos_token_id")
        if eos is None:
            eos = self.tokenizer.eos_id if self.tokenizer else None
        return frozenset([eos] if isinstance(eos, int) else eos or [])

    @property
    def end_of_thinking(self) -> list[int]:
        """Ids that write ``</think>``."""
        return self.tokenizer.encode("</think>", add_special_tokens=False) if self.tokenizer else []

    def _vocabulary_for(self, method: Method) -> tuple | None:
        """Delimiters, markers and think markers, those of the released code under compat="official"."""
        official = method.compat == "official"
        if official not in self._vocabularies:
            kind = "official" if official else "auto"
            tokenizer, vocab = self.tokenizer, self.config.vocab
            self._vocabularies[official] = sentences.vocabulary(tokenizer, vocab, kind, kind) if tokenizer else None
        return self._vocabularies[official]

    @property
    def vocabulary(self) -> tuple:
        """See `skipkv.sentences.vocabulary`."""
        found = self._vocabulary_for(parse_method(None))
        if found is None:
            raise ConfigError(f"{self.name} has no tokenizer")
        return found

    # -- prompts

    def encode(self, prompt: Prompt) -> list[int]:
        """Ids of a prompt: a text, ids, or chat messages (the checkpoint's own template).

        Raises
        ------
        ConfigError
            It is none of these.
        """
        if isinstance(prompt, str):
            return self._tokenizer().encode(prompt)
        if _is_ids(prompt):
            return [int(t) for t in prompt]
        if _is_chat(prompt):
            return self._tokenizer().chat(list(prompt))
        raise ConfigError(f"prompt is {prompt!r:.80}; allowed: a text, token ids, or a list of messages")

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise ConfigError(f"{self.name} has no tokenizer; allowed: prompts as token ids")
        return self.tokenizer

    def _prompts(self, prompts: Prompt | Iterable[Prompt]) -> list[list[int]]:
        if isinstance(prompts, str) or _is_ids(prompts) or _is_chat(prompts):
            return [self.encode(prompts)]
        if isinstance(prompts, (dict, bytes)) or not isinstance(prompts, Iterable):
            raise ConfigError(f"prompts is {prompts!r:.80}; allowed: a text, token ids, messages, or many of them")
        return [self.encode(prompt) for prompt in prompts]

    # -- generate

    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        method: str | Method | None = None,
        steering: Steering | Sequence[Steering | None] | None = None,
        *,
        max_new_tokens: int = 4096,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        n: int = 1,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_ids: Iterable[int] | None = None,
        rows: int = 16,
        memory_limit: int | None = None,
        cache: str = "bf16",
        trace: bool | str = False,
        grouping: bool = False,
        padding: str = "none",
        full_length: float | None = None,
        brake: int = 0,
        progress: bool = True,
    ) -> list[Generation]:
        """Continue prompts.

        Parameters
        ----------
        prompts : text, ids, messages, or many of them
        method : str or Method
            What the cache keeps; ``full`` by default.
        steering : Steering, or one (or None) for every prompt
        max_new_tokens : int
        temperature, top_k, top_p, min_p, seed
            See `skipkv.Sampling`; greedy by default.
        n : int
            Samples of every prompt; they share one prefill.
        stop : str or sequence of str
            Texts that end a generation; left out of its text.
        stop_ids : iterable of int, optional
            Tokens that end it; those of generation_config.json by default.
        rows : int
            Sequences in flight at once.
        memory_limit : int, optional
            Bytes of cache, a hard cap; rows wait where they do not fit.
        cache : "bf16" or "f32"
            Type in which keys and values are kept.
        trace : bool or "scores"
            Record what was kept; with ``"scores"`` every candidate's scores, too.
        grouping : bool
            Static groups of prompts of similar length, as the published comparison forms them (METHOD §8).
        padding : "none" or "reserve"
            ``"reserve"`` takes what padding would hold in such a group off a row's budget.
        full_length : float, optional
            Mean length of full-cache runs; only for ``stats.compression_of_full``.
        brake : int
            k > 0: after k sentences in a row that each repeat an earlier one, α is raised to its maximum; after 2k,
            ``</think>`` is forced.
        progress : bool
            Show a bar on a terminal.

        Returns
        -------
        list of Generation
            In order of prompt, then sample. After Ctrl-C what is done, with ``finish_reason="interrupted"`` for the
            rest.

        Raises
        ------
        ConfigError, CapacityError
            Refused before anything runs; or an error of a custom score, as it was raised. Its attribute ``outputs``
            holds the generations that had ended.
        """
        request = self._request(
            prompts, method, steering, max_new_tokens=max_new_tokens, stop=stop, stop_ids=stop_ids, n=n, rows=rows,
            memory_limit=memory_limit, trace=trace, cache=cache, grouping=grouping, padding=padding,
            full_length=full_length, brake=brake,
            sampling=Sampling(temperature, top_k, top_p, min_p, seed),
        )  # fmt: skip
        run = Run(self, request)
        total = len(request.prompts) * n
        tokens = 0
        with tqdm(total=total, unit="text", desc=str(request.method), disable=None if progress else True) as bar:
            try:
                for event in run.events(stacklevel=4):
                    tokens += 1
                    if event.generation:
                        bar.update()
                    if tokens % 16 == 0:
                        bar.set_postfix(tokens=tokens, refresh=False)
            except Exception as error:
                error.outputs = run.results(complete=False)  # nothing that was finished is lost
                raise
        return run.results()

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        method: str | Method | None = None,
        steering: Any = None,
        **options: Any,
    ) -> Iterator[Event]:
        """As `generate`, but yields every piece of text as it comes; the last of each sequence holds its Generation.

        Parameters
        ----------
        prompts, method, steering, options
            As for `generate`.

        Yields
        ------
        Event
        """
        names = ("temperature", "top_k", "top_p", "min_p", "seed")
        sampling = {k: options.pop(k) for k in names if k in options}
        options.pop("progress", None)
        defaults = {"max_new_tokens": 4096, "stop": (), "stop_ids": None, "n": 1, "rows": 16, "memory_limit": None,
                    "trace": False, "cache": "bf16", "grouping": False, "padding": "none", "full_length": None,
                    "brake": 0}  # fmt: skip
        unknown = options.keys() - defaults.keys()
        if unknown:
            raise ConfigError(f"option {min(unknown)!r} is unknown; allowed: {', '.join([*defaults, *names])}")
        request = self._request(prompts, method, steering, sampling=Sampling(**sampling), **(defaults | options))
        return Run(self, request).events()

    def _request(
        self, prompts: Any, method: Any, steering: Any, *, stop: Any, stop_ids: Any, trace: Any, **o: Any
    ) -> Request:
        for name in ("max_new_tokens", "n", "rows"):
            integer(name, o[name], 1)
        integer("brake", o["brake"], 0)
        if o["memory_limit"] is not None:
            integer("memory_limit", o["memory_limit"], 1, 1 << 62)
        _one_of("cache", o["cache"], ("bf16", "f32"))
        _one_of("padding", o["padding"], ("none", "reserve"))
        _one_of("grouping", o["grouping"], (False, True))
        _one_of("trace", trace, (False, True, "scores"))
        length = o["full_length"]
        if length is not None and (isinstance(length, bool) or not isinstance(length, Real) or not 0 < length < 2**31):
            raise ConfigError(f"full_length is {length!r}; allowed: numbers above 0")
        stops = (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, Iterable) else (stop,)
        if any(not isinstance(s, str) or not s for s in stops):
            raise ConfigError(f"stop is {stop!r}; allowed: texts that are not empty")
        for name, wanted in (("brake", o["brake"]), ("stop", stops)):
            if wanted and self.tokenizer is None:
                raise ConfigError(f"{name} needs a tokenizer, which this model has not")
        if stop_ids is not None:
            many = list(stop_ids) if isinstance(stop_ids, Iterable) else [stop_ids]
            stop_ids = [integer("stop_ids", i, 0, self.config.vocab - 1) for i in many]
        encoded = self._prompts(prompts)
        if len(encoded) * o["n"] > TEXTS:
            raise ConfigError(f"{len(encoded)} prompts with n={o['n']}; allowed: up to {TEXTS} texts")
        one = steering is None or isinstance(steering, Steering) or not isinstance(steering, Iterable)
        per_prompt = [steering] * len(encoded) if one else list(steering)
        if len(per_prompt) != len(encoded) or any(s is not None and not isinstance(s, Steering) for s in per_prompt):
            raise ConfigError(f"steering: expected a Steering, or one or None for each of {len(encoded)} prompts")
        return Request(
            prompts=encoded, method=parse_method(method), steering=per_prompt, stop=stops,
            stop_ids=self.stop_ids if stop_ids is None else frozenset(stop_ids),
            trace={False: 0, True: 1, "scores": 2}[trace], **o,
        )  # fmt: skip

    # -- teacher forcing

    def _session(
        self, capacity: int, method: Method, cache: str, trace: int = 0, tokens: int = FORWARD_TOKENS
    ) -> _skipkv.Session:
        _one_of("cache", cache, ("bf16", "f32"))
        return _skipkv.Session(
            self._core, rows=1, tokens=max(1, min(tokens, capacity)), cache=cache, threads=self.threads, trace=trace,
            method=method.as_dict((self.config.n_layers, self.config.n_kv_heads)),
            vocabulary=self._vocabulary_for(method),
        )  # fmt: skip

    def _ids(self, tokens: Prompt) -> np.ndarray:
        ids = self.encode(tokens)
        if not len(ids) or len(ids) > self.config.context:
            raise ConfigError(f"text has {len(ids)} tokens; allowed: 1 to the context of {self.config.context}")
        wrong = [t for t in ids if not 0 <= t < self.config.vocab]
        if wrong:
            raise ConfigError(f"text holds token {wrong[0]}; allowed: 0 to {self.config.vocab - 1}")
        return np.array(ids, np.int32)

    def _feed(
        self,
        session: _skipkv.Session,
        row: int,
        ids: np.ndarray,
        step: Callable[[int, np.ndarray], None],
        limit: int,
    ) -> None:
        """Feed all ids in the largest chunks allowed; ``step(first, ids)`` does the forward."""
        first = 0
        while first < len(ids):
            n = session.chunk(row, min(limit, len(ids) - first))
            step(first, ids[first : first + n])
            first += n

    def logits(self, tokens: Prompt, *, cache: str = "f32") -> np.ndarray:
        """Logits at every position of a text, with the full cache.

        Parameters
        ----------
        tokens : text, ids or messages
        cache : "f32" or "bf16"

        Returns
        -------
        float32 [n, vocab]
        """
        ids = self._ids(tokens)
        session = self._session(len(ids), parse_method(None), cache)
        row = session.open(len(ids))
        out = np.empty((len(ids), self.config.vocab), np.float32)

        def step(first: int, part: np.ndarray) -> None:
            session.forward(np.array([[row, len(part)]], np.int32), part, out[first : first + len(part)], True)

        self._feed(session, row, ids, step, FORWARD_TOKENS)
        return out

    def hidden(
        self,
        tokens: Prompt,
        layers: int | Sequence[int],
        *,
        positions: int | Sequence[int] | None = None,
        cache: str = "f32",
    ) -> np.ndarray:
        """Hidden states of a text.

        Parameters
        ----------
        tokens : text, ids or messages
        layers : int or sequence of int
            ℓ: the residual stream entering block ℓ; n_layers: after the final norm.
        positions : int or sequence of int, optional
            Which tokens' states; all by default.
        cache : "f32" or "bf16"

        Returns
        -------
        float32 [len(layers), n, hidden]
        """
        ids = self._ids(tokens)
        layers = layers if isinstance(layers, Iterable) else [layers]
        wanted = np.array([integer("layers", layer, 0, self.config.n_layers) for layer in layers], np.int32)
        chosen = range(len(ids)) if positions is None else positions if isinstance(positions, Iterable) else [positions]
        where = np.array([integer("positions", p, 0, len(ids) - 1) for p in chosen], np.int64)
        session = self._session(len(ids), parse_method(None), cache)
        row = session.open(len(ids))
        out = np.empty((len(wanted), len(where), self.config.hidden), np.float32)

        def step(first: int, part: np.ndarray) -> None:
            states = np.empty((len(wanted), len(part), self.config.hidden), np.float32)
            session.forward(np.array([[row, len(part)]], np.int32), part, layers=wanted, states=states)
            here = (where >= first) & (where < first + len(part))
            out[:, here] = states[:, where[here] - first]

        self._feed(session, row, ids, step, FORWARD_TOKENS)
        return out

    def replay(
        self,
        tokens: Prompt,
        method: str | Method | None = None,
        steering: Steering | None = None,
        *,
        n_prompt: int = 1,
        sequence: tuple[int, int] = (0, 0),
        logits: bool = False,
        trace: bool | str = False,
        cache: str = "bf16",
    ) -> Replay:
        """Feed a recorded text as if it were being decoded, at prefill speed.

        Parameters
        ----------
        tokens : text, ids or messages
        method, steering
            As for `generate`.
        n_prompt : int
            How many of the tokens are the prompt.
        sequence : (int, int)
            Index of the prompt and of its sample that are replayed; ``random`` scores by them.
        logits : bool
            Return the logits of every position, too.
        trace : bool or "scores"
        cache : "bf16" or "f32"

        Returns
        -------
        Replay
        """
        ids = self._ids(tokens)
        integer("n_prompt", n_prompt, 1, len(ids))
        _one_of("trace", trace, (False, True, "scores"))
        if steering is not None and not isinstance(steering, Steering):
            raise ConfigError(f"steering is {steering!r:.80}; allowed: a Steering or None")
        if steering is not None:
            check_steering(self.config, steering)
        prompt, sample = pair("sequence", sequence)
        method = parse_method(method)
        session = self._session(len(ids), method, cache, {False: 0, True: 1, "scores": 2}[trace], LOGIT_TOKENS)
        row = session.open(
            len(ids), n_prompt=n_prompt, prompt=prompt, sample=sample,
            steering=steering.as_tuple() if steering else None,
        )  # fmt: skip
        logprobs = np.empty(len(ids) - 1)
        kept = np.empty((len(ids), self.config.vocab), np.float32) if logits else None
        buffer = np.empty((min(LOGIT_TOKENS, len(ids)), self.config.vocab), np.float32)
        alphas: dict[int, float] = {}
        held: list[tuple[int, int]] = []  # bytes after each compaction

        def step(first: int, part: np.ndarray) -> None:
            out = buffer[: len(part)] if kept is None else kept[first : first + len(part)]
            steered = session.forward(np.array([[row, len(part)]], np.int32), part, out, True)
            alphas.update((first + index, alpha) for index, alpha in steered)
            after = ids[first + 1 : first + len(part) + 1]
            logprobs[first : first + len(after)] = log_probability(out[: len(after)], after)
            state = session.state(row)
            if state["compactions"] > len(held):
                held.append((state["n_tokens"], state["live_bytes"]))

        self._feed(session, row, ids, step, LOGIT_TOKENS)
        found = None
        if trace:
            texts = self.tokenizer.token_texts if self.tokenizer else None
            compactions = [Compaction(*record[1:]) for record in session.trace()]
            settings = {"model": self.name, "steering": steering.describe() if steering else None, "replay": True}
            settings |= pages(session, method)
            found = Trace(
                ids.tolist(), [texts[i] if texts else str(i) for i in ids], n_prompt, self.config.n_layers,
                self.config.n_kv_heads, str(method), compactions, session.sentences(row)[0], alphas, held,
                settings,
            )  # fmt: skip
        return Replay(logprobs, kept, session.state(row) | {"evict_seconds": session.ledger()["evict_seconds"]}, found)


def log_probability(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log softmax(logits [n, vocab])[tokens [n]], float64 [n]."""
    if not len(tokens):
        return np.zeros(0)
    most = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - most).sum(axis=1, dtype=np.float64))
    return (logits[np.arange(len(tokens)), tokens] - most[:, 0]).astype(np.float64) - total


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray):
        return value.ndim == 1 and np.issubdtype(value.dtype, np.integer)
    return isinstance(value, (list, tuple)) and bool(value) and all(
        isinstance(t, (int, np.integer)) and not isinstance(t, bool) for t in value
    )  # fmt: skip


def _is_chat(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(m, dict) for m in value)


def integer(name: str, value: Any, low: int, high: int = 2**31 - 1) -> int:
    """The value as an int; ConfigError outside of low … high."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r:.80}; allowed: integers from {low} to {high}")
    return int(value)


def pair(name: str, value: Any, high: int = 2**31 - 1) -> tuple[int, int]:
    """Two integers from 0 to high."""
    if not isinstance(value, Sequence) or len(value) != 2:
        raise ConfigError(f"{name} is {value!r:.80}; allowed: two integers from 0")
    return integer(name, value[0], 0, high), integer(name, value[1], 0, high)


def _one_of(name: str, value: Any, allowed: Sequence) -> None:
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
