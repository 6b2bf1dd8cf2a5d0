"""What a failed opening leaves behind, and files that no memory holds. What fuzzing finds is in tests/fuzz."""

import os
from pathlib import Path

import pytest
from checkpoints import safetensors, write
from harness import refused

from skipkv import CapacityError, CheckpointError
from skipkv.load.checkpoint import open_checkpoint
from skipkv.load.texts import read_prompts
from skipkv.steering import load_vectors

pytestmark = pytest.mark.sanitize


def test_a_failed_opening_closes_its_files(tmp_path):
    write(tmp_path, shards=3)
    (tmp_path / "model-00003-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError) as error:  # the exception's traceback keeps the half-made object alive
        open_checkpoint(tmp_path)
    if Path("/proc/self/fd").exists():
        assert not [file for file in Path("/proc/self/fd").iterdir() if str(tmp_path) in str(file.resolve())], error


def long_lines(path, n):
    path.write_bytes(b"")
    os.truncate(path, n)  # sparse


def long_vector(path, n):
    path.write_bytes(safetensors({"layer.0": {"dtype": "F32", "shape": [n // 4], "data_offsets": [0, n]}}))
    os.truncate(path, path.stat().st_size + n)


@pytest.mark.skipif(bool(os.environ.get("LD_PRELOAD")), reason="a sanitizer takes more address space than any limit")
@pytest.mark.parametrize("make, opened", [
    (long_lines, lambda path: list(read_prompts(path))), (long_vector, load_vectors),
])  # fmt: skip
def test_what_no_memory_holds_is_named(tmp_path, make, opened):
    resource, path = pytest.importorskip("resource"), tmp_path / "a"
    make(path, 1 << 29)
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 28), before[1]))
    try:
        with refused(f"{path}: expected a file that fits into memory, found more", CapacityError):
            opened(path)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
