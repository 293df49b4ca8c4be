"""Build phi3c's one extension; everything declarative lives in pyproject.toml."""

import os
import platform
import re
import shutil
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import PlatformError

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
# One order of summation: no contraction into FMAs that the source does not name, no reassociation. MSVC's
# whole-program optimisation, which setuptools asks for, might carry instructions from file to file. Python
# may pass on its own -fwrapv, with which loops over int are not vectorised: no sum of ours wraps.
BASE_FLAGS = (
    [
        "-O3",
        "-g0",
        "-std=c11",
        "-D_GNU_SOURCE",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fstrict-overflow",
        "-fno-wrapv",
        "-fvisibility=hidden",
        "-pthread",
    ],
    ["/O2", "/GL-", "/std:c11", "/fp:precise", "/D_CRT_SECURE_NO_WARNINGS"],
)
CLANG_CL = "clang-cl"
CLANG_CL_FLAGS = ["/O2", "/std:c11", "/clang:-ffp-contract=off", "/clang:-fno-math-errno"]
COMPILERS = {  # by sys.platform: what to do where there is none
    "darwin": "run xcode-select --install",
    "win32": "install the Visual Studio 2022 Build Tools with the workload 'Desktop development with C++'",
    "linux": "install a compiler (Debian and Ubuntu: apt install gcc python3-dev; Fedora: dnf install gcc "
    "python3-devel; Alpine: apk add gcc musl-dev python3-dev)",
}


def target_machine() -> str:
    """The machine that is built for: what a cross compilation names, or the interpreter's."""
    if sys.platform == "win32" and "VSCMD_ARG_TGT_ARCH" in os.environ:
        return os.environ["VSCMD_ARG_TGT_ARCH"]
    if sys.platform == "darwin" and (named := re.findall(r"-arch\s+(\S+)", os.environ.get("ARCHFLAGS", ""))):
        if len(set(named)) > 1:
            sys.exit(f"phi3c is built for one architecture at a time, but ARCHFLAGS names {', '.join(named)}")
        return named[0]
    machine = sysconfig.get_platform().rpartition("-")[2]  # _PYTHON_HOST_PLATFORM, where it is set
    return platform.machine() if machine.startswith(("universal", "mingw")) else machine


MACHINE = target_machine().lower()
ARCH = {"x86_64": "x86", "amd64": "x86", "x64": "x86", "aarch64": "arm", "arm64": "arm"}.get(MACHINE, "none")
# An interpreter for two architectures would have everything compiled for both.
ARCH_FLAGS = ["-arch", MACHINE] if sys.platform == "darwin" else []
if sys.platform == "darwin":
    one = sysconfig.get_platform().replace("universal2", MACHINE)
    os.environ.setdefault("_PYTHON_HOST_PLATFORM", one)  # the wheel's name says which
# The limited API and free-threaded interpreters exclude each other.
STABLE_ABI = not sysconfig.get_config_var("Py_GIL_DISABLED")


class Build(build):
    """build that begins with the extension: where it cannot be compiled, that is all there is to read."""

    sub_commands = sorted(build.sub_commands, key=lambda command: command[0] != "build_ext")


class BuildExt(build_ext):
    """build_ext that compiles each source with the flags its name asks for."""

    def build_extensions(self) -> None:
        self._find_compiler()
        msvc = self.compiler.compiler_type == "msvc"
        clang_cl = msvc and self.compiler.cc == CLANG_CL
        compile_all = self.compiler.compile

        def flags(source: str) -> list[str]:
            gnu, microsoft = ISA_FLAGS.get(Path(source).stem.rpartition("_")[2], ([], []))
            if clang_cl:
                return CLANG_CL_FLAGS + [f"/clang:{flag}" for flag in gnu]
            return BASE_FLAGS[1] + microsoft if msvc else BASE_FLAGS[0] + ARCH_FLAGS + gnu

        def compile_each(sources, *, extra_postargs, **kwargs):
            def compile_one(source):
                return compile_all([source], extra_postargs=extra_postargs + flags(source), **kwargs)

            with ThreadPoolExecutor(os.cpu_count()) as pool:  # SIMD files take 10-20 s each
                return [name for names in pool.map(compile_one, sources) for name in names]

        self.compiler.compile = compile_each
        super().build_extensions()

    def _find_compiler(self) -> None:
        """Fail with one line where there is none; CC=clang-cl replaces MSVC's."""
        advice = COMPILERS.get(sys.platform, "install a C compiler")
        if self.compiler.compiler_type != "msvc":
            name = self.compiler.compiler_so[0]
            if shutil.which(name) is None:
                raise PlatformError(f"phi3c is compiled from C, and there is no {name}: {advice}, or set CC")
            if sys.platform == "win32" and "clang" not in name:
                raise PlatformError(
                    "gcc on Windows does not align the stack for AVX (bug 54412): take clang or MSVC"
                )
            return
        try:
            if not self.compiler.initialized:
                self.compiler.initialize(self.plat_name)
        except PlatformError:
            raise PlatformError(f"phi3c is compiled from C: {advice}") from None
        if os.environ.get("CC") == CLANG_CL:
            self.compiler.cc = CLANG_CL
        elif ARCH == "arm":
            raise PlatformError(f"phi3c's kernels for ARM are written for clang: set CC={CLANG_CL}")


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
    extra_link_args=[] if sys.platform == "win32" else ["-pthread", *ARCH_FLAGS],
)

setup(
    ext_modules=cythonize([extension], build_dir="build"),
    cmdclass={"build": Build, "build_ext": BuildExt},
    options={"bdist_wheel": {"py_limited_api": "cp311"}} if STABLE_ABI else {},
)
