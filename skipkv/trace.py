"""What a run kept, compaction by compaction, with the numbers that decided; one .npz that needs no model to be read."""

import io
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from skipkv.checks import integer, path_of
from skipkv.errors import CheckpointError, ConfigError
from skipkv.load.files import open_file, what_is
from skipkv.methods import Method, parse_method
from skipkv.writing import write_whole

FORMAT = 1
DEFLATED = 1032  # bytes that one of a deflated file becomes at most
SCORES = ("importance", "redundancy", "penalty", "score")
HEAD = ("texts", "n_prompt", "n_layers", "n_kv_heads", "sentences", "bytes", "settings")  # stored as JSON, as they are


class Sentence(NamedTuple):
    """One finished sentence of a row."""

    first: int  # position
    last: int  # position, included
    closed: int  # position of the delimiter that closed it
    thought: int  # 1: one of re-checking, 0: of execution
    similarity: float  # λ: to the later sentence that repeats it best; 0 where none does (it is not flagged)
    repeats: int  # 1 where it repeats an earlier one, else 0


@dataclass(frozen=True)
class StoredMethod:
    """A method of a file that cannot be made again: a score of one's own, or what another version knew."""

    text: str  # as it was written

    @property
    def name(self) -> str:
        return self.text.partition(":")[0]

    @property
    def parameters(self) -> dict[str, str]:
        """Value of each parameter, as it was written."""
        parts = filter(None, self.text.partition(":")[2].split(","))
        return {name: value for name, _, value in (part.partition("=") for part in parts)}

    @property
    def evict(self) -> bool:
        return self.parameters.get("evict") != "False"

    def __str__(self) -> str:
        return self.text


def read_method(text: str) -> Method | StoredMethod:
    """The method that a file names."""
    try:
        return parse_method(text)
    except ConfigError:
        return StoredMethod(text)


@dataclass(frozen=True, eq=False)
class Compaction:
    """One KV head of one compaction.

    Attributes
    ----------
    step : int
        Tokens of the row fed so far, the prompt included.
    layer, head : int
    before : int
        Slots held before.
    kept : int32 [n_kept]
        Positions of the slots that stayed.
    scores : dict of float32 [n_candidates], or None
        Importance, redundancy, penalty (as the method has them) and score of the candidates: the oldest slots held
        before, in their order.
    """

    step: int
    layer: int
    head: int
    before: int
    kept: np.ndarray
    scores: dict[str, np.ndarray] | None = None


