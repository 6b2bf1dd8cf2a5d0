"""Where models compute: the CPU, or a device of the CUDA backend, a shared object of its own beside the package.

Nothing of CUDA is touched before a CUDA device is asked for.
"""

import ctypes
import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from skipkv import _skipkv
from skipkv.checks import wrong
from skipkv.errors import BackendError

CUDA = "cuda:0"  # what "cuda" stands for


def find(device: str) -> tuple[str | None, str | None]:
    """What `_skipkv.Model` takes for a device.

    Parameters
    ----------
    device : str
        ``"cpu"``, ``"cuda"`` (the first one) or ``"cuda:N"``.

    Returns
    -------
    (str or None, str or None)
        Name of the variant, path of the shared object.

    Raises
    ------
    ConfigError
        No device is called so.
    BackendError
        Something that it needs is missing here; the message says what, and how to get it.
    """
    if isinstance(device, str) and device == "cpu":
        return os.environ.get("SKIPKV_CPU") or None, None
    if not isinstance(device, str) or not re.fullmatch("cuda(:[0-9]{1,4}(:deterministic)?)?", device):
        raise wrong("device", device, "cpu, cuda, cuda:N")
    name = CUDA if device == "cuda" else device
    try:
        library = _cuda_library()
        known = _skipkv.variants(library)
        usable = [each for each, (runs_here, _) in known.items() if runs_here]
        unknown = (False, f"usable here: {', '.join(usable)}") if usable else known[CUDA]
        runs_here, about = known.get(name, unknown)
        if not runs_here:
            raise BackendError(about)
    except BackendError as error:
        raise BackendError(f"device is {device!r}: {error}") from None
    return name, library


def every() -> list[dict[str, Any]]:
    """The CPU's variants and CUDA's devices, best first: ``{"device", "variant", "usable", "about"}``.

    about: what it is, or why it is not usable.
    """
    found = [("cpu", name, *what) for name, what in _skipkv.variants().items()]
    try:
        found += [(name, None, *what) for name, what in _skipkv.variants(_cuda_library()).items()]
    except BackendError as error:
        found.append(("cuda", None, False, str(error)))
    return [dict(zip(("device", "variant", "usable", "about"), row, strict=True)) for row in found]


def _cuda_library() -> str:
    """Path of the CUDA backend; what it needs of cuBLAS is in the process."""
    given = os.environ.get("SKIPKV_CUDA_LIBRARY")
    built = [Path(given)] if given else sorted(Path(__file__).parent.glob("_skipkv_cuda*.so"))
    if not built:
        how = "with nvcc and cuBLAS's headers at hand, pip install --no-build-isolation --no-deps -e . makes one"
        raise BackendError(f"this build has no CUDA backend; {how}")
    version = re.fullmatch("_skipkv_cuda([0-9]+)", built[-1].stem)
    if version:
        _load_cublas(int(version[1]))
    return str(built[-1])


def _load_cublas(major: int) -> None:
    """cuBLAS's symbols for all: from where the loader looks, a wheel, or the toolkit."""
    wheels = importlib.util.find_spec("nvidia")
    folders = [Path()]
    for place in wheels.submodule_search_locations or () if wheels else ():
        folders += sorted(Path(place).glob("*/lib"))
    folders.append(Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "lib64"))
    name = f"libcublas.so.{major}"
    failure = f"{name}: not found"
    for folder in folders:
        try:
            for part in (f"libcublasLt.so.{major}", name):  # which need not look beside itself for the other
                ctypes.CDLL(str(folder / part), ctypes.RTLD_GLOBAL)
            return
        except OSError as error:
            if (folder / name).exists():
                failure = str(error)
    package = "nvidia-cublas" if major > 12 else f"nvidia-cublas-cu{major}"
    raise BackendError(f'{failure} (pip install "{package}=={major}.*")')
