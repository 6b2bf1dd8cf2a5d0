"""A loaded model: generate, stream, logits, hidden, replay."""

import inspect
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
from tqdm import tqdm

from skipkv import _skipkv, devices
from skipkv.checks import CONSTANTS, flag, integer, integers, no_bar, one_of, pair, path_of
from skipkv.engine import FORWARD_TOKENS, Engine, Prompt, Recorder, Row, chunks, count_threads, trace_level
from skipkv.errors import CheckpointError, ConfigError
from skipkv.load.checkpoint import CONFIG, GENERATION, Checkpoint, open_checkpoint
from skipkv.load.files import read_object
from skipkv.load.tokenizer import Tokenizer
from skipkv.methods import Method, parse_method
from skipkv.results import Event, Generation, Replay
from skipkv.run import Interrupt, Options, Run, choose
from skipkv.steering import Steering

LOGIT_TOKENS = 128  # of one forward where every token's logits are wanted: they are wide


def load(
    source: str | os.PathLike[str], device: str = "cpu", dtype: str = "auto", threads: int | None = None,
    progress: bool = True,
) -> "Model":  # fmt: skip
    """Load a checkpoint.

    Parameters
    ----------
    source : str or path
        A directory as transformers saves it, a Hugging Face hub id, or ``"tiny"``, the model that comes with skipkv.
    device : str
        ``"cpu"``, ``"cuda"`` (the first CUDA device) or ``"cuda:N"``; ``skipkv devices`` lists them. The variant of
        the CPU's kernels is the best that it runs; ``SKIPKV_CPU=generic|avx2|avx512|avx512vnni|avx512bf16`` in the
        environment forces one.
    dtype : str
        Of the weights: ``"auto"`` (bf16 if the matrices are stored so, else f32), ``"f32"``, ``"bf16"``; on
        the CPU also ``"q8"`` (8 bits each and a scale for 32) and ``"bf16a16"`` (bf16 that meet activations rounded
        to bf16, which AVX512-BF16 multiplies twice as fast).
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
    if not isinstance(source, str):
        path_of("source", source, "a directory, a hub id, or tiny")
    flag("progress", progress)
    where = devices.find(device)
    one_of("dtype", dtype, ["auto", *CONSTANTS["weight_dtypes"]], str)
    with open_checkpoint(source) as checkpoint:
        tokenizer = Tokenizer(checkpoint.path, checkpoint.config.vocab)
        kind = checkpoint.dtype if dtype == "auto" else dtype
        core = _skipkv.Model(checkpoint.config.as_dict(), kind, *where)
        eos, count = _eos(checkpoint), count_threads(threads)
        model = Model(
            core, checkpoint.config, tokenizer, checkpoint.name, checkpoint.generation, count, eos, checkpoint.path
        )
        _bind(core, checkpoint, model.threads, progress)
        if progress:
            print(
                f"{checkpoint.name}: {checkpoint.config.family}, {checkpoint.n_parameters / 1e6:.1f} M parameters, "
                f"{core.n_bytes / 1e6:.1f} MB as {kind}, {core.variant}, {model.threads} threads", file=sys.stderr,
            )  # fmt: skip
        return model


def _eos(checkpoint: Checkpoint) -> int | list[int] | None:
    """eos_token_id of generation_config.json, or else of config.json."""
    file, eos, vocab = GENERATION, checkpoint.generation.get("eos_token_id"), checkpoint.config.vocab
    if eos is None:
        file, eos = CONFIG, read_object(checkpoint.path / CONFIG).get("eos_token_id")
    for i in eos if isinstance(eos, list) else [] if eos is None else [eos]:
        if type(i) is not int or not 0 <= i < vocab:
            where = f"{checkpoint.path / file}: eos_token_id is {eos!r:.80}"
            raise CheckpointError(f"{where}; allowed: an id from 0 to {vocab - 1}, or a list of such")
    return eos


def _bind(core: _skipkv.Model, checkpoint: Checkpoint, threads: int, progress: bool) -> None:
    """Read and pack tensor by tensor, so that only one is held twice."""
    with tqdm(
        total=checkpoint.n_bytes, unit="B", unit_scale=True, desc=checkpoint.name, leave=False, disable=no_bar(progress)
    ) as bar:
        for name, tensor in checkpoint.tensors.items():
            core.bind(name, tensor.dtype.lower(), tensor.shape, checkpoint.read(name), threads)
            bar.update(tensor.n_bytes)


def _with_options(function: Callable) -> Callable:
    """Shows the fields of `Options`, with their defaults, where ``**options`` stands in a signature."""
    signature = inspect.signature(function)
    known = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    shown = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type)
             for f in fields(Options)]  # fmt: skip
    function.__signature__ = signature.replace(parameters=known + shown)
    return function


class Model(Engine):
    """A model in memory; made by `load`. Methods may run in several Python threads at once.

    Attributes
    ----------
    name : str
    config : ModelConfig
    tokenizer : Tokenizer or None
    generation : dict
        generation_config.json as it is.
    """

    # -- generate

    @_with_options
    def generate(
        self, prompts: Prompt | Iterable[Prompt], method: str | Method | None = None,
        steering: Steering | Sequence[Steering | None] | None = None, *, progress: bool = True, **options: Any,
    ) -> list[Generation]:  # fmt: skip
        """Continue prompts.

        Parameters
        ----------
        prompts : text, ids, messages, or many of them
        method : str or Method
            What the cache keeps; ``full`` by default.
        steering : Steering, or one (or None) for every prompt
        progress : bool
            Show a bar on a terminal.
        options
            See `skipkv.Options`: sampling, lengths and stops, samples and rows, memory, trace.

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
        run = self._run(prompts, method, steering, **options)
        total, tokens, quiet = len(run.queue), 0, no_bar(progress)
        try:
            with Interrupt() as interrupt, tqdm(total=total, unit="text", desc=str(run.method), disable=quiet) as bar:
                for event in run.steps(interrupt):
                    tokens += 1
                    if event.generation:
                        bar.update()
                    if tokens % 16 == 0:
                        bar.set_postfix(tokens=tokens, refresh=False)
                return run.results()
        except BaseException as error:
            error.outputs = run.results()  # nothing that was finished is lost
            raise

    @_with_options
    def stream(
        self, prompts: Prompt | Iterable[Prompt], method: str | Method | None = None,
        steering: Steering | Sequence[Steering | None] | None = None, *, progress: bool = True, **options: Any,
    ) -> Iterator[Event]:  # fmt: skip
        """As `generate`, but yields every piece of text as it comes; the last of each sequence holds its Generation.

        Parameters are those of `generate`; ``progress`` is without effect: the events are the progress. Ctrl-C ends the
        texts while the stream works; between two events it is the caller's.
        """
        return self._run(prompts, method, steering, **options).events()

    def _run(self, prompts: Any, method: Any, steering: Any, **options: Any) -> Run:
        chosen = choose(self, options)  # refused before anything is encoded
        return Run(self, self.encode_all(prompts, chosen.template), parse_method(method), steering, chosen)

    # -- teacher forcing

    def _ids(self, tokens: Prompt) -> np.ndarray:
        ids = self.encode(tokens)
        if not len(ids) or len(ids) > self.config.context:
            raise ConfigError(f"text has {len(ids)} tokens; allowed: 1 to {self.config.reach}")
        self.check_ids("text", ids)
        return np.array(ids, np.int32)

    def logits(self, tokens: Prompt, *, cache: str = "f32") -> np.ndarray:
        """Logits at every position of a text, with the full cache.

        Parameters
        ----------
        tokens : text, ids or messages
        cache : "f32", "bf16" or "q8"

        Returns
        -------
        float32 [n, vocab]
        """
        return self.replay(tokens, logits=True, cache=cache).logits

    def hidden(
        self, tokens: Prompt, layers: int | Sequence[int], *, positions: int | Sequence[int] | None = None,
        cache: str = "f32",
    ) -> np.ndarray:  # fmt: skip
        """Hidden states of a text.

        Parameters
        ----------
        tokens : text, ids or messages
        layers : int or sequence of int
            ℓ: the residual stream entering block ℓ; n_layers: after the final norm.
        positions : int or sequence of int, optional
            Which tokens' states; all by default.
        cache : "f32", "bf16" or "q8"

        Returns
        -------
        float32 [len(layers), n, hidden]
        """
        ids = self._ids(tokens)
        wanted = np.array(integers("layers", layers, 0, self.config.n_layers), np.int32)
        chosen = range(len(ids)) if positions is None else positions
        where = np.array(integers("positions", chosen, 0, len(ids) - 1), np.int64)
        session = self._session(parse_method(None), cache, tokens=min(FORWARD_TOKENS, len(ids)))
        row = Row(session.open(len(ids)), len(ids), None)
        out = np.empty((len(wanted), len(where), self.config.hidden), np.float32)
        for at, spans in chunks(session, row, ids, FORWARD_TOKENS):
            states = np.empty((len(wanted), at.stop - at.start, self.config.hidden), np.float32)
            session.forward(spans, ids[at], layers=wanted, states=states)
            here = (where >= at.start) & (where < at.stop)
            out[:, here] = states[:, where[here] - at.start]
        return out

    def replay(
        self, tokens: Prompt, method: str | Method | None = None, steering: Steering | None = None, *,
        n_prompt: int = 1, sequence: tuple[int, int] = (0, 0), logits: bool = False, trace: bool | str = False,
        cache: str = "bf16",
    ) -> Replay:  # fmt: skip
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
        cache : "bf16", "f32" or "q8"

        Returns
        -------
        Replay
        """
        ids = self._ids(tokens)
        integer("n_prompt", n_prompt, 1, len(ids))
        flag("logits", logits)
        level = trace_level(trace)
        self.check_steering(steering)
        prompt, sample = pair("sequence", sequence)
        method = parse_method(method)
        session = self._session(method, cache, tokens=min(LOGIT_TOKENS, len(ids)), trace=level)
        number = session.open(
            len(ids), n_prompt=n_prompt, prompt=prompt, sample=sample,
            steering=steering.as_tuple() if steering else None,
        )  # fmt: skip
        row, recorder = Row(number, n_prompt, steering), Recorder(self, session, method)
        logprobs = np.empty(len(ids) - 1)
        n_logits = len(ids) if logits else min(LOGIT_TOKENS, len(ids))  # all are kept, or those of one forward
        kept = np.empty((n_logits, self.config.vocab), np.float32)
        for at, spans in chunks(session, row, ids, LOGIT_TOKENS):
            out = kept[at] if logits else kept[: at.stop - at.start]
            steered = session.forward(spans, ids[at], out, True)
            recorder.note([(row, at.stop - at.start)], steered)
            after = ids[at.start + 1 : at.stop + 1]
            logprobs[at.start : at.start + len(after)] = log_probability(out[: len(after)], after)
        return Replay(
            method, steering, logprobs, kept if logits else None, recorder.stats(row, len(ids)),
            recorder.trace(row, ids, replay=True) if trace else None,
        )  # fmt: skip


def log_probability(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log softmax(logits [n, vocab])[tokens [n]], float64 [n]."""
    if not len(tokens):
        return np.zeros(0)
    most = logits.max(axis=1, keepdims=True)
    total = np.log(np.exp(logits - most).sum(axis=1, dtype=np.float64))
    return (logits[np.arange(len(tokens)), tokens] - most[:, 0]).astype(np.float64) - total
