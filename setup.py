"""Builds skipkv._skipkv from csrc/, and from cuda/ the CUDA backend, a shared object beside it that only needs a driver
and cuBLAS when it is used. One binary holds every CPU variant; which one runs is decided at run time.

SKIPKV_CUDA=0 builds no CUDA backend, 1 fails where something for it is missing; else it is built where nvcc is.
SKIPKV_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
SKIPKV_TEST=1 builds an allocator that a test can make fail, and what tests/ops calls.
"""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy
import setuptools
from setuptools import Distribution, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

VARIANTS = {
    "kernels_avx2.c": ["-mavx2", "-mfma"],
    "kernels_avx512.c": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
VARIANTS["kernels_avx512vnni.c"] = [*VARIANTS["kernels_avx512.c"], "-mavx512vnni"]
VARIANTS["kernels_avx512bf16.c"] = [*VARIANTS["kernels_avx512vnni.c"], "-mavx512bf16"]
X86 = platform.machine() in ("x86_64", "AMD64")
SANITIZE, TEST = (os.environ.get(f"SKIPKV_{name}") == "1" for name in ("SANITIZE", "TEST"))
# -O1: with what sanitizers add, the kernels take minutes to optimise further
SANITIZERS = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
FLAGS = [
    "-std=c17",
    "-O3",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-pthread",
    "-Wall",
    "-Wextra",
]

CUDA = "_skipkv_cuda"  # followed by the major version of the cuBLAS that it needs
CUDA_FLAGS = [
    "-std=c++17",
    "-O3",
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90,code=[sm_90,compute_90]",  # the latter for all that is newer
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-strict-aliasing,-Wall,-Wextra",
]
CORE = ["csrc/error.c", "csrc/heap.c", "csrc/dtypes.c"]  # what the CUDA backend has of the core


def is_older(made: str, sources: list[str]) -> bool:
    """Whether what was made is missing, or older than one of its sources."""
    return not os.path.exists(made) or any(os.path.getmtime(s) > os.path.getmtime(made) for s in sources)


class Missing(Exception):
    """What the CUDA backend cannot be built without."""


def find_cuda() -> tuple[str, str, str]:
    """(nvcc, its major version, folder of cuBLAS's headers)."""
    if os.environ.get("SKIPKV_CUDA") == "0":
        raise Missing("SKIPKV_CUDA is 0")
    home = os.environ.get("CUDA_HOME")
    nvcc = home and shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if not nvcc:
        raise Missing("there is no nvcc, neither in CUDA_HOME/bin nor in PATH")
    said = re.search(r"release (\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout)
    if not said:
        raise Missing(f"{nvcc} --version names no release")
    folders = [Path(home or Path(nvcc).resolve().parents[1], "include")]
    wheels = importlib.util.find_spec("nvidia")
    for place in wheels.submodule_search_locations if wheels else []:
        folders += Path(place).glob("*/include")
    for folder in folders:
        header = folder / "cublas_api.h"
        if header.exists() and f"define CUBLAS_VER_MAJOR {said[1]}\n" in header.read_text(encoding="utf-8"):
            return nvcc, said[1], str(folder)
    raise Missing(
        f"there are no headers of cuBLAS {said[1]}, neither in CUDA_HOME/include nor in a wheel nvidia-cublas that this"
        " build sees (pip's own build environments see none: pip install --no-build-isolation --no-deps -e .)"
    )


class Project(Distribution):
    """What pyproject.toml says; where setuptools is too old to read it, the extensions can be built all the same."""

    def parse_config_files(self, *args, **kwargs) -> None:
        if int(setuptools.__version__.partition(".")[0]) >= 77:
            super().parse_config_files(*args, **kwargs)


class Build(build_ext):
    """Gives the files of a CPU variant their own instruction-set flags, and those of the CUDA backend to nvcc."""

    def finalize_options(self) -> None:
        extensions, self.missing = self.distribution.ext_modules, None
        try:
            self.nvcc, major, folder = find_cuda()
            if not any(CUDA in extension.name for extension in extensions):
                sources = sorted(str(p) for p in Path("cuda").glob("*.cu"))
                headers = sorted(str(p) for pattern in ("cuda/*.cuh", "csrc/*.h") for p in Path().glob(pattern))
                extensions.append(Extension(f"skipkv.{CUDA}{major}", sources, include_dirs=[folder], depends=headers))
        except Missing as missing:
            self.missing = missing
        super().finalize_options()

    def run(self) -> None:
        wanted = os.environ.get("SKIPKV_CUDA", "auto")
        if wanted not in ("0", "1", "auto"):
            raise SetupError(f"SKIPKV_CUDA is {wanted!r}; allowed: 0, 1, auto")
        if self.missing and wanted == "1":
            raise SetupError(f"SKIPKV_CUDA is 1, but {self.missing}")
        if self.missing and wanted == "auto":
            self.warn(f"no CUDA backend: {self.missing}")
        super().run()

    def get_ext_filename(self, name: str) -> str:
        if CUDA in name:  # no module of Python's
            return os.path.join(*name.split(".")) + ".so"
        return super().get_ext_filename(name)

    def build_cuda(self, extension: Extension) -> None:
        """Compiles what has changed, file by file in parallel, and links it with the runtime, but not with cuBLAS."""
        out, folder = self.get_ext_fullpath(extension.name), Path(self.build_temp, "cuda")
        if not self.force and not is_older(out, [*extension.sources, *extension.depends, *CORE]):
            return
        folder.mkdir(parents=True, exist_ok=True)
        objects = [str(folder / f"{Path(source).stem}.o") for source in extension.sources]
        include = [f"-I{place}" for place in extension.include_dirs]
        commands = [
            [self.nvcc, *CUDA_FLAGS, *include, "-c", source, "-o", made]
            for source, made in zip(extension.sources, objects, strict=True)
            if self.force or is_older(made, [source, *extension.depends])
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(self.run_nvcc, commands))
        objects += self.compiler.compile(CORE, output_dir=str(folder), extra_postargs=FLAGS)
        os.makedirs(os.path.dirname(out), exist_ok=True)
        link = ["-shared", "-cudart=static", "-Xlinker=-Bsymbolic,--exclude-libs=ALL"]
        self.run_nvcc([self.nvcc, *link, *objects, "-o", out])

    @staticmethod
    def run_nvcc(command: list[str]) -> None:
        if subprocess.run(command).returncode:
            raise CompileError(f"{' '.join(command)} failed; SKIPKV_CUDA=0 builds without CUDA")

    def build_extension(self, extension: Extension) -> None:
        if CUDA in extension.name:
            self.build_cuda(extension)
            return
        compiler = self.compiler
        compile_one, compile_all = compiler._compile, compiler.compile

        def compile_with_flags(obj, source, ext, cc_args, extra, pp_opts):
            compile_one(obj, source, ext, cc_args, extra + VARIANTS.get(Path(source).name, []), pp_opts)

        def compile_in_parallel(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [made for [made] in pool.map(lambda source: compile_all([source], **options), sources)]

        compiler._compile, compiler.compile = compile_with_flags, compile_in_parallel
        try:
            super().build_extension(extension)
        finally:
            compiler._compile, compiler.compile = compile_one, compile_all


if __name__ == "__main__":
    sources = sorted(str(p) for p in Path("csrc").rglob("*.c") if X86 or p.name not in VARIANTS)
    sources += ["tests/ops/ops.c"] if TEST else []
    setup(
        ext_modules=[
            Extension(
                "skipkv._skipkv",
                sources,
                include_dirs=[numpy.get_include()] + ["csrc"] * TEST,
                depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
                define_macros=[("SKIPKV_TEST", None)] if TEST else [],
                extra_compile_args=FLAGS + (SANITIZERS if SANITIZE else []),
                extra_link_args=["-pthread"] + (SANITIZERS if SANITIZE else []),
            )
        ],
        cmdclass={"build_ext": Build},
        distclass=Project,
    )
