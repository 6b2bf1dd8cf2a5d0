"""What the first hour with a GPU is good for, in one command: build, checks, and speeds as shares of the device's own.

    python -m tests.bench.gpu --out DIR [--seconds 540] [--shape r1-distill-qwen-7b]
    python -m tests.bench.gpu --out DIR --quick        # every path on tests/simt, a tiny shape; its figures say nothing

DIR/report.md and DIR/figures.json are written anew after every stage, DIR/speeds.json in the last one after every
measurement, so that what was there counts when the session is cut off. A stage that fails does not stop the next. What
the time was too short for is named.

Nothing of skipkv is imported here, as it may not be built yet; speeds.py measures, in a process of its own.

Weights are random. A multiply-accumulate is counted once, though bf16 weights are multiplied with two parts of each
activation: 50 % of the device's rate is what `cuda/` can reach. Bytes are the weights' and the held cache's, once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PYTHON = [sys.executable, "-m"]
LEAST = 20  # seconds under which no stage is begun


class Skipped(Exception):
    """The text says what is missing."""


# ---- stages that check ----


def run(command: list[str], seconds: float, log: Path, **environment: str) -> str:
    """The last line of the output, which log gets whole. Raises RuntimeError, or TimeoutExpired."""
    with log.open("w") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | environment, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a compiler or a test has children of its own
            process.wait()
            raise
    lines = log.read_text(errors="replace").strip().splitlines() or [""]
    if status:
        raise RuntimeError(f"exit status {status}: {lines[-1]}")
    return lines[-1]


def build(args: argparse.Namespace, seconds: float) -> str:
    if args.quick:
        return simt_library()
    return run([sys.executable, "setup.py", "build_ext", "--inplace"], seconds, args.out / "build.log", SKIPKV_CUDA="1")


def simt_library() -> str:
    """The backend on the CPU."""
    sys.path.append(str(ROOT / "tests"))
    import devices as backends
    import pytest

    try:
        return backends.library("simt")
    except pytest.skip.Exception as missing:
        raise Skipped(str(missing)) from None


def tests(name: str, *paths: str) -> Callable[[argparse.Namespace, float], str]:
    def stage(args: argparse.Namespace, seconds: float) -> str:
        chosen = ["-m", "simt", "-k", "rmsnorm or bad_batches"] if args.quick else ["-m", "cuda"]
        said = run([*PYTHON, "pytest", *chosen, *paths], seconds, args.out / f"{name}.log", PYTHONPATH=".")
        if "passed" not in said:
            raise Skipped(f"no test ran: {said}")
        return said

    return stage


def sanitizer(args: argparse.Namespace, seconds: float) -> str:
    """A prompt, compactions and a few tokens of the model in the box under memcheck."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    tool = shutil.which("compute-sanitizer", path=f"{home / 'bin'}:{os.environ['PATH']}")
    if args.quick or not tool:
        raise Skipped("the CPU has sanitizers of its own" if args.quick else "there is no compute-sanitizer")
    code = (
        "import skipkv; m = skipkv.load('tiny', progress=False, device='cuda');"
        "print(m.replay(list(range(40, 200)), 'skipkv:budget=32,interval=16', n_prompt=60).logprobs.sum())"
    )
    command = [tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", code]
    return run(command, seconds, args.out / "sanitizer.log", PYTHONPATH=".")


def measuring(args: argparse.Namespace, seconds: float) -> str:
    """In a process of its own: an error of a device takes all that this process has there with it."""
    command = [*PYTHON, "tests.bench.speeds", "--out", str(args.out / "speeds.json"), "--shape", args.shape,
               "--cache-gb", str(args.cache_gb), "--seconds", str(seconds - 2)]  # fmt: skip
    extra = {"SKIPKV_CUDA_LIBRARY": simt_library()} if args.quick else {}
    return run(command + ["--quick"] * args.quick, seconds, args.out / "speeds.log", PYTHONPATH=".", **extra)


# Name, what it does, and the seconds that it may take.
STAGES: list[tuple[str, Callable[[argparse.Namespace, float], str], float]] = [
    ("build", build, 150),
    ("ops", tests("ops", "tests/ops"), 60),
    ("engine", tests("engine", "tests/engine/test_forward.py", "tests/engine/test_custom.py",
                     "tests/engine/test_eviction.py"), 70),
    ("sanitizer", sanitizer, 40),
    ("speeds", measuring, 600),
]  # fmt: skip


# ---- the report ----


def shares(found: list[dict[str, Any]]) -> None:
    """Adds each measurement's rates, also as shares of the device's own, where both are known."""
    own = next((f for f in found if f.get("kind") == "limits"), {})
    for f in found:
        if "seconds" not in f:
            continue
        f["tokens_per_second"] = f["tokens"] / f["seconds"] if "tokens" in f else None
        for what, rate in (("bytes", "read_bytes_per_second"), ("macs", "macs_per_second")):
            if what not in f:
                continue
            f[f"{what}_per_second"] = f[what] / f["seconds"]
            if own.get(rate):
                f[f"{what}_share"] = f[f"{what}_per_second"] / own[rate]


# Title: key, factor, digits; the shares are of the device's own rates.
COLUMNS = {
    "ms": ("seconds", 1e3, 3), "tokens/s": ("tokens_per_second", 1, 1), "GB/s": ("bytes_per_second", 1e-9, 1),
    "% of own GB/s": ("bytes_share", 100, 1), "Tflop/s": ("macs_per_second", 2e-12, 2),
    "% of own Tflop/s": ("macs_share", 100, 1), "% evicting": ("evict_share", 100, 2),
    "ms evicting": ("evict_seconds", 1e3, 3),
    "cache GB": ("peak_bytes", 1e-9, 2), "samples/min": ("samples_per_minute", 1, 1),
}  # fmt: skip


def cell(value: float | None, factor: float, digits: int) -> str:
    return "" if value is None else f"{value * factor:.{digits}f}"


def table(found: list[dict[str, Any]]) -> list[str]:
    lines = ["| measurement | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    for f in found:
        if "failure" in f or f.get("kind") == "limits":
            continue
        cells = [cell(f.get(key), factor, digits) for key, factor, digits in COLUMNS.values()]
        lines.append("| " + " | ".join([f["name"], *cells]) + " |")
    return lines


def ratios(found: list[dict[str, Any]]) -> list[str]:
    """How much more the evicting method does in the same memory."""
    full, other = ([f for f in found if f["name"].startswith(f"largest batch, {name}") and "failure" not in f]
                   for name in ("full", "skipkv"))  # fmt: skip
    if not (full and other):
        return []
    a, b = full[0], other[0]
    return ["", f"In {a['limit_bytes'] / 1e9:g} GB of cache: {a['rows']} rows with the full cache, {b['rows']} with"
            f" {b['method']}: {b['rows'] / a['rows']:.1f} times the batch,"
            f" {b['samples_per_minute'] / a['samples_per_minute']:.1f} times the samples a minute."]  # fmt: skip


def write(path: Path, text: str) -> None:
    """At once, or not at all."""
    part = path.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def report(args: argparse.Namespace, stages: list[dict[str, Any]]) -> None:
    found: list[dict[str, Any]] = []
    with suppress(FileNotFoundError):
        found = json.loads((args.out / "speeds.json").read_text())
    shares(found)
    write(args.out / "figures.json", json.dumps({"shape": args.shape, "stages": stages, "speeds": found}, indent=1))
    lines = [f"# {args.shape}, {'tests/simt: figures without meaning' if args.quick else 'a device'}", "",
             "| stage | seconds | result |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {s['name']} | {s['seconds']} | {s['result']} |".replace("\n", " ") for s in stages]
    for f in found:
        if f.get("kind") == "limits":
            lines += ["", f"{f['variant']}: reads {f['read_bytes_per_second'] / 1e9:.0f} GB/s, multiplies"
                      f" {2 * f['macs_per_second'] / 1e12:.1f} Tflop/s."]  # fmt: skip
    missing = [f"* {f['name']}: {f['failure']}" for f in found if "failure" in f]
    if found:
        lines += ["", *table(found), *ratios(found)]
    if missing:
        lines += ["", "Not measured:", "", *missing]
    write(args.out / "report.md", "\n".join(lines) + "\n")


def main() -> int:
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=540, help="of all stages together")
    parser.add_argument("--shape", help="of shapes.py")
    parser.add_argument("--cache-gb", type=float, default=40, help="of the largest batches")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    args.shape = args.shape or ("tiny" if args.quick else "r1-distill-qwen-7b")
    (args.out / "speeds.json").unlink(missing_ok=True)  # of another run
    stages: list[dict[str, Any]] = []
    for name, stage, most in STAGES:
        at = time.monotonic()
        left = args.seconds - (at - begin)
        try:
            if left < LEAST:
                raise Skipped(f"{left:.0f} s were left")
            result = stage(args, min(most, left))
        except Skipped as skipped:
            result = f"skipped: {skipped}"
        except subprocess.TimeoutExpired as late:
            result = f"cut off after {late.timeout:.0f} s"
        except Exception as error:
            result = f"failed: {error}"
        stages.append({"name": name, "seconds": round(time.monotonic() - at, 1), "result": result})
        report(args, stages)
    print((args.out / "report.md").read_text())
    return any(s["result"].startswith(("failed", "cut off")) for s in stages)


if __name__ == "__main__":
    sys.exit(main())
