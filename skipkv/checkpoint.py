"""Opens a model directory as transformers saves it, and refuses with one clear sentence whatever is wrong in it.

    path, hub id or "tiny" → directory → config.json         → ModelConfig → the tensors it calls for ┐
                                       → safetensors headers → the tensors that are there             ┴→ Checkpoint

Everything is checked here, at the border, before a weight is packed: the engine behind it only asserts.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NoReturn

import numpy as np

from skipkv import _skipkv
from skipkv.errors import CheckpointError

__all__ = ["Checkpoint", "ModelConfig", "Tensor", "open_checkpoint"]

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)?")
# What a repository is asked for: not its second copy of the weights in another format.
HUB_FILES = (CONFIG, GENERATION, INDEX, "model*.safetensors", "tokenizer.json", "tokenizer_config.json",
             "chat_template.jinja")  # fmt: skip

DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
MAX_RANK = 8

MAX_JSON_BYTES = 100_000_000  # the safetensors reference implementation's limit for a header
# Far above every published model; what exceeds them is a broken file, and refusing it here keeps size arithmetic small.
# None may exceed what skv_config_check (csrc/families.c) lets through.
MAX_LAYERS, MAX_HEADS, MAX_HEAD_DIM = 1024, 1024, 512
MAX_HIDDEN, MAX_FFN, MAX_VOCAB, MAX_CONTEXT = 1 << 17, 1 << 20, 1 << 22, 1 << 24
ROPE_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor",
             "original_max_position_embeddings")  # fmt: skip

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxstring, _repr.maxother, _repr.maxlist, _repr.maxdict = 3, 120, 120, 8, 4


def _show(value: object) -> str:
    """A value from a file as it may appear in a message: quoted, one line, and short however hostile the file."""
    return json.dumps(value) if value is None or isinstance(value, bool) else _repr.repr(value)


def _some(names: Iterable[str]) -> str:
    """The first few of many names and their count."""
    names = sorted(names)
    return f"{len(names)}: {', '.join(map(_show, names[:4]))}{', …' if len(names) > 4 else ''}"


def _is_int(value: object) -> bool:
    return type(value) is int  # JSON's true is Python's True, which isinstance calls an int


def _is_size(value: object) -> bool:
    return _is_int(value) and 0 <= value < 1 << 63


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    # json keeps the last of two equal keys; two readers of one file could then see two different models.
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {_show(key)}")
        result[key] = value
    return result


def _parse_object(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
    except UnicodeDecodeError as error:
        found = f"byte 0x{raw[error.start]:02x} at {error.start}"
        raise CheckpointError(f"{where}: expected UTF-8, found {found}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected a JSON object, found {_show(value)}")
    return value


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def _require_file(path: Path) -> None:
    if not path.is_file():  # opening a pipe would block
        raise CheckpointError(f"{path}: expected a file, found {'something else' if path.exists() else 'nothing'}")


def _read_object(path: Path) -> dict[str, Any]:
    with _reading(path):
        _require_file(path)
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path}: expected at most {MAX_JSON_BYTES} bytes of JSON, found {size}")
        return _parse_object(path.read_bytes(), str(path))


class _Fields:
    """A JSON object and its file; getters check type and range. As in transformers, null means absent."""

    def __init__(self, path: Path, values: Mapping[str, Any], labels: Mapping[str, str] = MappingProxyType({})) -> None:
        self.path, self.values, self.labels = path, values, labels  # labels: where a key stands, if not at the top

    def get(self, key: str) -> Any:
        return self.values.get(key)

    def fail(self, key: str, expected: str) -> NoReturn:
        found = _show(self.get(key)) if key in self.values else "nothing"
        raise CheckpointError(f"{self.path}: {self.labels.get(key, key)}: expected {expected}, found {found}")

    def integer(self, key: str, high: int, default: int | None = None) -> int:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not _is_int(value) or not 1 <= value <= high:
            self.fail(key, f"an integer from 1 to {high}")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not (_is_int(value) or isinstance(value, float)) or not low <= value <= high:  # NaN compares false
            self.fail(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str) -> bool:
        value = self.get(key)
        if value is not None and not isinstance(value, bool):
            self.fail(key, "true or false")
        return bool(value)

    def only(self, key: str, expected: object) -> None:
        """The key must be absent or hold the one value that the engine implements."""
        value = self.get(key)
        if value is not None and (isinstance(value, bool) or value != expected):
            self.fail(key, f"{json.dumps(expected)} (others are not supported)")


@dataclass(frozen=True)
class ModelConfig:
    """Dimensions and variants of one model, in skipkv's names.

    Attributes
    ----------
    family : str
        ``"llama"``, ``"qwen2"``, ``"qwen3"``: a row of the engine's table of families.
    n_layers, n_heads, n_kv_heads, head_dim, hidden, ffn, vocab : int
        Sizes; ``n_heads`` is a multiple of ``n_kv_heads`` and ``head_dim`` is even.
    context : int
        Positions that the model was made for (``max_position_embeddings``).
    norm_eps : float
        Added to the mean square in RMSNorm.
    tied : bool
        The output head is the embedding.
    qkv_bias, o_bias, mlp_bias : bool
        Which linear layers add a bias.
    rope_type : str
        ``"default"``, ``"linear"`` or ``"llama3"``.
    rope_theta, rope_factor, rope_low_freq_factor, rope_high_freq_factor : float
        RoPE base and scaling; the factors are neutral (1, 1, 4) where the type does not use them.
    rope_original_context : int
        Positions before llama3 scaling; ``context`` where the type does not use it.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    context: int
    norm_eps: float
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    rope_type: str = "default"
    rope_theta: float = 10000.0
    rope_factor: float = 1.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_context: int = 1

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> ModelConfig:
        """Read and check a ``config.json``.

        Raises
        ------
        CheckpointError
            A key is missing, has the wrong type or range, or asks for something the engine does not compute.
        """
        path = Path(path)
        fields = _Fields(path, _read_object(path))
        name, family = _family(fields)
        n_layers = fields.integer("num_hidden_layers", MAX_LAYERS)
        hidden = fields.integer("hidden_size", MAX_HIDDEN)
        n_heads = fields.integer("num_attention_heads", MAX_HEADS)
        n_kv_heads = fields.integer("num_key_value_heads", MAX_HEADS, default=n_heads)
        if n_heads % n_kv_heads:
            fields.fail("num_key_value_heads", f"a divisor of num_attention_heads = {n_heads}")
        if fields.get("head_dim") is None and hidden % n_heads:
            fields.fail("hidden_size", f"a multiple of num_attention_heads = {n_heads}, as there is no head_dim")
        head_dim = fields.integer("head_dim", MAX_HEAD_DIM, default=hidden // n_heads)
        if head_dim % 2 or head_dim > MAX_HEAD_DIM:
            expected = f"an even integer from 2 to {MAX_HEAD_DIM}"
            raise CheckpointError(f"{path}: head_dim: expected {expected}, found {head_dim}")
        _refuse_variants(fields, n_layers)
        context = fields.integer("max_position_embeddings", MAX_CONTEXT)
        attention_bias, mlp_bias = fields.boolean("attention_bias"), fields.boolean("mlp_bias")
        return cls(
            family=name, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads, head_dim=head_dim, hidden=hidden,
            ffn=fields.integer("intermediate_size", MAX_FFN),
            vocab=fields.integer("vocab_size", MAX_VOCAB),
            context=context,
            norm_eps=fields.number("rms_norm_eps", 1e-12, 0.1),
            tied=fields.boolean("tie_word_embeddings"),
            qkv_bias=attention_bias if family["qkv_bias"] is None else family["qkv_bias"],
            o_bias=attention_bias if family["o_bias"] is None else family["o_bias"],
            mlp_bias=mlp_bias if family["mlp_bias"] is None else family["mlp_bias"],
            **_rope(fields, family["rope"], context),
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as the engine takes them."""
        return asdict(self)


def _family(fields: _Fields) -> tuple[str, Mapping[str, Any]]:
    """The row of the engine's family table that ``architectures`` names."""
    families = _skipkv.families()
    by_architecture = {row["architecture"]: name for name, row in families.items()}
    found = fields.get("architectures")
    one = isinstance(found, list) and len(found) == 1 and isinstance(found[0], str)
    if not one or found[0] not in by_architecture:
        fields.fail("architectures", f"one of {', '.join(by_architecture)}")
    name = by_architecture[found[0]]
    if fields.get("model_type") not in (None, name):  # transformers goes by model_type: another model would be meant
        fields.fail("model_type", f"{name!r}, which goes with {found[0]}")
    return name, families[name]


def _refuse_variants(fields: _Fields, n_layers: int) -> None:
    """What these architectures can be configured to do and the engine does not."""
    fields.only("hidden_act", "silu")
    fields.only("pretraining_tp", 1)
    fields.only("partial_rotary_factor", 1.0)
    quantization = fields.get("quantization_config")
    if quantization is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise CheckpointError(
            f"{fields.path}: quantization_config: expected unquantised weights (F32, F16, BF16), "
            f"found quant_method {_show(method)}"
        )
    if fields.boolean("use_sliding_window"):
        fields.fail("use_sliding_window", "false (sliding windows are not supported)")
    layers = fields.get("layer_types")
    if layers is None:
        return
    if not isinstance(layers, list) or len(layers) != n_layers:
        fields.fail("layer_types", f"a list of num_hidden_layers = {n_layers} names")
    for kind in layers:
        if kind != "full_attention":
            expected = "only 'full_attention' (others are not supported)"
            raise CheckpointError(f"{fields.path}: layer_types: expected {expected}, found {_show(kind)}")


def _rope(fields: _Fields, supported: Iterable[str], context: int) -> dict[str, Any]:
    """RoPE's parameters from either spelling: rope_theta + rope_scaling, or rope_parameters."""
    rope = _merged_rope(fields)
    scaled = rope.get("factor") is not None  # a factor without a type: nobody can tell what it scales
    kind = "default" if rope.get("rope_type") is None and not scaled else rope.get("rope_type")
    if not isinstance(kind, str) or kind not in supported:
        rope.fail("rope_type", f"one of {', '.join(map(repr, supported))}")
    rope.only("partial_rotary_factor", 1.0)
    result = {
        "rope_type": kind,
        "rope_theta": rope.number("rope_theta", 1.0, 1e12, default=10000.0),
        "rope_original_context": context,
    }
    if kind != "default":
        result["rope_factor"] = rope.number("factor", 1.0, 1e6)
    if kind == "llama3":
        low = result["rope_low_freq_factor"] = rope.number("low_freq_factor", 1e-6, 1e6)
        high = result["rope_high_freq_factor"] = rope.number("high_freq_factor", 1e-6, 1e6)
        if high <= low:
            rope.fail("high_freq_factor", f"more than low_freq_factor = {low:g}")
        result["rope_original_context"] = rope.integer("original_max_position_embeddings", MAX_CONTEXT)
    return result


def _merged_rope(fields: _Fields) -> _Fields:
    # A file may carry both spellings, for old and new readers. They must say the same: nobody can tell which was meant.
    theta = fields.get("rope_theta")
    merged = {} if theta is None else {"rope_theta": theta}
    labels: dict[str, str] = {}
    for spelling in ("rope_scaling", "rope_parameters"):
        part = fields.get(spelling)
        if part is None:
            continue
        if not isinstance(part, dict) or any(isinstance(value, dict) for value in part.values()):
            fields.fail(spelling, "one set of RoPE parameters for all layers")
        for spelled in ("type", *ROPE_KEYS):
            key, label = "rope_type" if spelled == "type" else spelled, f"{spelling}.{spelled}"
            value = part.get(spelled)
            if value is None:
                if key not in merged:
                    labels[key] = label  # where it is missed, should it turn out to be needed
                continue
            if key in merged and not isinstance(value, list) and merged[key] != value:
                expected = f"{_show(merged[key])} as in {labels.get(key, key)}"
                raise CheckpointError(f"{fields.path}: {label}: expected {expected}, found {_show(value)}")
            merged[key], labels[key] = value, label
    return _Fields(fields.path, merged, labels)


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: ``n_bytes`` bytes of ``dtype`` ("F32", "F16", "BF16") from byte ``offset`` of ``file``."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


def _map_file(path: Path) -> tuple[mmap.mmap, dict[str, Tensor]]:
    """Map a safetensors file. Its tensors come in file order, checked to fill it without overlap, hole or remainder."""
    with _reading(path):
        _require_file(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header = _read_header(path, file, size)
            tensors = _tensors(path, header, file.tell(), size)
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), tensors


def _read_header(path: Path, file: BinaryIO, size: int) -> dict[str, Any]:
    if size < 8:
        raise CheckpointError(f"{path}: expected 8 bytes of header size, found a file of {size} bytes")
    n_bytes = int.from_bytes(file.read(8), "little")
    limit = min(MAX_JSON_BYTES, size - 8)
    if n_bytes > limit:
        raise CheckpointError(f"{path}: header: expected at most {limit} bytes, found a header size of {n_bytes}")
    header = _parse_object(file.read(n_bytes), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: header: __metadata__: expected an object of strings, found {_show(metadata)}")
    return header


def _tensors(path: Path, header: Mapping[str, Any], data: int, size: int) -> dict[str, Tensor]:
    """The header's tensors in file order; ``data`` is the byte at which offsets start, ``size`` that of the file."""
    tensors = [_tensor(path, name, entry, data, size) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.n_bytes))
    end = data
    for tensor in tensors:
        if tensor.offset != end:
            what = "an overlap" if tensor.offset < end else "a hole"
            raise CheckpointError(
                f"{path}: tensor {_show(tensor.name)}: expected to begin at byte {end - data} of the data, "
                f"where the tensor before it ends, found {tensor.offset - data} ({what})"
            )
        end += tensor.n_bytes
    if end != size:
        raise CheckpointError(f"{path}: expected {end} bytes as the header says, found {size}")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(path: Path, name: str, entry: Any, data: int, size: int) -> Tensor:
    def fail(key: str, expected: str, found: object) -> NoReturn:
        raise CheckpointError(f"{path}: tensor {_show(name)}: {key}expected {expected}, found {found}")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        fail("", "an object of dtype, shape and data_offsets", _show(entry))
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        fail("dtype: ", " or ".join(DTYPE_BYTES), _show(dtype))
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        fail("shape: ", f"at most {MAX_RANK} sizes", _show(shape))
    n_bytes = DTYPE_BYTES[dtype] * math.prod(shape)
    if n_bytes >= 1 << 63:
        fail("shape: ", "less than 2^63 bytes", _show(shape))
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        fail("data_offsets: ", "a first byte and an end", _show(offsets))
    if offsets[1] > size - data:
        fail("data_offsets: ", f"an end within the file's {size - data} bytes of data", _show(offsets))
    if offsets[1] - offsets[0] != n_bytes:
        fail("data_offsets: ", f"{n_bytes} bytes for {dtype} {_show(shape)}", _show(offsets))
    return Tensor(name, path, dtype, tuple(shape), data + offsets[0], n_bytes)


def _read_index(directory: Path) -> dict[str, str]:
    """The index's map from tensor to file name; without an index, the error that says what there is instead."""
    path = directory / INDEX
    if not path.exists():
        with _reading(directory):
            files = [file for file in os.listdir(directory) if file.endswith((".safetensors", *FOREIGN_WEIGHTS))]
        found = f"only {_some(files)}" if files else "neither"
        advice = " (convert to safetensors)" if files and not any(f.endswith(".safetensors") for f in files) else ""
        raise CheckpointError(f"{directory}: expected {WEIGHTS} or {INDEX}, found {found}{advice}")
    weight_map = _read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: expected an object, tensor to file name, found {_show(weight_map)}")
    for name, file in weight_map.items():
        # A plain name cannot lead out of the directory, and a printable one cannot hide what it is.
        plain = isinstance(file, str) and file.isprintable() and not set(file) & set("/\\:")
        if not plain or not file.endswith(".safetensors"):
            expected = "the name of a .safetensors file beside the index"
            raise CheckpointError(f"{path}: tensor {_show(name)}: expected {expected}, found {_show(file)}")
    return weight_map


class Checkpoint:
    """A checked model directory, its weights memory-mapped. A context manager; ``close`` gives the maps back.

    Parameters
    ----------
    directory : path
        Holds config.json and the weights; `open_checkpoint` also takes a hub id.
    name : str, optional
        How to call it; the directory's name by default.

    Attributes
    ----------
    path : Path
        The directory.
    name : str
    config : ModelConfig
    generation : dict
        generation_config.json as it is, ``{}`` without one.
    tensors : Mapping[str, Tensor]
        Exactly those that the model needs, in the order in which they lie in the files.
    dtype : str
        ``"bf16"`` if all matrices are stored so, otherwise ``"f32"``.
    n_parameters, n_bytes : int
        Elements and stored bytes of ``tensors``.

    Raises
    ------
    CheckpointError
        Anything is wrong with a file; the message names file, tensor or key, what was expected and what was found.
    """

    def __init__(self, directory: str | os.PathLike[str], name: str | None = None) -> None:
        self.path = Path(directory)
        self.name = name if name is not None else os.path.basename(os.path.abspath(self.path))
        self.config = ModelConfig.from_json(self.path / CONFIG)
        generation = self.path / GENERATION
        self.generation = _read_object(generation) if generation.exists() else {}
        self._maps: dict[Path, mmap.mmap] = {}
        try:
            found = self._map_files()
            needed = {name: (shape, matrix) for name, shape, matrix in _skipkv.tensors(self.config.as_dict())}
            self._compare(found, needed)
        except BaseException:
            self.close()
            raise
        self.tensors: Mapping[str, Tensor] = MappingProxyType({n: t for n, t in found.items() if n in needed})
        matrices = {tensor.dtype for name, tensor in self.tensors.items() if needed[name][1]}
        self.dtype = "bf16" if matrices == {"BF16"} else "f32"
        self.n_parameters = sum(math.prod(tensor.shape) for tensor in self.tensors.values())
        self.n_bytes = sum(tensor.n_bytes for tensor in self.tensors.values())

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name!r}: {self.config.family}, {self.n_parameters} parameters, {self.dtype}>"

    def close(self) -> None:
        """Give the maps back; one that a view still shows goes with its last view."""
        for mapped in self._maps.values():
            try:
                mapped.close()
            except BufferError:
                pass
        self._maps = {}

    def view(self, name: str) -> np.ndarray:
        """A tensor's bytes, read-only ``uint8 [n_bytes]``, aligned to its elements.

        They are the map's own, not a copy, but where the file places the tensor at an odd address.
        """
        tensor = self.tensors[name]
        view = self._bytes(tensor)
        return view if tensor.offset % DTYPE_BYTES[tensor.dtype] == 0 else view.copy()

    def release(self, name: str) -> None:
        """Take a tensor's whole pages out of this process's memory; a later view reads them from the file again."""
        self._forget(self.tensors[name])

    def _bytes(self, tensor: Tensor) -> np.ndarray:
        if tensor.file not in self._maps:
            raise ValueError(f"checkpoint {self.name!r} is closed")
        return np.frombuffer(self._maps[tensor.file], np.uint8, tensor.n_bytes, tensor.offset)

    def _forget(self, tensor: Tensor) -> None:
        first = -(-tensor.offset // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (tensor.offset + tensor.n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if first < end and tensor.file in self._maps and hasattr(mmap, "MADV_DONTNEED"):  # not on Windows
            self._maps[tensor.file].madvise(mmap.MADV_DONTNEED, first, end - first)

    def _map_files(self) -> dict[str, Tensor]:
        """Map the one file, or those that the index names; every tensor must be in the file that the index says."""
        # As in transformers, the single file wins over an index beside it.
        weight_map = None if (self.path / WEIGHTS).exists() else _read_index(self.path)
        found: dict[str, Tensor] = {}
        for path in [self.path / file for file in sorted(set(weight_map.values() if weight_map else [WEIGHTS]))]:
            self._maps[path], tensors = _map_file(path)
            for name in sorted(found.keys() & tensors.keys()):
                both = f"expected in one file, found in {_show(found[name].file.name)} too"
                raise CheckpointError(f"{path}: tensor {_show(name)}: {both}")
            found.update(tensors)
        for name, file in (weight_map or {}).items():
            here = found[name].file.name if name in found else None
            if here != file:
                where = f"expected in {_show(file)}, found in {_show(here) if here else 'no file'}"
                raise CheckpointError(f"{self.path / INDEX}: tensor {_show(name)}: {where}")
        unlisted = [] if weight_map is None else [name for name in found if name not in weight_map]
        if unlisted:
            file = found[unlisted[0]].file
            raise CheckpointError(f"{file}: expected only tensors that {INDEX} lists, found {_some(unlisted)}")
        return found

    def _compare(self, found: Mapping[str, Tensor], needed: Mapping[str, tuple[tuple[int, ...], bool]]) -> None:
        for name, (shape, _) in needed.items():
            if name in found and found[name].shape != shape:
                text = f"expected shape {list(shape)}, found {list(found[name].shape)}"
                raise CheckpointError(f"{found[name].file}: tensor {_show(name)}: {text}")
        missing = needed.keys() - found.keys()
        # Old exports store RoPE's frequencies, which follow from the config; a tied head may be stored a second time.
        surplus = [name for name in found.keys() - needed.keys() if not name.endswith(".rotary_emb.inv_freq")]
        if self.config.tied and "lm_head.weight" in surplus:
            surplus.remove("lm_head.weight")
            if "model.embed_tokens.weight" in found:
                self._require_same_head(found["model.embed_tokens.weight"], found["lm_head.weight"])
        if missing or surplus:
            parts = [f"missing {_some(missing)}"] * bool(missing) + [f"surplus {_some(surplus)}"] * bool(surplus)
            expected = f"expected the {len(needed)} tensors that {CONFIG} calls for"
            raise CheckpointError(f"{self.path}: {expected}, found {'; '.join(parts)}")

    def _require_same_head(self, embedding: Tensor, head: Tensor) -> None:
        same = (embedding.dtype, embedding.shape) == (head.dtype, head.shape)
        a, b, step = self._bytes(embedding), self._bytes(head), 1 << 24
        for i in range(0, len(a) if same else 0, step):
            same = same and np.array_equal(a[i : i + step], b[i : i + step])
            self._forget(embedding)
            self._forget(head)
        if not same:
            raise CheckpointError(
                f"{head.file}: tensor 'lm_head.weight': expected the embedding's bytes, "
                f"as {CONFIG} ties them (tie_word_embeddings), found a different head"
            )


def open_checkpoint(source: str | os.PathLike[str]) -> Checkpoint:
    """Open and check a model.

    Parameters
    ----------
    source : str or path
        A directory; or ``"tiny"``, the model that comes with skipkv; or a Hugging Face hub id, whose files are
        downloaded unless the cache has them (``HF_HUB_OFFLINE``, ``HF_HOME``, ``HF_TOKEN`` as usual).

    Raises
    ------
    CheckpointError
        There is no such model, or something is wrong with it.
    """
    text = os.fspath(source)
    if text == "tiny":
        return Checkpoint(Path(__file__).parent / "tiny", "tiny")
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return Checkpoint(path)
    if os.path.lexists(path):
        raise CheckpointError(f"{path}: expected a directory with {CONFIG}, found something else")
    if not isinstance(source, str) or text.startswith((".", "~")) or os.path.isabs(text):
        raise CheckpointError(f"{path}: expected a directory with {CONFIG}, found nothing")
    if not HUB_ID.fullmatch(text):
        raise CheckpointError(f"{_show(text)}: expected a directory or a hub id (owner/name), found neither")
    return Checkpoint(_download(text), text)


def _download(hub_id: str) -> Path:
    import huggingface_hub  # slow to import, and only needed here

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # of many unrelated types: HTTP, network, validation, cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{hub_id}: expected a directory or a model on the Hugging Face hub: {reason}") from error
