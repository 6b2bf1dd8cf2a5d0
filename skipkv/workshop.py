"""Where steering vectors come from: label the steps of reasoning texts, average the states before them (METHOD §7).

problems → generate ─┐
recorded traces ─────┴→ steps between blank lines → label → mean state per label and layer → v = execution − re-checking
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import re
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from skipkv.errors import CheckpointError, ConfigError
from skipkv.model import Model, integer
from skipkv.sentences import blank_lines, thinking
from skipkv.steering import load_vectors, save_vectors

LABELS = ("execution", "reflection", "transition")
REFLECTION = re.compile(
    r"^\s*wait|verify|make sure|hold on|think again|'s correct|'s incorrect|let me check|seems right"
)
TRANSITION = re.compile(
    r"^\s*alternatively|think differently|another (way|approach|method|solution|strategy|technique)"
)
EXAMPLES = 3  # kept of each label


def label(step: str) -> str:
    """Label of a step by its text: reflection first, then transition, else execution."""
    text = step.lower()
    return "reflection" if REFLECTION.search(text) else "transition" if TRANSITION.search(text) else "execution"


@dataclass(frozen=True)
class Step:
    """One step of the thinking: its text, and the position of the blank-line token before it."""

    text: str
    before: int


def steps(model: Model, ids: Sequence[int], n_prompt: int = 0) -> list[Step]:
    """The steps of a text's thinking. A text without ``<think>`` is taken to think from the end of its prompt on.

    Parameters
    ----------
    model : Model
        For its tokenizer.
    ids : sequence of int [T]
    n_prompt : int
    """
    pieces = [model.tokenizer.token_bytes[i] for i in ids]
    inside, opened = thinking(ids, model.vocabulary)
    if not opened:
        ends = np.flatnonzero(thinking(ids, model.vocabulary, begun=True)[0] == 0)
        end = next((int(e) for e in ends if e >= n_prompt), len(ids))
        inside = np.zeros(len(ids), bool)
        inside[n_prompt:end] = True
    found = []
    blank = blank_lines(ids, model.vocabulary)
    position = 0
    while position < len(ids):
        if not inside[position] or not (position and blank[position - 1]):
            position += 1
            continue
        end = position
        while end < len(ids) and inside[end] and not blank[end]:
            end += 1
        text = b"".join(pieces[position : end + 1 if end < len(ids) and inside[end] else end]).decode(
            "utf-8", "replace"
        )
        if text.strip():
            found.append(Step(text, position - 1))
        position = max(end, position + 1)
    return found


@dataclass
class Extraction:
    """Vectors and what they were made of.

    Attributes
    ----------
    vectors : dict of float32 [hidden] by layer
    counts : dict
        Steps of each label.
    norms : dict
        By layer: length of the vector, of the mean execution state, of the mean re-checking state.
    examples : dict
        A few steps of each label.
    """

    vectors: dict[int, np.ndarray]
    counts: dict[str, int]
    norms: dict[int, tuple[float, float, float]]
    examples: dict[str, list[str]] = field(default_factory=dict)

    def save(self, path: str, model: str) -> None:
        """Write safetensors with everything but the vectors in the metadata."""
        metadata = {"model": model, "counts": self.counts, "norms": self.norms, "examples": self.examples}
        save_vectors(path, self.vectors, {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()})


def extract(
    model: Model, texts: Iterable[tuple[Sequence[int], int]], layers: Sequence[int], progress: bool = True
) -> Extraction:
    """Steering vectors from texts, each read in one prefill.

    Parameters
    ----------
    model : Model
    texts : iterable of (ids, tokens of the prompt)
    layers : sequence of int
        Blocks before which the states are taken.
    progress : bool

    Raises
    ------
    ConfigError
        There is no step of execution, or none of re-checking.
    """
    layers = sorted(set(layers))
    sums = {name: np.zeros((len(layers), model.config.hidden)) for name in LABELS}
    counts = dict.fromkeys(LABELS, 0)
    examples: dict[str, list[str]] = {name: [] for name in LABELS}
    for ids, n_prompt in tqdm(list(texts), unit="text", desc="extract", disable=None if progress else True):
        found = steps(model, ids, n_prompt)
        if not found:
            continue
        states = model.hidden(ids, layers, positions=[step.before for step in found])
        for i, step in enumerate(found):
            name = label(step.text)
            sums[name] += states[:, i]
            counts[name] += 1
            if len(examples[name]) < EXAMPLES:
                examples[name].append(step.text.strip()[:200])
    rechecks = counts["reflection"] + counts["transition"]
    if not counts["execution"] or not rechecks:
        raise ConfigError(
            f"texts: expected steps of execution and of re-checking, found {counts['execution']} and {rechecks}"
        )
    execution = sums["execution"] / counts["execution"]
    recheck = (sums["reflection"] + sums["transition"]) / rechecks
    vectors = {layer: (execution[i] - recheck[i]).astype(np.float32) for i, layer in enumerate(layers)}
    norms = {
        layer: tuple(float(np.linalg.norm(x[i])) for x in (execution - recheck, execution, recheck))
        for i, layer in enumerate(layers)
    }
    return Extraction(vectors, counts, norms, examples)


# -- released vectors: a torch.save archive, read without running what is pickled


STORAGES = {
    "FloatStorage": np.dtype("<f4"),
    "HalfStorage": np.dtype("<f2"),
    "BFloat16Storage": np.dtype("<u2"),
    "DoubleStorage": np.dtype("<f8"),
}


class _Reader(pickle.Unpickler):
    """Knows tensors and nothing else: any other name in the file is refused before anything is called."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self.path, self.archive, self.root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name in STORAGES:
            return name
        raise CheckpointError(f"{self.path}: expected a tensor, found {module}.{name}")

    def persistent_load(self, key: Any) -> np.ndarray:
        kind, storage, name, _, _ = key
        if kind != "storage" or storage not in STORAGES or not str(name).isdigit():
            raise CheckpointError(f"{self.path}: expected a tensor's storage, found {key!r:.80}")
        raw = np.frombuffer(self.archive.read(f"{self.root}/data/{name}"), STORAGES[storage])
        return (
            (raw.astype(np.uint32) << 16).view(np.float32) if storage == "BFloat16Storage" else raw.astype(np.float32)
        )


