"""safetensors files, read tensor by tensor: every byte of the data belongs to one tensor of the header."""

import json
import math
import os
import struct
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np

from skipkv.errors import CheckpointError
from skipkv.load.files import MAX_JSON_BYTES, decode, is_int, open_file, parse_object, reading, show, what_is
from skipkv.writing import write_whole

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_RANK = 8


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``n_bytes`` bytes of ``dtype`` ("F32", "F16", "BF16") from byte ``offset`` of ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class Opened(NamedTuple):
    """A file to be closed, its tensors in file order, and the metadata of its header."""

    file: BinaryIO
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_tensors(path: Path) -> Opened:
    """Open a safetensors file. Its tensors are checked to fill it without overlap, hole or remainder."""
    with reading(path), ExitStack() as opened:
        file = opened.enter_context(open_file(path))
        size = os.fstat(file.fileno()).st_size
        try:
            header, metadata = _read_header(path, file, size)
        except CheckpointError:
            if found := what_is(file):
                raise CheckpointError(f"{path}: expected a safetensors file, found {found}") from None
            raise
        tensors = _tensors(path, header, file.tell(), size)
        opened.pop_all()
        return Opened(file, tensors, metadata)


def read_tensor(file: BinaryIO, tensor: Tensor) -> np.ndarray:
    """A tensor's bytes, ``uint8 [n_bytes]``, aligned to its elements.

    They are read, not mapped: a file that another process cuts short is an error here, not the end of this process.
    """
    with reading(tensor.file):
        data = np.empty(tensor.n_bytes, np.uint8)
        file.seek(tensor.offset)
        found = file.readinto(data)
    if found != tensor.n_bytes:
        expected = f"expected {tensor.n_bytes} bytes, found {found} (the file has changed since it was opened)"
        raise CheckpointError(f"{tensor.file}: tensor {show(tensor.name)}: {expected}")
    return data


def _read_header(path: Path, file: BinaryIO, size: int) -> tuple[dict[str, Any], dict[str, str]]:
    if size < 8:
        raise CheckpointError(f"{path}: expected 8 bytes of header size, found a file of {size} bytes")
    n_bytes = int.from_bytes(file.read(8), "little")
    limit = min(MAX_JSON_BYTES, size - 8)
    if n_bytes > limit:
        raise CheckpointError(f"{path}: header: expected at most {limit} bytes, found a header size of {n_bytes}")
    where = f"{path}: header"
    header = parse_object(decode(file.read(n_bytes), where), where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__: expected an object of strings, found {show(metadata)}")
    return header, metadata


def _tensors(path: Path, header: Mapping[str, Any], data: int, size: int) -> dict[str, Tensor]:
    """The header's tensors in file order; ``data`` is the byte at which offsets start, ``size`` that of the file."""
    tensors = [_tensor(path, name, entry, data, size) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
    end = data
    for tensor in tensors:
        if tensor.offset != end:
            what = "an overlap" if tensor.offset < end else "a hole"
            raise CheckpointError(
                f"{path}: tensor {show(tensor.name)}: expected to begin at byte {end - data} of the data, "
                f"where the tensor before it ends, found {tensor.offset - data} ({what})"
            )
        end += tensor.n_bytes
    if end != size:
        raise CheckpointError(f"{path}: expected {end} bytes as the header says, found {size}")
    return {tensor.name: tensor for tensor in tensors}


def _is_size(value: object) -> bool:
    return is_int(value) and 0 <= value < 1 << 63


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> Tensor:
    def fail(key: str, expected: str, found: object) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {show(name)}: {key}expected {expected}, found {found}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fail("", "an object of dtype, shape and data_offsets", show(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        fail("dtype: ", " or ".join(DTYPE_BYTES), show(dtype))
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        fail("shape: ", f"at most {MAX_RANK} sizes", show(shape))
    n_bytes = DTYPE_BYTES[dtype] * math.prod(shape)
    if n_bytes >= 1 << 63:
        fail("shape: ", "less than 2^63 bytes", show(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        fail("data_offsets: ", "a first byte and an end", show(offsets))
    if offsets[1] > size - data:
        fail("data_offsets: ", f"an end within the file's {size - data} bytes of data", show(offsets))
    if offsets[1] - offsets[0] != n_bytes:
        fail("data_offsets: ", f"{n_bytes} bytes for {dtype} {show(shape)}", show(offsets))
    return Tensor(name, path, dtype, tuple(shape), data + offsets[0], n_bytes)


def write_file(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write float32 tensors, in the order given, and the metadata of their header."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    data = b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor, "<f4").tobytes()
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_whole(path, struct.pack("<Q", len(text)) + text + data)
