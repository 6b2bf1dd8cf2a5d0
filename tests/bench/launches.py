"""What the CUDA backend launches for a model of any size: grids and shared memory, without a device and its memory.

    python -m tests.bench.launches SHAPE [--rows N] [--context N] [--method M] [--cache C] [--corners]

The engine runs on stand-ins for the CUDA runtime (launches.cpp) with weights that are never read. --corners: of the
last two forwards the blocks at the corners of each grid compute, too, and overflows of signed integers end the process.
What no device can launch is an error.
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from skipkv import _skipkv
from skipkv.engine import FORWARD_TOKENS
from skipkv.load.config import ModelConfig
from skipkv.methods import parse_method
from tests.bench.shapes import SHAPES
from tests.simt import build as simt

ROOT = Path(__file__).resolve().parents[2]
OVERFLOWS = ["-fsanitize=signed-integer-overflow,shift,bounds", "-fno-sanitize-recover=all"]


@dataclass(frozen=True)
class Launch:
    kernel: str  # as `attend_kernel<__nv_bfloat16, 2, 4>`
    grid: tuple[int, int, int]
    threads: int
    shared: int  # dynamic, bytes

    def possible(self) -> bool:
        """On some device. Bounds of every compute capability from 8.0 on; 227 KiB: those of 9.0 and 10.0."""
        return all(1 <= n <= most for n, most in zip(self.grid, (2**31 - 1, 65535, 65535), strict=True)) and (
            self.shared <= 227 << 10
        )


def build() -> Path:
    """The backend on the stand-ins, a shared object. Raises simt.build.Missing."""
    sources = [*sorted(simt.CUDA.glob("*.cu")), Path(__file__).with_suffix(".cpp"), *simt.SCHEDULER]
    how = [*simt.flags("g++"), "-O1", *OVERFLOWS]  # at -O2 the kernels take many minutes
    objects = simt.compile_all((how, source) for source in sources)
    return simt.link(["g++", *OVERFLOWS], [*objects, *simt.compile_core()])


def short(name: str) -> str:
    """A demangled kernel without its parameters."""
    return name.removeprefix("void ").replace("(anonymous namespace)::", "").split("(", 1)[0].strip()


def read(library: Path, path: Path) -> list[Launch]:
    """What launches.cpp has written down."""
    names = {}
    for line in subprocess.run(["nm", "-C", library], capture_output=True, text=True, check=True).stdout.splitlines():
        address, _, name = line.partition(" ")
        if address:
            names[int(address, 16)] = short(name[2:])
    found = []
    for line in path.read_text().splitlines():
        place, *numbers = line.split()
        x, y, z, threads, shared = map(int, numbers)
        found.append(Launch(names[int(place, 16)], (x, y, z), threads, shared))
    return found


def record(
    config: ModelConfig, *, library: Path, rows: int = 1, context: int = 1, method: str = "full", cache: str = "bf16",
    dtype: str = "bf16", variant: str = "cuda:0", corners: bool = False,
) -> list[Launch]:  # fmt: skip
    """Launches of a prompt of `context` tokens, of its row's copies, and of one token of each of `rows` rows."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "launches")
        watch = ctypes.CDLL(str(library)).launches_watch
        watch(str(path).encode(), False, False)
        model = _skipkv.Model(config.as_dict(), dtype, variant, str(library))
        for name, size, _ in _skipkv.tensors(config.as_dict()):  # zeros that no page was ever given to
            model.bind(name, "bf16", size, np.zeros(2 * int(np.prod(size)), np.uint8), 1)
        session = _skipkv.Session(
            model, rows=rows, tokens=max(FORWARD_TOKENS, rows), cache=cache, trace=1,
            method=parse_method(method).as_dict((config.n_layers, config.n_kv_heads)),
        )  # fmt: skip
        token = config.vocab - 1
        row = session.open(context + 1, n_prompt=context)
        for at in range(0, context, FORWARD_TOKENS):
            n = min(FORWARD_TOKENS, context - at)
            watch(None, True, corners and at + n == context)
            session.forward(np.array([[row, n]], np.int32), np.full(n, token, np.int32))
        watch(None, True, False)
        open_rows = [row] + [session.fork(row, context + 1, i) for i in range(1, rows)]
        watch(None, True, corners)
        spans, logits = np.array([(row, 1) for row in open_rows], np.int32), np.empty((rows, config.vocab), np.float32)
        session.forward(spans, np.full(rows, token, np.int32), logits, best=np.empty(rows, np.int32))
        return read(library, path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="in place of the shape's")
    parser.add_argument("--vocab", type=int, help="in place of the shape's")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--context", type=int, default=1)
    parser.add_argument("--method", default="full")
    parser.add_argument("--cache", default="bf16", choices=("bf16", "f32"))
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "f32"))
    parser.add_argument("--variant", default="cuda:0", choices=("cuda:0", "cuda:0:deterministic"))
    parser.add_argument("--corners", action="store_true")
    args = parser.parse_args()
    changed = {"n_layers": args.layers, "vocab": args.vocab}
    config = replace(SHAPES[args.shape], **{key: value for key, value in changed.items() if value})
    found = record(
        config, library=build(), rows=args.rows, context=args.context, method=args.method, cache=args.cache,
        dtype=args.dtype, variant=args.variant, corners=args.corners,
    )  # fmt: skip
    for launch in dict.fromkeys(found):
        print(launch.kernel, *launch.grid, launch.threads, launch.shared, sep="\t")
    impossible = [launch for launch in dict.fromkeys(found) if not launch.possible()]
    for launch in impossible:
        print(f"no device can do this: {launch}", file=sys.stderr)
    return bool(impossible)


if __name__ == "__main__":
    sys.exit(main())
