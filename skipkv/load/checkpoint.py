"""Opens a model directory as transformers saves it, and refuses with one clear sentence whatever is wrong in it.

    path, hub id or "tiny" → directory → config.json         → ModelConfig → the tensors it calls for ┐
                                       → safetensors headers → the tensors that are there             ┴→ Checkpoint

Everything is checked here, at the border, before a weight is packed: the engine behind it only asserts.
"""

import hashlib
import math
import os
import re
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import numpy as np

from skipkv import _skipkv
from skipkv.errors import CheckpointError
from skipkv.load.config import ModelConfig
from skipkv.load.files import open_file, read_object, reading, show, some, what_is
from skipkv.load.safetensors import Tensor, open_tensors, read_tensor

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
COMPARED = 1 << 24  # bytes of both at a time
ADAPTER, ADAPTER_WEIGHTS = "adapter_config.json", {"adapter_model.safetensors", "adapter_model.bin"}
FOREIGN_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx")
HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9._-]+)?")
# What a repository is asked for: not its second copy of the weights in another format. An adapter and a tokenizer.model
# are only told from what there should be.
HUB_FILES = (CONFIG, GENERATION, INDEX, "model*.safetensors", "tokenizer.json", "tokenizer_config.json",
             "tokenizer.model", "chat_template.jinja", "additional_chat_templates/*.jinja", ADAPTER)  # fmt: skip


def _refuse_others(directory: Path) -> None:
    """What is no model of its own, or one in another format: told by the names of the files."""
    with reading(directory):
        files = set(os.listdir(directory))
    if files & {ADAPTER, *ADAPTER_WEIGHTS}:
        base = read_object(directory / ADAPTER).get("base_model_name_or_path") if ADAPTER in files else None
        of, advice = f" of {show(base)}" if base else "", "merge it into its base model first (merge_and_unload)"
        raise CheckpointError(f"{directory}: expected a model, found a PEFT adapter{of}; {advice}")
    others = [file for file in files if file.endswith(FOREIGN_WEIGHTS)]
    if others and CONFIG not in files and not any(file.endswith(".safetensors") for file in files):
        raise CheckpointError(f"{directory}: expected {CONFIG}, found {some(others)} (convert to safetensors)")


def _read_index(directory: Path) -> dict[str, str]:
    """The index's map from tensor to file name; without an index, the error that says what there is instead."""
    path = directory / INDEX
    if not path.exists():
        with reading(directory):
            files = [file for file in os.listdir(directory) if file.endswith((".safetensors", *FOREIGN_WEIGHTS))]
        found = f"only {some(files)}" if files else "neither"
        advice = " (convert to safetensors)" if files and not any(f.endswith(".safetensors") for f in files) else ""
        raise CheckpointError(f"{directory}: expected {WEIGHTS} or {INDEX}, found {found}{advice}")
    weight_map = read_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: weight_map: expected an object, tensor to file name, found {show(weight_map)}")
    for name, file in weight_map.items():
        # A plain name cannot lead out of the directory, and a printable one cannot hide what it is.
        plain = isinstance(file, str) and file.isprintable() and not set(file) & set("/\\:")
        if not plain or not file.endswith(".safetensors"):
            expected = "the name of a .safetensors file beside the index"
            raise CheckpointError(f"{path}: tensor {show(name)}: expected {expected}, found {show(file)}")
    return weight_map