def _rebuild(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    shape = tuple(int(n) for n in shape)
    if prod(shape) + int(offset) > len(storage) or any(int(s) < 0 for s in stride):
        raise ValueError("a tensor beyond its storage")
    last = int(offset) + sum((n - 1) * int(s) for n, s in zip(shape, stride, strict=True) if n)
    if last >= len(storage):
        raise ValueError("a tensor beyond its storage")
    return np.lib.stride_tricks.as_strided(storage[int(offset) :], shape, [int(s) * 4 for s in stride]).copy()


def read_torch_tensor(path: str | Path) -> np.ndarray:
    """A tensor that ``torch.save`` wrote, as float32; no torch, and no code of the file is run.

    Raises
    ------
    CheckpointError
        It is something else.
    """
    path = Path(path)
    try:
        with zipfile.ZipFile(path) as archive:
            root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
            tensor = _Reader(path, archive, root).load()
    except zipfile.BadZipFile:
        raise CheckpointError(
            f"{path}: expected a zip archive of torch.save, found something else (older formats are not read)"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path}: expected a tensor of torch.save: {error}") from None
    if not isinstance(tensor, np.ndarray):
        raise CheckpointError(f"{path}: expected one tensor, found {type(tensor).__name__}")
    return tensor


def import_released(path: str | Path, layer: int, out: str, negate: bool = True) -> np.ndarray:
    """Convert a released vector (re-checking − execution, the negative of ours) to safetensors; returns ours."""
    tensor = read_torch_tensor(path)
    vector = tensor.reshape(-1) if prod(tensor.shape) == max(tensor.shape, default=0) else None
    if vector is None or not np.isfinite(vector).all():
        raise CheckpointError(f"{path}: expected finite numbers [hidden], found shape {list(tensor.shape)}")
    vector = -vector if negate else vector
    save_vectors(out, {layer: vector}, {"source": Path(path).name, "negated": str(negate).lower()})
    return vector


# -- command line


def _calibration(model: Model, args: argparse.Namespace) -> list[tuple[list[int], int]]:
    from skipkv.compare import json_lines, read_texts

    if args.traces:
        return list(zip(*read_texts(model, args.traces, args.tokens, args.limit), strict=True))
    prompts: list[Any] = []
    if args.limit is not None and args.limit < 1:
        raise ConfigError(f"limit is {args.limit}; allowed: integers from 1")
    for number, value in islice(json_lines(args.problems), args.limit):
        try:
            text = value.get("prompt")
            prompts.append(text if text else [{"role": "user", "content": args.template.format(value["problem"])}])
        except (KeyError, TypeError, AttributeError):
            raise ConfigError(
                f"{args.problems}: line {number}: expected an object with a prompt or a problem"
            ) from None
    outs = model.generate(
        prompts, max_new_tokens=args.max_new_tokens, temperature=args.temperature, seed=args.seed, rows=args.rows
    )
    return [(out.prompt_tokens + out.tokens, len(out.prompt_tokens)) for out in outs]


def _extract(args: argparse.Namespace) -> int:
    from skipkv.model import load

    model = load(args.model, threads=args.threads, progress=not args.quiet)
    try:
        layers = range(model.config.n_layers) if args.layers == "all" else [int(x) for x in args.layers.split(",")]
    except ValueError:
        raise ConfigError(f"layers is {args.layers!r}; allowed: integers separated by commas, or all") from None
    for layer in layers:
        integer("layer", layer, 0, model.config.n_layers - 1)
    found = extract(model, _calibration(model, args), layers, progress=not args.quiet)
    found.save(args.out, model.name)
    if not args.quiet:
        print(f"{args.out}: " + ", ".join(f"{n} {name}" for name, n in found.counts.items()), file=sys.stderr)
    return 0


def _show(args: argparse.Namespace) -> int:
    vectors, metadata = load_vectors(args.file)
    layers = sorted(vectors)
    unit = {layer: vectors[layer] / max(float(np.linalg.norm(vectors[layer])), 1e-30) for layer in layers}
    cosines = [[float(unit[a] @ unit[b]) for b in layers] for a in layers]
    known = {k: json.loads(v) for k, v in metadata.items() if k in ("counts", "norms", "examples")}
    if args.json:
        norms = {layer: float(np.linalg.norm(vectors[layer])) for layer in layers}
        print(
            json.dumps(
                {
                    "layers": layers,
                    "hidden": len(vectors[layers[0]]),
                    "vector_norms": norms,
                    "cosines": cosines,
                    **metadata,
                    **known,
                }
            )
        )
        return 0
    print(
        f"{args.file}: {metadata.get('model', metadata.get('source', 'of unknown origin'))}, "
        f"hidden {len(vectors[layers[0]])}"
    )
    if "counts" in known:
        print("steps: " + ", ".join(f"{n} {name}" for name, n in known["counts"].items()))
    for layer in layers:
        norms = known.get("norms", {}).get(str(layer))
        more = f", mean states {norms[1]:.3g} (execution) and {norms[2]:.3g} (re-checking)" if norms else ""
        print(f"layer {layer}: norm {np.linalg.norm(vectors[layer]):.4g}{more}")
    if len(layers) > 1:
        print("cosine between layers\n" + " " * 6 + "".join(f"{layer:7d}" for layer in layers))
        for layer, row in zip(layers, cosines, strict=True):
            print(f"{layer:6d}" + "".join(f"{c:7.2f}" for c in row))
    for name, texts in known.get("examples", {}).items():
        for text in texts:
            print(f"{name}: {' '.join(text.split())}")
    return 0


def _import(args: argparse.Namespace) -> int:
    vector = import_released(args.file, args.layer, args.out, negate=not args.keep_sign)
    print(f"{args.out}: layer {args.layer}, hidden {len(vector)}, norm {np.linalg.norm(vector):.4g}", file=sys.stderr)
    return 0


def add_commands(
    command: Callable[..., argparse.ArgumentParser], add_model: Callable[[argparse.ArgumentParser], None]
) -> None:
    """The subcommands of ``skipkv steer``."""
    e = command(
        "extract", _extract, "Make steering vectors from problems (which are run) or recorded traces (which are read)."
    )
    add_model(e)
    source = e.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--problems", metavar="FILE", help="JSON lines with a prompt, or a problem for the chat template"
    )
    source.add_argument(
        "--traces", metavar="FILE", help="JSON lines: texts, or objects with a text, or with prompt and output"
    )
    e.add_argument("--layers", default="all", help="comma-separated; all by default")
    e.add_argument("-o", "--out", required=True, metavar="FILE.safetensors")
    e.add_argument("--limit", type=int, help="only the first problems or traces")
    e.add_argument("--tokens", type=int, help="only the first tokens of each trace")
    e.add_argument(
        "--template",
        default="{}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
        help="{} is the problem",
    )
    e.add_argument("--max-new-tokens", type=int, default=4096)
    e.add_argument("--temperature", type=float, default=0.0)
    e.add_argument("--seed", type=int, default=0)
    e.add_argument("--rows", type=int, default=16)
    s = command("show", _show, "Print counts, norms, cosines and examples of a file of vectors.")
    s.add_argument("file", help="of steer extract or steer import; or tiny, the vector in the box")
    s.add_argument("--json", action="store_true")
    i = command("import", _import, "Convert a released .pt vector, without running code of it; its sign is turned.")
    i.add_argument("file")
    i.add_argument("--layer", type=int, required=True)
    i.add_argument("--keep-sign", action="store_true", help="it is execution − re-checking already")
    i.add_argument("-o", "--out", required=True, metavar="FILE.safetensors")