@dataclass(eq=False)
class Trace:
    """The history of one row's cache.

    Attributes
    ----------
    tokens, texts : list
        Ids of the row, the prompt included, and the text of each.
    n_prompt, n_layers, n_kv_heads : int
    method : Method or StoredMethod
        Its string will do, too; what cannot be made from it stays a `StoredMethod`.
    compactions : list of Compaction
        In order of step, layer, head.
    sentences : list of Sentence
    alphas : dict
        Position of each steered token → α.
    bytes : list of (step, bytes)
        Cache bytes of the row after each compaction.
    settings : dict
        Whatever else the run was made with.
    """

    tokens: list[int]
    texts: list[str]
    n_prompt: int
    n_layers: int
    n_kv_heads: int
    method: Method | StoredMethod
    compactions: list[Compaction] = field(default_factory=list)
    sentences: list[Sentence] = field(default_factory=list)
    alphas: dict[int, float] = field(default_factory=dict)
    bytes: list[tuple[int, int]] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.method, str):
            self.method = read_method(self.method)

    @property
    def steps(self) -> list[int]:
        """The steps at which something was compacted, ascending."""
        return sorted({c.step for c in self.compactions})

    def at(self, step: int) -> Iterator[Compaction]:
        """The heads compacted at this step."""
        return (c for c in self.compactions if c.step == step)

    def held(self, step: int, layer: int, head: int) -> np.ndarray:
        """Positions that a head holds once ``step`` tokens are fed and the compaction due then is done; ascending."""
        integer("step", step, 0, len(self.tokens))
        integer("layer", layer, 0, self.n_layers - 1)
        integer("head", head, 0, self.n_kv_heads - 1)
        done = [c for c in self.compactions if (c.layer, c.head) == (layer, head) and c.step <= step]
        last = max(done, key=lambda c: c.step, default=None)
        if last is None:
            return np.arange(step, dtype=np.int32)
        return np.concatenate([np.sort(last.kept), np.arange(last.step, step, dtype=np.int32)])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one compressed .npz."""
        head = {name: getattr(self, name) for name in HEAD}
        head |= {"format": FORMAT, "method": str(self.method), "alphas": sorted(self.alphas.items())}
        names = [name for name in SCORES if any(name in (c.scores or {}) for c in self.compactions)]
        index = [(c.step, c.layer, c.head, c.before, len(c.kept)) for c in self.compactions]
        arrays = {
            "head": np.array(json.dumps(head)),
            "tokens": np.array(self.tokens, np.int32),
            "index": np.array(index, np.int32).reshape(-1, 5),
            "kept": np.concatenate([np.zeros(0, np.int32), *(c.kept for c in self.compactions)]),
            "n_scores": np.array([len(c.scores["score"]) if c.scores else 0 for c in self.compactions], np.int32),
        }  # fmt: skip
        for name in names:
            arrays[name] = np.concatenate([c.scores[name] for c in self.compactions if c.scores])
        file = io.BytesIO()
        np.savez_compressed(file, **arrays)
        write_whole(path, file.getbuffer())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Trace":
        """Read what `save` wrote.

        Raises
        ------
        CheckpointError
            The file is not such a trace, or there is none.
        """
        path = path_of("path", path)
        with open_file(path) as raw:
            found = what_is(raw, archive=True) or "something else"
            if zipfile.is_zipfile(raw):  # NumPy takes what is none for a pickle, and advises to load it
                raw.seek(0)
                try:
                    return cls._read(raw, path)
                except CheckpointError:
                    raise
                except Exception as error:  # what NumPy and zipfile raise for a broken file has no common base
                    found = f"something else ({error!r:.200})"
            raise CheckpointError(f"{path}: expected a skipkv trace, found {found}")

    @classmethod
    def _read(cls, raw: BinaryIO, path: Path) -> "Trace":
        claimed = sum(info.file_size for info in zipfile.ZipFile(raw).infolist())
        if claimed > DEFLATED * (held := os.fstat(raw.fileno()).st_size):
            raise CheckpointError(f"{path}: expected arrays that {held} bytes can hold, found {claimed} bytes of them")
        raw.seek(0)
        with np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        head = json.loads(str(arrays["head"]))
        if head["format"] != FORMAT:
            raise CheckpointError(f"{path}: expected a trace of format {FORMAT}, found {head['format']!r}")
        names = [name for name in SCORES if name in arrays]
        _check(head, arrays, names)
        index, n_scores = arrays["index"].tolist(), arrays["n_scores"]
        kept = np.split(arrays["kept"], np.cumsum(arrays["index"][:-1, 4]))
        scores = [np.split(arrays[name], np.cumsum(n_scores[:-1])) for name in names]
        compactions = [
            Compaction(*where, kept[i], dict(zip(names, (s[i] for s in scores), strict=True)) if n_scores[i] else None)
            for i, (*where, _) in enumerate(index)
        ]
        values = {name: head[name] for name in (*HEAD, "method")} | {
            "sentences": [Sentence(*s) for s in head["sentences"]],
            "alphas": {int(position): alpha for position, alpha in head["alphas"]},
            "bytes": [tuple(b) for b in head["bytes"]],
        }
        return cls(tokens=arrays["tokens"].tolist(), compactions=compactions, **values)


def _check(head: dict[str, Any], arrays: dict[str, np.ndarray], names: list[str]) -> None:
    """What would otherwise be read as something else; ValueError."""
    index, n_scores, tokens = arrays["index"], arrays["n_scores"], arrays["tokens"]
    integers = (("tokens", "i", 1), ("index", "i", 2), ("kept", "i", 1), ("n_scores", "i", 1))
    for name, kind, n_axes in (*integers, *((name, "f", 1) for name in names)):
        if arrays[name].dtype.kind != kind or arrays[name].ndim != n_axes:
            raise ValueError(f"{name} is {arrays[name].dtype} {list(arrays[name].shape)}")
    if index.shape[1] != 5 or len(n_scores) != len(index) or index.min(initial=0) < 0 or n_scores.min(initial=0) < 0:
        raise ValueError(f"index is {list(index.shape)}, n_scores {list(n_scores.shape)}")
    for name, counts in (("kept", index[:, 4]), *((name, n_scores) for name in names)):
        if len(arrays[name]) != counts.sum():
            raise ValueError(f"{name} holds {len(arrays[name])} numbers, expected {counts.sum()}")
    if (names or n_scores.any()) and "score" not in names:
        raise ValueError(f"there is no score beside {', '.join(names) or 'n_scores'}")
    if len(head["texts"]) != len(tokens) or not all(isinstance(text, str) for text in head["texts"]):
        raise ValueError(f"{len(head['texts'])} texts, {len(tokens)} tokens")
    wrong = [name for name in ("n_prompt", "n_layers", "n_kv_heads") if not isinstance(head[name], int)]
    if wrong or not isinstance(head["method"], str) or not isinstance(head["settings"], dict):
        raise ValueError(f"{wrong[0] if wrong else 'method or settings'} is of the wrong type")
