"""The C engine: tables, Model, Session, and functions on arrays. skipkv's own modules are its users."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

def families() -> dict[str, dict[str, Any]]: ...
def tensors(config: Mapping[str, Any]) -> list[tuple[str, tuple[int, ...], bool]]: ...
def variants() -> dict[str, bool]: ...
def constants() -> dict[str, Any]: ...
def methods() -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]: ...
def check_method(method: Mapping[str, Any], n_prompt: int, reserve: int = 0) -> None: ...
def method_needs(method: Mapping[str, Any]) -> int: ...
def select(
    method: Mapping[str, Any],
    keys: Floats,
    queries: Floats,
    positions: Ints,
    penalties: Floats | None = None,
    sums: Floats | None = None,
    prompt: int = 0,
    sequence: tuple[int, int] = (0, 0),
    layer: int = 0,
) -> tuple[list[Ints], list[Floats], list[Floats], list[Floats], list[Floats]]: ...
def segment(ids: Ints, vocabulary: tuple, vocab: int, n_prompt: int, compat: int) -> tuple[Ints, Ints, Ints]: ...
def flag_repeats(vectors: Floats, tau: float, compat: int) -> Floats: ...

class Model:
    n_bytes: int
    variant: str
    dtype: str
    def __init__(self, config: Mapping[str, Any], dtype: str = "f32", variant: str | None = None) -> None: ...
    def bind(self, name: str, dtype: str, shape: tuple[int, ...], data: NDArray[np.uint8], threads: int) -> None: ...
    def limits(self, n_bytes: int, threads: int) -> tuple[float, float]: ...

class Session:
    def __init__(
        self,
        model: Model,
        rows: int = 1,
        tokens: int = 512,
        cache: str = "f32",
        memory_limit: int = ...,
        threads: int = 1,
        method: Mapping[str, Any] | None = None,
        vocabulary: tuple | None = None,
        trace: int = 0,
    ) -> None: ...
    def open(
        self,
        capacity: int,
        n_prompt: int = ...,
        prompt: int = 0,
        sample: int = 0,
        steering: tuple | None = None,
        reserve: int = 0,
    ) -> int: ...
    def fork(self, row: int, capacity: int, sample: int) -> int: ...
    def close(self, row: int) -> None: ...
    def chunk(self, row: int, n: int) -> int: ...
    def row_bytes(self, capacity: int, n_prompt: int) -> int: ...
    def forward(
        self,
        spans: Ints,
        tokens: Ints,
        logits: Floats | None = None,
        every: bool = False,
        layers: Ints | None = None,
        states: Floats | None = None,
    ) -> list[tuple[int, float]]: ...
    def sample(
        self,
        logits: Floats,
        sequences: NDArray[np.int64],
        seed: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
    ) -> Ints: ...
    def brake(self, row: int) -> None: ...
    def state(self, row: int) -> dict[str, int]: ...
    def positions(self, row: int, layer: int, head: int) -> Ints: ...
    def sentences(self, row: int, vectors: bool = False) -> tuple[Sequence[tuple], Floats | None]: ...
    def trace(self) -> list[tuple[int, int, int, int, int, Ints, dict[str, Floats] | None]]: ...
    def ledger(self) -> dict[str, Any]: ...
