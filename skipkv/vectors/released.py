"""Released vectors: a torch.save archive, read without running what is pickled."""

import io
import pickle
import pickletools
import zipfile
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from skipkv.checks import flag, integer, path_of
from skipkv.errors import CheckpointError
from skipkv.load.files import open_file, what_is
from skipkv.steering import save_vectors

SHARED = {"GLOBAL", "STACK_GLOBAL", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}  # what torch.save names a second time
STORAGES = {"FloatStorage": "<f4", "HalfStorage": "<f2", "BFloat16Storage": "<u2", "DoubleStorage": "<f8"}


def _check(raw: bytes) -> None:
    """Refuse a pickle that is small and makes much: ValueError.

    A place in the memo takes the memory of all places before it; and of what stands in several places a few bytes make
    a tree that nobody sees the end of.
    """
    memo: dict[int, str] = {}
    made = ""
    for opcode, argument, _ in pickletools.genops(raw):
        if "PUT" in opcode.name or opcode.name == "MEMOIZE":
            memo[place := len(memo) if argument is None else argument] = made
            if place > len(raw):
                raise ValueError(f"a pickle of {len(raw)} bytes with a memo of {place} places")
        elif opcode.name == "DUP" or "GET" in opcode.name and memo.get(argument) not in SHARED:
            raise ValueError("a pickle with one part in several places")
        else:
            made = opcode.name


class _Reader(pickle.Unpickler):
    """Knows tensors and nothing else: any other name in the file is refused before anything is called."""

    def __init__(self, path: Path, archive: zipfile.ZipFile, root: str) -> None:
        raw = archive.read(f"{root}/data.pkl")
        _check(raw)
        super().__init__(io.BytesIO(raw))
        self.path, self.archive, self.root = path, archive, root

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _rebuild
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return lambda tensor, *_: tensor
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
        brain = storage == "BFloat16Storage"
        return (raw.astype(np.uint32) << 16).view(np.float32) if brain else raw.astype(np.float32)


def _rebuild(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    if not isinstance(storage, np.ndarray):  # a pickle can put anything here, of elements of any size
        raise ValueError("a tensor without a storage")
    offset, shape, stride = int(offset), [int(n) for n in shape], [int(s) for s in stride]
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True) if n)
    if max(last + 1, offset + prod(shape)) > len(storage) or min(stride, default=0) < 0:
        raise ValueError("a tensor beyond its storage")
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, [4 * s for s in stride]).copy()


def read_torch_tensor(path: str | Path) -> np.ndarray:
    """A tensor that ``torch.save`` wrote, as float32; no torch, and no code of the file is run.

    Raises
    ------
    CheckpointError
        It is something else.
    """
    path = path_of("path", path)
    with open_file(path) as file:
        try:
            archive = zipfile.ZipFile(file)
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            root = pickles[0].removesuffix("/data.pkl") if pickles else "archive"
            tensor = _Reader(path, archive, root).load()
        except zipfile.BadZipFile:
            found = what_is(file, archive=True) or "something else"
            raise CheckpointError(f"{path}: expected a zip archive of torch.save, found {found}") from None
        except CheckpointError:
            raise
        except Exception as error:  # a damaged pickle can raise nearly anything
            raise CheckpointError(f"{path}: expected a tensor of torch.save: {error}") from None
    if not isinstance(tensor, np.ndarray):
        raise CheckpointError(f"{path}: expected one tensor, found {type(tensor).__name__}")
    return tensor


def import_released(path: str | Path, layer: int, out: str, negate: bool = True) -> np.ndarray:
    """Convert a released vector (re-checking − execution, the negative of ours) to safetensors; returns ours."""
    integer("layer", layer, 0, None)
    path_of("out", out)
    flag("negate", negate)
    tensor = read_torch_tensor(path)
    vector = tensor.reshape(-1) if prod(tensor.shape) == max(tensor.shape, default=0) else None
    if vector is None or not np.isfinite(vector).all():
        raise CheckpointError(f"{path}: expected finite numbers [hidden], found shape {list(tensor.shape)}")
    vector = -vector if negate else vector
    save_vectors(out, {layer: vector}, {"source": Path(path).name, "negated": str(negate).lower()})
    return vector
