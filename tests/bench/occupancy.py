"""Registers, shared memory and occupancy of the CUDA kernels on sm_80 and sm_90, as a Markdown table; no device needed.

    python -m tests.bench.occupancy

ptxas says what each kernel takes; the dynamic shared memory is what the backend asks for when it runs the shapes below
(launches.py). A spilled register, or a kernel that fits on neither of the two, is an error.
"""

from __future__ import annotations

import itertools
import re
import runpy
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.launches import ROOT, Launch, build, record, short
from tests.bench.shapes import SHAPES
from tests.simt import build as simt

ARCHITECTURES = (80, 90)
WARPS = 64  # of a multiprocessor
# Between them: every op of a step, of every term, and every instance of the kernels that take dynamic shared memory.
METHODS = ("h2o:budget=128", "tova:budget=128", "skipkv:budget=128,interval=64", "rkv:budget=128,compat=official")
RUNS = [("qwen2.5-0.5b", "64"), ("r1-distill-qwen-7b", "128"), ("head-256", "256"), ("head-512", "512")]
THREADS = 256  # of the launches that these runs do not have; none of them takes dynamic shared memory


@dataclass(frozen=True)
class Usage:
    """What ptxas says of a kernel on one architecture; bytes."""

    registers: int
    shared: int
    stack: int
    spilled: int


def ptxas() -> dict[str, dict[int, Usage]]:
    """By kernel and architecture. Raises `Missing` of setup.py, which says what the build needs."""
    setup = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
    try:
        nvcc, _, headers = setup["find_cuda"]()
    except setup["Missing"] as missing:
        raise simt.Missing(str(missing)) from None
    command = [nvcc, *setup["CUDA_FLAGS"], "-Werror", "all-warnings", "-isystem", headers, "--resource-usage", "-c"]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:
        texts = pool.map(lambda p: simt.run([*command, p, "-o", Path(folder, p.name)]), simt.CUDA.glob("*.cu"))
        text = subprocess.run(["c++filt"], input="".join(texts), capture_output=True, text=True, check=True).stdout
    found: dict[str, dict[int, Usage]] = {}
    parts = re.split(r"Compiling entry function '(.*)' for 'sm_(\d+)'", text)[1:]
    for name, architecture, said in zip(*[iter(parts)] * 3, strict=True):

        def number(pattern: str, said: str = said) -> int:
            return sum(int(n) for n in re.findall(pattern, said))

        found.setdefault(short(name), {})[int(architecture)] = Usage(
            number(r"Used (\d+) registers"), number(r"(\d+) bytes smem"), number(r"(\d+) bytes stack frame"),
            number(r"(\d+) bytes spill"),
        )  # fmt: skip
    return found


def launched(library: Path) -> dict[Launch, str]:
    """Each kernel as it is launched, without its grid and with the most shared memory, and the runs that do so."""
    most: dict[tuple[str, str], Launch] = {}
    for (shape, head_dim), cache, method in itertools.product(RUNS, ("bf16", "f32"), METHODS):
        variant = "cuda:0:deterministic" if method == METHODS[0] else "cuda:0"
        for launch in record(
            replace(SHAPES[shape], n_layers=1), library=library, rows=5, context=200, method=method, cache=cache,
            dtype=cache, variant=variant,
        ):  # fmt: skip
            key = launch.kernel, f"{head_dim} {cache}" if launch.shared else ""
            most[key] = max(most.get(key, launch), launch, key=lambda one: one.shared)
    ways: dict[Launch, list[str]] = {}
    for (_, run), launch in most.items():
        ways.setdefault(replace(launch, grid=(1, 1, 1)), []).append(run)
    return {launch: ", ".join(runs) for launch, runs in ways.items()}


def occupancy(folder: Path, lines: list[str]) -> list[int]:
    """Blocks of a multiprocessor; see occupancy.cpp."""
    program = folder / "occupancy"
    found = [part for place in simt.includes() for part in ("-isystem", place)]
    simt.run(["g++", "-std=c++17", *found, Path(__file__).with_suffix(".cpp"), "-o", program])
    done = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True)
    return [int(n) for n in done.stdout.split()]


def main() -> int:
    try:
        usage = ptxas()
        with tempfile.TemporaryDirectory() as folder:
            ways = launched(build())
            ways |= {Launch(name, (1, 1, 1), THREADS, 0): "" for name in usage.keys() - {w.kernel for w in ways}}
            rows = [(w, runs, usage[w.kernel]) for w, runs in sorted(ways.items(), key=lambda item: str(item))]
            blocks = occupancy(Path(folder), [
                f"{a} {of[a].registers} {way.threads} {of[a].shared} {way.shared}"
                for way, _, of in rows for a in ARCHITECTURES
            ])  # fmt: skip
    except simt.Missing as missing:
        print(f"skipped: {missing}")
        return 0
    bad = []
    heads = (f"sm_{a}: registers, stack, spills | blocks, occupancy" for a in ARCHITECTURES)
    print("| kernel | head_dim, cache | threads | shared: static + dynamic | " + " | ".join(heads) + " |")
    print("|---" * (4 + 2 * len(ARCHITECTURES)) + "|")
    for i, (way, runs, of) in enumerate(rows):
        cells = [f"`{way.kernel}`", runs, str(way.threads), f"{of[ARCHITECTURES[0]].shared} + {way.shared}"]
        fit = blocks[2 * i : 2 * i + 2]
        for a, n in zip(ARCHITECTURES, fit, strict=True):
            share = 100 * n * way.threads // 32 // WARPS
            cells += [f"{of[a].registers}, {of[a].stack}, {of[a].spilled}", f"{n}, {share} %" if n else "does not fit"]
            if of[a].spilled:
                bad.append(f"{way.kernel} spills {of[a].spilled} bytes on sm_{a}")
        if not any(fit):
            bad.append(f"{way.kernel} fits nowhere with {way.shared} bytes of dynamic shared memory ({runs})")
        print("| " + " | ".join(cells) + " |")
    for line in dict.fromkeys(bad):
        print(line, file=sys.stderr)
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
