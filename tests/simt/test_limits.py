"""Large models, long contexts and many rows: no launch is too large, no 32-bit product overflows, no store misses.

Runs tests/bench/launches.py in a process of its own, as an overflow or a store beside its array ends it.
"""

import subprocess
import sys

import pytest

from tests.bench import launches

pytestmark = pytest.mark.simt
QWEN = "r1-distill-qwen-7b"


@pytest.fixture(scope="module")
def run():
    try:
        launches.build()
    except launches.simt.Missing as missing:
        pytest.skip(str(missing))

    def launch(*arguments):
        """Shared memory by kernel and grid of every launch."""
        command = [sys.executable, "-m", "tests.bench.launches", *arguments, "--corners"]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=launches.ROOT)
        lines = map(str.split, table(done.stdout))
        found = {(name, tuple(map(int, grid))): int(shared) for name, *grid, _, shared in lines}
        assert done.returncode == 0 and found, done.stderr
        return found

    return launch


def table(text):
    """The lines without the spaces of a kernel's name."""
    return [line.replace(", ", ",") for line in text.splitlines()]


@pytest.mark.parametrize("arguments, kernel, grid", [
    # 256 rows × 12 heads of 8192 tokens: a cache of 13 GB
    (f"{QWEN} --rows 256 --context 8192 --layers 3", "attend_kernel<__nv_bfloat16,2,4>", (256, 4, 17)),
    # a sum a slot; nothing is evicted yet
    (f"{QWEN} --rows 256 --context 8192 --layers 2 --method h2o:budget=16384", "receive_kernel<__nv_bfloat16,2>",
     (256, 4, 136)),
    # the end of the context, where the last forward of the prompt has one token: of 512 a block looks at 67 M pairs
    (f"{QWEN} --rows 3 --context 130561 --layers 1", "attend_kernel<__nv_bfloat16,2,4>", (3, 4, 256)),
    # all heads of the prompt's row, then of eight rows at once
    (f"{QWEN} --rows 16 --context 1089 --method skipkv:budget=1024,interval=64", "select_kernel", (112, 1, 1)),
    # the queries' own array and long areas
    (f"{QWEN} --context 20000 --layers 2 --method snapkv:budget=1024", "importance_kernel<__nv_bfloat16,2>",
     (8, 1, 1)),
    # a search of the redundancy that a block a head would take for ever
    (f"{QWEN} --context 4200 --layers 1 --method skipkv:budget=1024", "search_kernel<__nv_bfloat16>", (4, 66, 1)),
    # matrices of 3.8 G elements: many rows, few rows, float32, and our own products
    (f"{QWEN} --rows 100 --context 200 --layers 1 --vocab 1048576", "halves_kernel", (100, 4096, 1)),
    (f"{QWEN} --rows 2 --context 200 --layers 1 --vocab 1048576", "gemv_kernel<__nv_bfloat16,2>", (131072, 1, 1)),
    (f"{QWEN} --rows 2 --context 200 --layers 1 --vocab 1048576 --dtype f32 --cache f32", "gemv_kernel<float,2>",
     (131072, 1, 1)),
    (f"{QWEN} --rows 64 --context 200 --layers 1 --vocab 1048576 --variant cuda:0:deterministic", "tile_kernel",
     (16384, 2, 1)),
    # tokens × heads beyond 65,535 in one forward
    (f"{QWEN} --rows 4096 --context 1 --layers 1 --vocab 1000", "merge_kernel", (14336, 1, 1)),
    ("head-256 --rows 2 --context 200 --layers 1 --cache f32", "attend_kernel<float,4,4>", (2, 4, 1)),
    ("head-512 --rows 2 --context 200 --layers 1 --cache f32", "attend_kernel<float,8,4>", (2, 4, 1)),
    ("tiny --rows 65600 --context 1 --layers 1 --method h2o:budget=16", "receive_kernel<__nv_bfloat16,1>",
     (65600, 2, 8)),
])  # fmt: skip
def test_launches_and_offsets_fit(run, arguments, kernel, grid):
    assert (kernel, grid) in run(*arguments.split())


@pytest.mark.parametrize("arguments", [
    *(f"{shape} --cache bf16" for shape in ("qwen2.5-0.5b", QWEN, "head-256", "head-512")),
    *(f"{shape} --cache f32" for shape in ("qwen2.5-0.5b", QWEN, "head-256")),
])  # fmt: skip
def test_attention_fits_the_smallest_shared_memory(run, arguments):
    """99 KiB a block: compute capabilities 8.6 and 8.9."""
    launches = run(*f"{arguments} --rows 2 --context 200 --layers 1".split())
    assert 0 < max(n for (kernel, _), n in launches.items() if kernel.startswith("attend_kernel")) <= 99 << 10
