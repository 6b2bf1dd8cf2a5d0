"""Where steering vectors come from: label the steps of reasoning texts, average the states before them (METHOD §7).

problems → generate ─┐
recorded traces ─────┴→ steps between blank lines → label → mean state per label and layer → v = execution − re-checking
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from skipkv.checks import instance, integer, integers, many, no_bar, text_of, wrong
from skipkv.errors import ConfigError, warn
from skipkv.model import Model
from skipkv.sentences import blank_lines, joined, thinking
from skipkv.steering import save_vectors

LABELS = ("execution", "reflection", "transition")
REFLECTION = re.compile(r"^\s*wait|verify|make sure|hold on|think again|'s (in)?correct|let me check|seems right")
TRANSITION = re.compile(
    r"^\s*alternatively|think differently|another (way|approach|method|solution|strategy|technique)"
)
THINK = re.compile(rb"</?think>")
EXAMPLES = 3  # kept of each label


def label(step: str) -> str:
    """Label of a step by its text: reflection first, then transition, else execution."""
    text = text_of("step", step).lower()
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
    vocabulary = instance("model", model, Model).vocabulary
    ids = integers("ids", ids, 0, model.config.vocab - 1)
    integer("n_prompt", n_prompt, 0, len(ids))
    joint, starts = joined([model.tokenizer.token_bytes[i] for i in ids])
    raw, at = joint.tobytes(), np.arange(len(ids))
    markers = [marker.span() for marker in THINK.finditer(raw)]
    if b"<think>" in raw:
        inside = thinking(ids, vocabulary)
    else:
        closed = [end for _, end in markers if end > starts[n_prompt]]
        inside = (at >= n_prompt) & (starts[1:] < min(closed, default=np.inf))
    found = []
    blank = blank_lines(ids, vocabulary)
    for before in np.flatnonzero(blank[:-1] & inside[1:]).tolist():
        # A blank line belongs to the step that it ends, a marker does not, wherever in a token it begins.
        first, ends = starts[before + 1], starts[1:][blank & (at > before)]
        ends = [*ends[:1], *[begin for begin, end in markers if end > first][:1]]
        text = raw[first : min(ends, default=None)].decode("utf-8", "replace")
        if text.strip():
            found.append(Step(text, before))
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
        There is no step of execution, or none of re-checking; or their states are the same before all layers. A layer
        of which that is so is left out, with a warning.
    """
    layers = sorted(set(integers("layers", layers, 0, instance("model", model, Model).config.n_layers - 1)))
    quiet, pairs = no_bar(progress), many(texts)
    for pair in pairs:
        if not isinstance(pair, tuple) or len(pair) != 2:
            raise wrong("texts", pair, "pairs of ids and how many of them are the prompt")
    sums = np.zeros((2, len(layers), model.config.hidden))  # of states of execution, of re-checking
    counts = dict.fromkeys(LABELS, 0)
    examples: dict[str, list[str]] = {name: [] for name in LABELS}
    for ids, n_prompt in tqdm(pairs, unit="text", desc="extract", disable=quiet):
        found = steps(model, ids, n_prompt)
        if not found:
            continue
        states = model.hidden(ids, layers, positions=[step.before for step in found])
        for i, step in enumerate(found):
            name = label(step.text)
            sums[int(name != "execution")] += states[:, i]
            counts[name] += 1
            if len(examples[name]) < EXAMPLES:
                examples[name].append(step.text.strip()[:200])
    rechecks = counts["reflection"] + counts["transition"]
    if not counts["execution"] or not rechecks:
        raise ConfigError(
            f"texts: expected steps of execution and of re-checking, found {counts['execution']} and {rechecks}"
        )
    execution, recheck = sums[0] / counts["execution"], sums[1] / rechecks
    vectors = {layer: (execution[i] - recheck[i]).astype(np.float32) for i, layer in enumerate(layers)}
    vectors = {layer: vector for layer, vector in vectors.items() if vector.any()}
    alike = [layer for layer in layers if layer not in vectors]
    if alike:  # the first layer's, where one token of the vocabulary ends all blank lines
        what = f"the states before layers {', '.join(map(str, alike))} are the same at all blank lines"
        if not vectors:
            raise ConfigError(f"{what}; allowed: at least one layer where they differ")
        warn(f"{what}; these are left out")
    norms = {
        layer: tuple(float(np.linalg.norm(x[i])) for x in (execution - recheck, execution, recheck))
        for i, layer in enumerate(layers) if layer in vectors
    }  # fmt: skip
    return Extraction(vectors, counts, norms, examples)
