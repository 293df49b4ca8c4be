"""Build phi3c's one extension; everything declarative lives in pyproject.toml."""

import os
import platform
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ISA_FLAGS = {  # file-name suffix -> (gcc/clang flags, MSVC flags)
    "avx2": (["-mavx2", "-mfma", "-mf16c", "-mbmi2"], ["/arch:AVX2"]),
    "avxvnni": (["-mavx2", "-mavxvnni", "-mfma", "-mf16c", "-mbmi2"], ["/arch:AVX2"]),
    "avx512": (
        ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma", "-mf16c", "-mbmi2"],
        ["/arch:AVX512"],
    ),
    "neon": (["-march=armv8-a"], []),
    "dotprod": (["-march=armv8.2-a+dotprod"], []),
}
# One order of summation: no contraction into FMAs that the source does not name, no reassociation.
BASE_FLAGS = (
    [
        "-O3",
        "-g0",
        "-std=c11",
        "-D_GNU_SOURCE",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-pthread",
    ],
    ["/O2", "/std:c11", "/experimental:c11atomics", "/fp:precise"],
)
# The machine that is built for: this one, or what a cross compilation names.
MACHINE = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).rpartition("-")[2].lower()
ARCH = {"x86_64": "x86", "amd64": "x86", "aarch64": "arm", "arm64": "arm"}.get(MACHINE, "none")
# The limited API and free-threaded interpreters exclude each other.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")


class BuildExt(build_ext):
    """build_ext that compiles each source with the flags its name asks for."""

    def build_extensions(self) -> None:
        msvc = self.compiler.compiler_type == "msvc"
        compile_all = self.compiler.compile

        def compile_each(sources, *, extra_postargs, **kwargs):
            def compile_one(source):
                isa = ISA_FLAGS.get(Path(source).stem.rpartition("_")[2], ([], []))[msvc]
                return compile_all([source], extra_postargs=extra_postargs + BASE_FLAGS[msvc] + isa, **kwargs)

            with ThreadPoolExecutor(os.cpu_count()) as pool:  # SIMD files take 10-20 s each
                return [name for names in pool.map(compile_one, sources) for name in names]

        self.compiler.compile = compile_each
        super().build_extensions()


extension = Extension(
    "phi3c._kernels",
    [
        "src/phi3c/_kernels.pyx",
        *sorted(glob("csrc/*.c") + glob("csrc/scalar/*.c") + glob(f"csrc/{ARCH}/*.c")),
    ],
    include_dirs=["csrc"],
    depends=glob("csrc/**/*.h", recursive=True),
    define_macros=[("Py_LIMITED_API", "0x030B0000")] if STABLE_ABI else [],
    py_limited_api=STABLE_ABI,
    extra_link_args=[] if platform.system() == "Windows" else ["-pthread"],
)

setup(
    ext_modules=cythonize([extension], build_dir="build"),
    cmdclass={"build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
