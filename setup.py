"""Builds skipkv._skipkv from csrc/. One binary holds every CPU variant; which one runs is decided at run time.

SKIPKV_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import os
import platform
from pathlib import Path

import numpy
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

VARIANTS = {
    "kernels_avx2.c": ["-mavx2", "-mfma"],
    "kernels_avx512.c": ["-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"],
}
X86 = platform.machine() in ("x86_64", "AMD64")
SANITIZE = os.environ.get("SKIPKV_SANITIZE") == "1"
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g"]
FLAGS = [
    "-std=c17",
    "-O3",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fvisibility=hidden",
    "-fopenmp",
    "-Wall",
    "-Wextra",
]


class Build(build_ext):
    """Gives the files of a CPU variant their own instruction-set flags."""

    def build_extension(self, extension: Extension) -> None:
        compile_one = self.compiler._compile

        def compile_with_flags(obj, source, ext, cc_args, extra, pp_opts):
            compile_one(obj, source, ext, cc_args, extra + VARIANTS.get(Path(source).name, []), pp_opts)

        self.compiler._compile = compile_with_flags
        try:
            super().build_extension(extension)
        finally:
            self.compiler._compile = compile_one


if __name__ == "__main__":
    sources = sorted(str(p) for p in Path("csrc").rglob("*.c") if X86 or p.name not in VARIANTS)
    setup(
        ext_modules=[
            Extension(
                "skipkv._skipkv",
                sources,
                include_dirs=[numpy.get_include()],
                depends=sorted(str(p) for p in Path("csrc").rglob("*.h")),
                extra_compile_args=FLAGS + (SANITIZERS if SANITIZE else []),
                extra_link_args=["-fopenmp"] + (SANITIZERS if SANITIZE else []),
            )
        ],
        cmdclass={"build_ext": Build},
    )
