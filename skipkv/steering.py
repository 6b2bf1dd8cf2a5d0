"""Adaptive steering (METHOD §7): which vector is added where, how strongly."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from skipkv.checkpoint import Tensor, _map_file
from skipkv.errors import CheckpointError, ConfigError

FLOAT_MAX = float(np.finfo(np.float32).max)
SCOPES = ("think", "generation", "all")


@dataclass(frozen=True, eq=False)
class Steering:
    """x ← x + α·v before one block, for tokens whose text holds a blank line.

    Parameters
    ----------
    vector : float [hidden]
        mean(state | execution) − mean(state | re-checking).
    layer : int
        0-based index of the block before which it is added.
    alpha, gamma, alpha_max : float
        α = min(alpha + gamma · N_o, alpha_max), N_o the re-checking sentences of the thinking so far.
    scope : "think", "generation" or "all"
        Only inside ``<think> … </think>``; only generated tokens; all, the prompt's too.

    Raises
    ------
    ConfigError
        A parameter is out of range.
    """

    vector: np.ndarray = field(repr=False)
    layer: int
    alpha: float = 1.0
    gamma: float = 0.02
    alpha_max: float = 2.0
    scope: str = "think"

    def __post_init__(self) -> None:
        try:
            if np.iscomplexobj(self.vector):
                raise TypeError
            vector = np.array(self.vector, np.float32)  # a copy: the caller's may change
        except (TypeError, ValueError):
            found = type(self.vector).__name__
            raise ConfigError(f"steering vector: expected finite numbers [hidden], found {found}") from None
        if vector.ndim != 1 or not len(vector) or not np.isfinite(vector).all():
            raise ConfigError(f"steering vector: expected finite numbers [hidden], found shape {list(vector.shape)}")
        vector.setflags(write=False)
        object.__setattr__(self, "vector", vector)
        if not isinstance(self.layer, (int, np.integer)) or isinstance(self.layer, bool) or self.layer < 0:
            raise ConfigError(f"layer is {self.layer!r}; allowed: integers from 0")
        for name in ("alpha", "gamma", "alpha_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not abs(value) <= FLOAT_MAX:
                raise ConfigError(f"{name} is {value!r}; allowed: finite numbers")
        if self.scope not in SCOPES:
            raise ConfigError(f"scope is {self.scope!r}; allowed: {', '.join(SCOPES)}")

    def as_tuple(self) -> tuple:
        """As the core takes it."""
        return self.vector, int(self.layer), float(self.alpha), float(self.gamma), float(self.alpha_max), self.scope

    def describe(self) -> dict[str, Any]:
        """Settings without the vector, for traces and tables."""
        return {
            "layer": int(self.layer),
            "alpha": float(self.alpha),
            "gamma": float(self.gamma),
            "alpha_max": float(self.alpha_max),
            "scope": self.scope,
            "norm": float(np.linalg.norm(self.vector)),
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], layer: int | None = None, **parameters: Any) -> Steering:
        """From a file that `save_vectors` wrote.

        Parameters
        ----------
        path : path, or "tiny"
            A file, or the vector that comes with the model in the box.
        layer : int, optional
            Which of its layers; may be left out where the file has one.
        parameters
            As for `Steering`.
        """
        vectors, _ = load_vectors(path)
        if layer is None and len(vectors) > 1:
            raise ConfigError(f"{path}: layer is None; allowed: one of {', '.join(map(str, sorted(vectors)))}")
        chosen = next(iter(vectors)) if layer is None else layer
        if chosen not in vectors:
            raise ConfigError(f"{path}: layer is {layer!r}; allowed: {', '.join(map(str, sorted(vectors)))}")
        return cls(vectors[chosen], chosen, **parameters)


def save_vectors(path: str | os.PathLike[str], vectors: Mapping[int, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write safetensors: one float32 tensor a layer, named ``layer.N``."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    data = b""
    for layer, vector in sorted(vectors.items()):
        raw = np.ascontiguousarray(vector, np.float32).tobytes()
        header[f"layer.{layer}"] = {
            "dtype": "F32",
            "shape": [len(vector)],
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data)


def load_vectors(path: str | os.PathLike[str]) -> tuple[dict[int, np.ndarray], dict[str, str]]:
    """Vectors by layer, float32 [hidden], and the file's metadata; ``"tiny"`` is the file in the box.

    Raises
    ------
    CheckpointError
        The file is not such a file.
    """
    path = Path(str(files("skipkv.tiny") / "steering.safetensors") if path == "tiny" else path)
    mapped, tensors = _map_file(path)
    with mapped:
        vectors = {}
        for name, tensor in tensors.items():
            layer = name.removeprefix("layer.")
            number = layer != name and re.fullmatch(r"[0-9]{1,9}", layer)
            if not number or tensor.dtype != "F32" or len(tensor.shape) != 1:
                found = f"{name!r} {tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(f"{path}: expected tensors layer.N of F32 [hidden], found {found}")
            vectors[int(layer)] = _values(mapped, tensor)
        size = int.from_bytes(mapped[:8], "little")
        metadata = json.loads(mapped[8 : 8 + size]).get("__metadata__", {})
    if not vectors:
        raise CheckpointError(f"{path}: expected at least one vector, found none")
    return vectors, metadata


def _values(mapped: Any, tensor: Tensor) -> np.ndarray:
    return np.frombuffer(mapped[tensor.offset : tensor.offset + tensor.n_bytes], np.float32)


def parse_steering(text: str) -> Steering:
    """``"file.safetensors,layer=20,alpha=1"`` as on the command line."""
    path, *parts = text.split(",")
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in ("layer", "alpha", "gamma", "alpha_max", "scope"):
            raise ConfigError(f"steering {part!r}; allowed: layer=, alpha=, gamma=, alpha_max=, scope=")
        if key in values:
            raise ConfigError(f"steering {key} is given twice")
        try:
            values[key] = value if key == "scope" else int(value) if key == "layer" else float(value)
        except ValueError:
            raise ConfigError(f"steering {key} is {value!r}; allowed: a number") from None
    return Steering.load(path, **values)
