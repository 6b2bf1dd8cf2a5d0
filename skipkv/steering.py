"""Adaptive steering (METHOD §7): which vector is added where, how strongly."""

import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from skipkv.checks import CONSTANTS, check_fields, checked, floats, integer, number, one_of, path_of, shown, wrong
from skipkv.errors import CheckpointError, ConfigError
from skipkv.load.safetensors import open_tensors, read_tensor, write_file
from skipkv.methods import Method, parse_method

FLOAT_MAX = float(np.finfo(np.float32).max)
SETTINGS = {"layer": int, "alpha": float, "gamma": float, "alpha_max": float, "scope": str}  # as text gives them


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
    layer: int = checked(MISSING, integer, 0, None)
    alpha: float = checked(1.0, number, -FLOAT_MAX, FLOAT_MAX, "finite numbers")
    gamma: float = checked(0.02, number, -FLOAT_MAX, FLOAT_MAX, "finite numbers")
    alpha_max: float = checked(2.0, number, -FLOAT_MAX, FLOAT_MAX, "finite numbers")
    scope: str = checked("think", one_of, CONSTANTS["scopes"], str)

    def __post_init__(self) -> None:
        vector = floats("steering vector", self.vector, "hidden").copy()  # the caller's may change
        if not len(vector):
            raise ConfigError("steering vector: expected numbers [hidden], found none")
        vector.setflags(write=False)
        object.__setattr__(self, "vector", vector)
        check_fields(self)

    def as_tuple(self) -> tuple:
        """As the core takes it."""
        return self.vector, *(getattr(self, name) for name in SETTINGS)

    def describe(self) -> dict[str, Any]:
        """Settings without the vector, for traces and tables."""
        return dict(zip(SETTINGS, self.as_tuple()[1:], strict=True)) | {"norm": float(np.linalg.norm(self.vector))}

    def __str__(self) -> str:
        """What tells it from others in a name."""
        return f"steer:layer={self.layer},alpha={self.alpha:g}"

    @classmethod
    def load(cls, path: str | os.PathLike[str], layer: int | None = None, **parameters: Any) -> "Steering":
        """From a file that `save_vectors` wrote.

        Parameters
        ----------
        path : path, or "tiny"
            A file, or the vector that comes with the model in the box.
        layer : int, optional
            Which of its layers; may be left out where the file has one.
        parameters
            As for `Steering`.

        Raises
        ------
        CheckpointError, ConfigError
            The file is not such a file; it has no such layer, or there is no such parameter.
        """
        unknown = parameters.keys() - SETTINGS
        if unknown:
            raise ConfigError(f"steering has no parameter {shown(min(unknown))}; allowed: {', '.join(SETTINGS)}")
        if layer is not None:
            integer("layer", layer, 0, None)
        vectors, _ = load_vectors(path)
        chosen = next(iter(vectors)) if layer is None and len(vectors) == 1 else layer
        if chosen not in vectors:
            one = "one of " if layer is None else ""
            raise wrong(f"{path}: layer", layer, one + ", ".join(map(str, sorted(vectors))))
        return cls(vectors[chosen], chosen, **parameters)


def save_vectors(path: str | os.PathLike[str], vectors: Mapping[int, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write safetensors: one float32 tensor a layer, named ``layer.N``."""
    write_file(path, {f"layer.{layer}": vector for layer, vector in sorted(vectors.items())}, metadata)


def load_vectors(path: str | os.PathLike[str]) -> tuple[dict[int, np.ndarray], dict[str, str]]:
    """Vectors by layer, float32 [hidden], and the file's metadata; ``"tiny"`` is the file in the box.

    Raises
    ------
    CheckpointError
        The file is not such a file.
    """
    path = path_of("path", path)
    if str(path) == "tiny":
        path = Path(str(files("skipkv.tiny") / "steering.safetensors"))
    file, tensors, metadata = open_tensors(path)
    with file:
        vectors = {}
        for name, tensor in tensors.items():
            layer = name.removeprefix("layer.")
            digits = layer != name and re.fullmatch(r"[0-9]{1,9}", layer)
            if not digits or tensor.dtype != "F32" or len(tensor.shape) != 1:
                found = f"{name!r} {tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(f"{path}: expected tensors layer.N of F32 [hidden], found {found}")
            vectors[int(layer)] = read_tensor(file, tensor).view(np.float32)
    widths = {len(vector) for vector in vectors.values()}
    if len(widths) != 1:
        found = ", ".join(map(str, sorted(widths))) or "none"
        raise CheckpointError(f"{path}: expected at least one vector, all of one length, found {found}")
    return vectors, metadata


def parse_steering(text: str) -> "Steering":
    """``"file.safetensors,layer=20,alpha=1"`` as on the command line."""
    path, *parts = text.split(",")
    values: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in SETTINGS:
            raise ConfigError(f"steering {part!r}; allowed: {'=, '.join(SETTINGS)}=")
        if key in values:
            raise ConfigError(f"steering {key} is given twice")
        try:
            values[key] = SETTINGS[key](value)
        except ValueError:
            raise ConfigError(f"steering {key} is {value!r}; allowed: a number") from None
    return Steering.load(path, **values)


def parse_run(text: str) -> tuple[Method, Steering | None]:
    """``"skipkv:budget=1024+steer:file.safetensors,alpha=1"`` → (Method, Steering or None)."""
    method, plus, steering = text.partition("+steer:")
    return parse_method(method), parse_steering(steering) if plus else None


def describe_run(method: Method, steering: Steering | None) -> str:
    """A name for tables and pictures."""
    return f"{method}+{steering}" if steering else str(method)
