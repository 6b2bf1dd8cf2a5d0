"""The SIMT runtime on the host: what kernels compute on it, and the bugs that it must find."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from simt.build import CLANG, Missing, build, preload

HERE = Path(__file__).parent
pytestmark = pytest.mark.simt


def bf16(x):
    """The nearest bfloat16 of each, as float32; its upper halves are the bits."""
    bits = np.float32(x).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)


def pairs(x):
    """bf16 values [..., 2n] → 32-bit registers [..., n], the first in the lower half."""
    bits = bf16(x).view(np.uint32) >> 16
    return np.ascontiguousarray(bits[..., 0::2] | bits[..., 1::2] << 16)


# ---------------------------------------------------------------------------------------------------------------------
# What it computes


def test_every_thread_runs_once_at_its_place(device, schedule):
    grid, block = (3, 2, 2), (5, 4, 3)
    out = device.put(np.zeros(12 * 60, np.int32))
    device.ok("run_places", out, *grid, *block)
    found = device.get(out, (12, 60), np.int32)
    assert (found == np.arange(12)[:, None] * 1000 + np.arange(60)).all()


def test_barriers_count(device, schedule, rng):
    x = rng.integers(0, 10, 96).astype(np.int32)
    count, every, some = (device.put(np.zeros(96, np.int32)) for _ in range(3))
    device.ok("run_barriers", device.put(x), count, every, some)
    assert (device.get(count, 96, np.int32) == np.count_nonzero(x)).all()
    assert (device.get(every, 96, np.int32) == 1).all()
    assert (device.get(some, 96, np.int32) == (x > 8).any()).all()


@pytest.mark.parametrize("argument", [0, 1, 5, 16, 31])
def test_shuffles(device, schedule, rng, argument):
    x = rng.standard_normal((2, 32)).astype(np.float32)
    out = device.put(np.zeros(7 * 64, np.float32))
    device.ok("run_shuffles", device.put(x), out, argument)
    lane, base = np.arange(32), np.arange(32) // 8 * 8
    sources = [
        np.full(32, argument),
        np.where(lane >= argument, lane - argument, lane),
        np.where(lane + argument < 32, lane + argument, lane),
        lane ^ argument,
        base + argument % 8,
        np.where(lane % 8 + argument < 8, lane + argument, lane),
    ]
    found = device.get(out, (7, 2, 32))
    for row, source in zip(found[:6], sources, strict=True):
        assert (row == x[:, source]).all()
    assert (found[6] == (np.float32(x[:, lane ^ 1] + 1e-12) < x[:, lane ^ 1].astype(float) + 1e-12)).all()  # 64 bits


def test_votes_of_some_lanes(device, schedule, rng):
    x = rng.integers(-9, 10, 32).astype(np.int32)
    found = device.run("votes", x, shape=(8, 32), dtype=np.int32)
    for odd in (0, 1):
        mine = np.arange(odd, 32, 2)
        y = x[mine]
        ballot = sum(1 << int(i) for i in mine if x[i] > 0)
        same = [sum(1 << int(j) for j in mine if x[j] == x[i]) for i in mine]
        expected = [ballot, (y > 8).any(), (y > -9).all(), y.sum(), y.min(), y.max(), y.view(np.uint32).min(), same]
        for row, value in zip(found, expected, strict=True):
            assert (row[mine].view(np.uint32) == np.array(value).astype(np.int64) % 2**32).all()


def test_copies_arrive_when_waited_for(device, schedule, rng):
    x = rng.standard_normal((5, 64, 4)).astype(np.float32)
    out = device.put(np.zeros_like(x))
    device.ok("run_copies", device.put(x), out, 5)
    assert (device.get(out, x.shape) == x[:, ::-1]).all()


def test_atomics(device, schedule, rng):
    x = rng.integers(1, 100, 128).astype(np.int32)
    i, u = device.put(np.array([0, 0, 1000, 0, 0, 0], np.int32)), device.put(np.array([0, 0, 1000], np.uint32))
    wide, real = device.put(np.zeros(1, np.uint64)), device.put(np.zeros(1, np.float32))
    device.ok("run_atomics", device.put(x), i, u, wide, real)
    total, most, least, bits, first, exchanged = device.get(i, 6, np.int32)
    assert (total, most, least) == (x.sum(), x.max(), x.min())
    assert np.uint32(bits) == np.bitwise_or.reduce(np.uint32(1) << (x & 31).astype(np.uint32))
    assert first == exchanged and first in x
    assert (device.get(u, 3, np.uint32) == [x.sum(), x.max(), x.min()]).all()
    assert device.get(wide, 1, np.uint64)[0] == int(x.sum()) << 32
    assert device.get(real, 1)[0] == x.sum() / 2


def test_the_last_block_sees_what_the_others_left(device, schedule):
    partial, arrived = device.empty(64), device.put(np.zeros(1, np.uint32))
    assert device.run("last_block", partial, arrived, shape=1)[0] == 136


def test_threads_of_a_block_may_wait_for_a_lock(device, schedule):
    lock = device.put(np.zeros(1, np.int32))
    assert device.run("spin_lock", lock, shape=1, dtype=np.int32)[0] == 64


def test_integer_intrinsics(device, rng):
    x = np.concatenate([rng.integers(0, 2**32, 300), [0, 1, 2**31, 2**32 - 1]]).astype(np.uint32)
    out = device.put(np.zeros(8 * x.size, np.uint32))
    device.ok("run_integers", device.put(x), out, x.size)
    found = device.get(out, (8, x.size), np.uint32)
    for i, v in enumerate(map(int, x)):
        text = f"{v:032b}"
        assert found[0, i] == text.count("1")
        assert found[1, i] == (32 - v.bit_length())
        assert found[2, i] == (text[::-1].find("1") + 1)
        assert found[3, i] == int(text[::-1], 2)
        assert found[4, i] == v * v >> 32
    assert (found[5] == x).all()
    assert (found[6].view(np.int32) == np.minimum(x.view(np.int32), 7)).all()
    assert (found[7] == np.maximum(x, 7)).all()


def test_float_intrinsics(device, rng):
    x = rng.uniform(0.1, 4, 300).astype(np.float32)
    out = device.put(np.zeros(8 * x.size, np.float32))
    device.ok("run_floats", device.put(x), out, x.size)
    found, y = device.get(out, (8, x.size)), x.astype(float)
    for row, expected in zip(found[:6], [np.exp(y), y**-0.5, 1 / y, 1 / y, y * y - 1, np.log(y)], strict=True):
        np.testing.assert_allclose(row, expected, rtol=3e-7, atol=3e-7)
    assert (found[6] == bf16(x)).all() and (found[7] == 0).all()


def test_mma_takes_fragments_as_ptx_lays_them_out(device, rng):
    a, b, c = bf16(rng.standard_normal((16, 16))), bf16(rng.standard_normal((16, 8))), rng.standard_normal((16, 8))
    group, within = np.arange(32)[:, None] // 4, np.arange(32)[:, None] % 4 * 2
    i = np.arange(8)
    of_a = a[group + (i // 2 % 2) * 8, within + i % 2 + i // 4 * 8]
    of_b = b[within + i[:4] % 2 + i[:4] // 2 * 8, group]
    place = (group + i[:4] // 2 * 8, within + i[:4] % 2)
    found = device.run("fragments", pairs(of_a), pairs(of_b), c[place].astype(np.float32), shape=(32, 4))
    np.testing.assert_allclose(found, (a.astype(float) @ b + c)[place], rtol=0, atol=1e-5)  # f32 sums of 17 terms


def test_ldmatrix(device, rng):
    x = rng.integers(0, 2**16, (4, 8, 8)).astype(np.uint16)  # [matrix, row, column]
    plain, transposed = device.empty(512), device.empty(512)
    device.ok("run_matrices", device.put(x), plain, transposed)
    for pointer, matrices in ((plain, x), (transposed, x.transpose(0, 2, 1))):
        registers = np.ascontiguousarray(matrices).view(np.uint32).reshape(4, 32)  # lane 4r + c holds row r
        assert (device.get(pointer, (32, 4), np.uint32) == registers.T).all()


def order(device):
    out, place = device.put(np.zeros(512, np.int32)), device.put(np.zeros(2, np.int32))
    device.ok("run_order", out, place)
    return device.get(out, (2, 256), np.int32).tolist()


def test_schedules_take_threads_and_blocks_in_their_order(device, monkeypatch):
    forward = list(range(256))
    device.run("last_block", device.empty(64), device.put(np.zeros(1, np.uint32)), shape=1)
    for name, expected in (("forward", forward), ("reverse", forward[::-1])):
        monkeypatch.setenv("SIMT_SCHEDULE", name)
        for _ in range(9):  # earlier launches, and their atomics, count for nothing
            assert order(device) == [expected, expected]
    monkeypatch.setenv("SIMT_SCHEDULE", "random")
    monkeypatch.setenv("SIMT_SEED", "3")
    first, second = order(device)
    assert sorted(first) == sorted(second) == forward and first != second and first != forward
    assert {i // 64 for i in first[:64]} != {0} or {i // 64 for i in first[64:128]} != {1}  # blocks, too
    assert order(device) == [first, second]
    monkeypatch.setenv("SIMT_SEED", "4")
    assert order(device) != [first, second]


def test_fresh_memory_is_poisoned(device, library):
    assert np.isnan(device.get(device.empty(400), 100)).all()
    static, dynamic, same = device.run("fresh_shared", shape=(3, 32), dtype=np.uint32)
    assert (dynamic == 2**32 - 1).all() and (same == 1).all()
    if "clang" in library.name:  # g++ cannot gather static arrays
        assert (static == 2**32 - 1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Bugs: name → tool, settings, what the report must say

PLAIN, ADDRESS, THREAD, MEMORY = ("g++", None), ("g++", "address"), (CLANG, "thread"), (CLANG, "memory")
GUARD, RANDOM, REVERSE = {"SIMT_GUARD": "1"}, {"SIMT_SCHEDULE": "random"}, {"SIMT_SCHEDULE": "reverse"}
BUGS = {
    "missing_syncthreads": (THREAD, {}, "data race .*missing_syncthreads"),
    "missing_second_syncthreads": (THREAD, {}, "data race .*missing_second_syncthreads"),
    "missing_syncwarp": (THREAD, {}, "data race .*missing_syncwarp"),
    "ldmatrix_without_barrier": (THREAD, {}, "data race .*ldmatrix_without_barrier"),
    "race_between_blocks": (THREAD, {}, "data race .*race_between_blocks"),
    "missing_fence": (THREAD, {}, "data race .*missing_fence"),
    "global_overrun": (ADDRESS, {}, "heap-buffer-overflow .*global_overrun"),
    "shared_overrun": (ADDRESS, {}, r"bugs\.cu:\d+:\d+: runtime error: store to address \w+ with insufficient space"),
    "dynamic_shared_overrun": (ADDRESS, {}, "use-after-poison .*dynamic_shared_overrun"),
    "misaligned_vector": (ADDRESS, {}, r"bugs\.cu:\d+:\d+: runtime error: .*misaligned address"),
    "use_after_free": (ADDRESS, {}, "heap-use-after-free .*plain"),
    "device_leak": (ADDRESS, {}, r"100 byte\(s\) leaked"),
    "uninitialised_shared": (MEMORY, {}, "use-of-uninitialized-value .*uninitialised_shared"),
    "uninitialised_dynamic_shared": (MEMORY, {}, "use-of-uninitialized-value .*uninitialised_dynamic_shared"),
    "uninitialised_global": (MEMORY, {}, "use-of-uninitialized-value .*uninitialised_global"),
    "misaligned_copy16": (PLAIN, {}, r"thread 0: cudax_copy16 of an address that is not a multiple of 16, bugs\.cu"),
    "missing_copy_wait": (PLAIN, {}, "wrong result"),
    "copy_wait_one_group_short": (PLAIN, {}, "wrong result"),
    "divergent_syncthreads": (PLAIN, {}, r"divergent barrier: thread 32 is at __syncthreads, bugs\.cu:\d+, others at"),
    "syncthreads_after_exit": (PLAIN, {}, r"thread 48 has exited.*\n.*0 to 47 wait at __syncthreads, bugs\.cu:\d+"),
    "shuffle_in_branch": (PLAIN, {}, r"16 has exited, .*\n.*0 to 15 wait at __shfl_xor_sync, mask ffffffff, bugs\.cu"),
    "shuffle_after_exit": (PLAIN, {}, "thread 24 has exited, thread 0 waits for its lane 24"),
    "shuffle_from_inactive_lane": (PLAIN, {}, "thread 4 reads lane 8, which does not take part: __shfl_down_sync"),
    "lane_outside_its_mask": (PLAIN, {}, "thread 16 is at a collective whose mask lacks its lane 16"),
    "masks_disagree": (PLAIN, {}, r"divergent warp collective: thread 1 is at __syncwarp, mask ffffffff, bugs\.cu:\d+"),
    "different_collectives": (PLAIN, {}, "divergent warp collective: .* at __ballot_sync.* at __any_sync"),
    "deadlock": (PLAIN, {}, r"deadlock(.*\n)+.*wait at __syncthreads, .*\n(.*\n)*.*wait at __syncwarp"),
    "waits_for_another_block": (PLAIN, {}, "thread 0 does atomics without end; blocks run one after another"),
    "missing_synchronisation": (PLAIN, {}, "wrong result"),
    "early_reuse": (PLAIN, {}, "wrong result"),
    "streams_without_event": (PLAIN, {}, "wrong result"),
    "host_touches_device": (PLAIN, GUARD, "host code touches device memory"),
    "too_much_shared": (PLAIN, {}, "cudaErrorInvalidConfiguration"),
    "bad_grid": (PLAIN, {}, "cudaErrorInvalidConfiguration"),
    "copy_overrun": (PLAIN, {}, "cudaErrorInvalidValue"),
    "lane_beyond_the_block": (PLAIN, {}, "thread 39 reads lane 8, which does not take part"),
}
ALSO = [  # caught without a sanitizer, too
    ("missing_syncthreads", RANDOM, "wrong result"),
    ("missing_syncwarp", RANDOM, "wrong result"),
    ("uninitialised_global", {}, "wrong result"),
    ("global_overrun", GUARD, "overrun of device memory"),
    ("syncthreads_after_exit", REVERSE, r"thread 47 is at a barrier, bugs\.cu:\d+, and others have exited"),
    ("shuffle_after_exit", REVERSE, "thread 23 waits for lanes that have exited: ff000000"),
]
CASES = [pytest.param(tool, name, *rest, id=name) for name, (tool, *rest) in BUGS.items()]
CASES += [pytest.param(PLAIN, *case, id=f"{case[0]}-plain") for case in ALSO]


def run(program, *arguments, **settings):
    environment = {**os.environ, **settings}
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=60, env=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def program(built):
    """The program with every bug, for a tool."""
    return lambda tool: built(*tool, "bugs", "kernels", shared=False)


@pytest.mark.parametrize("tool, name, settings, words", CASES)
def test_a_bug_is_found_and_its_corrected_twin_is_clean(program, tool, name, settings, words):
    program = program(tool)
    status, report = run(program, name, **settings)
    assert status != 0 and re.search(words, report), report
    assert run(program, name, "fixed", **settings) == (0, "ok\n")


@pytest.mark.parametrize("tool", [PLAIN, ADDRESS, THREAD, MEMORY], ids=["plain", "address", "thread", "memory"])
@pytest.mark.parametrize("order", ["forward", "reverse", "random"])
def test_no_tool_finds_anything_in_correct_kernels(program, tool, order):
    settings = {"SIMT_SCHEDULE": order, "SIMT_GUARD": "1" if order == "forward" else "0"}
    assert run(program(tool), "correct_kernels", **settings) == (0, "ok\n")


def test_a_report_names_the_kernel_the_block_and_every_thread(program):
    _, report = run(program(PLAIN), "shuffle_after_exit")
    first, *places = report.splitlines()
    assert first.startswith("simt: shuffle_after_exit<FIXED>, block (0, 0, 0): ")
    assert re.fullmatch(r"  threads 0 to 23 wait at __shfl_xor_sync, mask ffffffff, bugs\.cu:\d+", places[0])
    assert places[1:] == ["  threads 24 to 24 have exited", "  threads 25 to 63 can go on"]
    _, report = run(program(PLAIN), "race_between_blocks", SIMT_SCHEDULE="backward")
    assert 'SIMT_SCHEDULE is "backward"; allowed: forward, reverse, random' in report


# ---------------------------------------------------------------------------------------------------------------------
# The build


@pytest.mark.parametrize("name", ["kernels", "bugs"])
def test_nvcc_compiles_the_same_sources(tmp_path, name):
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin:{os.environ['PATH']}")
    if not nvcc:
        pytest.skip("nvcc: not on the path, nor under CUDA_HOME")
    command = [nvcc, "-std=c++17", "-arch=sm_80", "-I", HERE.parents[1] / "cuda", "-c", HERE / f"{name}.cu"]
    done = subprocess.run([*command, "-o", tmp_path / "nvcc.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


LOADER = """
import ctypes, sys
library, pointer = ctypes.CDLL(sys.argv[1]), ctypes.c_void_p()
library.cudaMalloc(ctypes.byref(pointer), int(sys.argv[2]))
print(library.run_add(pointer, None), library.cudaDeviceSynchronize())
"""


@pytest.mark.parametrize("tool", [ADDRESS, THREAD], ids=["address", "thread"])
def test_python_loads_a_shared_object_with_a_sanitizer(built, tool):
    loader = (sys.executable, "-c", LOADER, built(*tool, "kernels", shared=True))
    settings = {"LD_PRELOAD": preload(tool[1]), "ASAN_OPTIONS": "detect_leaks=0"}
    assert run(*loader, "128", **settings) == (0, "0 0\n")
    if tool == ADDRESS:
        status, report = run(*loader, "124", **settings)
        assert status != 0 and re.search("heap-buffer-overflow .* add<2, 3>", report)


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(Missing, match="no-such-compiler"):
        build([HERE / "kernels.cu"], "no-such-compiler")
    with pytest.raises(Missing, match=r"MemorySanitizer needs clang\+\+"):
        build([HERE / "kernels.cu"], "g++", "memory")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    with pytest.raises(Missing, match="cuda_runtime_api.h: neither in /nowhere/include"):
        build([HERE / "kernels.cu"])