def _with_prefix(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """A model saved without its head calls its tensors by shorter names."""
    if EMBEDDING in found or EMBEDDING.removeprefix("model.") not in found:
        return found
    names = {name: name if name == HEAD else f"model.{name}" for name in found}
    return {names[name]: replace(tensor, name=names[name]) for name, tensor in found.items()}


class Checkpoint(AbstractContextManager):
    """A checked model directory, its weights read one by one. A context manager; ``close`` gives the files back.

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
        _refuse_others(self.path)
        self.config = ModelConfig.from_json(self.path / CONFIG)
        generation = self.path / GENERATION
        self.generation = read_object(generation) if generation.exists() else {}
        self._files: dict[Path, BinaryIO] = {}
        try:
            found = _with_prefix(self._open_files())
            self._untie(found)
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Checkpoint {self.name!r}: {self.config.family}, {self.n_parameters} parameters, {self.dtype}>"

    def close(self) -> None:
        """Give the files back."""
        for file in self._files.values():
            file.close()
        self._files = {}

    def read(self, name: str) -> np.ndarray:
        """A tensor's bytes, ``uint8 [n_bytes]``, aligned to its elements.

        Raises
        ------
        CheckpointError
            The file has become shorter, or cannot be read.
        """
        tensor = self.tensors[name]
        if tensor.file not in self._files:
            raise ValueError(f"checkpoint {self.name!r} is closed")
        return read_tensor(self._files[tensor.file], tensor)

    def _open_files(self) -> dict[str, Tensor]:
        """Open the one file, or those that the index names; every tensor must be in the file that the index says."""
        # As in transformers, the single file wins over an index beside it.
        weight_map = None if (self.path / WEIGHTS).exists() else _read_index(self.path)
        found: dict[str, Tensor] = {}
        for path in [self.path / file for file in sorted(set(weight_map.values() if weight_map else [WEIGHTS]))]:
            self._files[path], tensors, _ = open_tensors(path)
            for name in sorted(found.keys() & tensors.keys()):
                both = f"expected in one file, found in {show(found[name].file.name)} too"
                raise CheckpointError(f"{path}: tensor {show(name)}: {both}")
            found.update(tensors)
        for name, file in (weight_map or {}).items():
            here = found[name].file.name if name in found else None
            if here != file:
                where = f"expected in {show(file)}, found in {show(here) if here else 'no file'}"
                raise CheckpointError(f"{self.path / INDEX}: tensor {show(name)}: {where}")
        unlisted = [] if weight_map is None else [name for name in found if name not in weight_map]
        surplus = [name for name in unlisted if not self._is_left_out(name)]
        if surplus:
            file = found[surplus[0]].file
            raise CheckpointError(f"{file}: expected only tensors that {INDEX} lists, found {some(surplus)}")
        return {name: tensor for name, tensor in found.items() if name not in unlisted}

    def _is_left_out(self, name: str) -> bool:
        """Old exports store RoPE's frequencies, which follow from the config; a tied head may be stored as well."""
        return name.endswith(".rotary_emb.inv_freq") or (self.config.tied and name == HEAD)

    def _untie(self, found: Mapping[str, Tensor]) -> None:
        """A head that is stored and differs from the embedding counts, whatever the config says, as in transformers."""
        if self.config.tied and HEAD in found and EMBEDDING in found:
            if not self._equal(found[EMBEDDING], found[HEAD]):
                self.config = replace(self.config, tied=False)

    def _compare(self, found: Mapping[str, Tensor], needed: Mapping[str, tuple[tuple[int, ...], bool]]) -> None:
        for name, (shape, _) in needed.items():
            if name in found and found[name].shape != shape:
                text = f"expected shape {list(shape)}, found {list(found[name].shape)}"
                raise CheckpointError(f"{found[name].file}: tensor {show(name)}: {text}")
        missing = needed.keys() - found.keys()
        surplus = [name for name in found.keys() - needed.keys() if not self._is_left_out(name)]
        if missing or surplus:
            parts = [f"missing {some(missing)}"] * bool(missing) + [f"surplus {some(surplus)}"] * bool(surplus)
            expected = f"expected the {len(needed)} tensors that {CONFIG} calls for"
            raise CheckpointError(f"{self.path}: {expected}, found {'; '.join(parts)}")

    def _equal(self, one: Tensor, other: Tensor) -> bool:
        if (one.dtype, one.shape) != (other.dtype, other.shape):
            return False
        for at in range(0, one.n_bytes, COMPARED):
            n = min(COMPARED, one.n_bytes - at)
            parts = (replace(tensor, offset=tensor.offset + at, n_bytes=n) for tensor in (one, other))
            if not np.array_equal(*(read_tensor(self._files[part.file], part) for part in parts)):
                return False
        return True


def hash_files(directory: Path) -> dict[str, str]:
    """SHA-256 of every file of a checkpoint that a model is made from, by name."""
    hashes = {}
    for path in sorted({path for pattern in HUB_FILES for path in directory.glob(pattern) if path.is_file()}):
        found = hashlib.sha256()
        with open_file(path) as file, reading(path):
            while part := file.read(COMPARED):
                found.update(part)
        hashes[path.relative_to(directory).as_posix()] = found.hexdigest()
    return hashes


def open_checkpoint(source: str | os.PathLike[str]) -> "Checkpoint":
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
        return Checkpoint(Path(__file__).parents[1] / "tiny", "tiny")
    path = os.path.expanduser(text)
    if os.path.isdir(path):
        return Checkpoint(path)
    if os.path.lexists(path):
        found = "something else"
        if os.path.isfile(path):
            with open_file(Path(path)) as file:
                found = what_is(file) or found
        raise CheckpointError(f"{path}: expected a directory with {CONFIG}, found {found}")
    if not isinstance(source, str) or text.startswith((".", "~")) or os.path.isabs(text):
        raise CheckpointError(f"{path}: expected a directory with {CONFIG}, found nothing")
    if not HUB_ID.fullmatch(text):
        raise CheckpointError(f"{show(text)}: expected a directory or a hub id (owner/name), found neither")
    return Checkpoint(_download(text), text)


def _download(hub_id: str) -> Path:
    import huggingface_hub  # slow to import, and only needed here

    try:
        return Path(huggingface_hub.snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # of many unrelated types: HTTP, network, validation, cache
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{hub_id}: expected a directory or a model on the Hugging Face hub: {reason}") from error
