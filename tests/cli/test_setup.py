"""setup.py: when the CUDA backend is built, what of it is built again, and what is said where it cannot be."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

setuptools = pytest.importorskip("setuptools")
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the sources beside the tests")
NVCC = """#!/bin/sh
[ "$1" = --version ] && echo "Cuda compilation tools, release 99.1, V99.1.0" && exit
echo "$@" >> "$LOG"
[ -z "$BROKEN" ] || exit 1
while [ "$1" != -o ]; do shift; done
touch "$2"
"""


@pytest.fixture
def setup(monkeypatch):
    spec = importlib.util.spec_from_file_location("skipkv_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ("SKIPKV_CUDA", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)  # wheels of nvidia's are not here
    return module


@pytest.fixture
def toolkit(tmp_path, monkeypatch):
    """A CUDA_HOME whose nvcc writes its arguments to a log, and makes empty files; its headers are still to come."""
    home = tmp_path / "toolkit"
    (home / "bin").mkdir(parents=True)
    (home / "include").mkdir()
    (home / "bin/nvcc").write_text(NVCC)
    (home / "bin/nvcc").chmod(0o755)
    monkeypatch.setenv("LOG", str(tmp_path / "log"))
    return home


def header(folder, version=99):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cublas_api.h").write_text(f"#define CUBLAS_VER_MAJOR {version}\n")


def refused(setup, message):
    with pytest.raises(setup.Missing) as error:
        setup.find_cuda()
    assert str(error.value).startswith(message)


def test_nvcc_is_looked_for_in_cuda_home_and_in_the_path(setup, toolkit, monkeypatch, tmp_path):
    header(toolkit / "include")
    found = str(toolkit / "bin/nvcc"), "99", str(toolkit / "include")
    monkeypatch.setenv("PATH", str(tmp_path))
    refused(setup, "there is no nvcc, neither in CUDA_HOME/bin nor in PATH")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert setup.find_cuda() == found
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", f"{toolkit / 'bin'}:/bin:/usr/bin")
    assert setup.find_cuda() == found
    monkeypatch.setenv("SKIPKV_CUDA", "0")
    refused(setup, "SKIPKV_CUDA is 0")


def test_headers_of_cublas_are_those_of_nvccs_version(setup, toolkit, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    for version in (None, 9, 999):
        if version:
            header(toolkit / "include", version)
        refused(setup, "there are no headers of cuBLAS 99, neither in CUDA_HOME/include nor in a wheel nvidia-cublas")
    header(tmp_path / "nvidia/cu98/include", 98)
    header(tmp_path / "nvidia/cu99/include")
    wheel = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: wheel)
    assert setup.find_cuda()[2] == str(tmp_path / "nvidia/cu99/include")


def build(setup, folder):
    command = setup.Build(setuptools.Distribution({"name": "skipkv", "ext_modules": []}))
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    command.run()
    log = Path(os.environ["LOG"])
    commands = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return commands


def test_what_has_changed_is_compiled_for_every_architecture(setup, toolkit, monkeypatch, tmp_path):
    header(toolkit / "include")
    monkeypatch.setenv("CUDA_HOME", str(toolkit))
    for name in ("csrc", "cuda"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    *compiled, linked = build(setup, tmp_path)
    sources = sorted(str(path) for path in Path("cuda").glob("*.cu"))
    assert sorted(re.search(r" -c (\S+) ", line)[1] for line in compiled) == sources
    for architecture in ("code=sm_80", "code=[sm_90,compute_90]"):
        assert all(architecture in line for line in compiled)
    out = tmp_path / "lib/skipkv/_skipkv_cuda99.so"
    assert linked.endswith(f" -o {out}") and out.exists() and "cublas" not in linked
    assert build(setup, tmp_path) == []
    for changed, n in ((sources[1], 1), ("cuda/cuda.cuh", len(sources)), ("csrc/backend.h", len(sources)),
                       ("csrc/heap.c", 0)):  # fmt: skip
        past = out.stat().st_mtime + 5
        os.utime(changed, (past, past))
        assert len(build(setup, tmp_path)) == n + 1, changed
        for path in tmp_path.rglob("*.*o"):
            os.utime(path, (past + 5, past + 5))
    monkeypatch.setenv("BROKEN", "1")
    out.unlink()
    with pytest.raises(setup.CompileError, match="; SKIPKV_CUDA=0 builds without CUDA$"):
        build(setup, tmp_path)


@pytest.mark.parametrize("value, message", [
    ("1", "SKIPKV_CUDA is 1, but there is no nvcc, neither in CUDA_HOME/bin nor in PATH"),
    ("yes", "SKIPKV_CUDA is 'yes'; allowed: 0, 1, auto"),
])  # fmt: skip
def test_what_cannot_be_built_is_one_line(value, message):
    environment = {"SKIPKV_CUDA": value, "PATH": "/nowhere"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().splitlines()[-1] == f"error: {message}"
