"""Compile csrc/ with every warning an error, then run check_kernels.c under sanitizers.

With --emulate-avx512: compile once, kernels_avx512.c for AVX2 with its intrinsics emulated in C, then run
check_kernels.c on that too, without sanitizers.

Needs a C compiler (`cc`, or what CC names) and nothing else: no package, no extension. The flags are those of
setup.py, read from its text.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/c"
CHECKER = TESTS / "check_kernels.c"
STRICT = ["-Wall", "-Wextra", "-Werror"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EMULATED = ["-O1"]
# Inlining the emulation would treble the minute that it takes to compile.
EMULATION = ["-fno-inline", "-include", TESTS / "emulate_avx512.h"]


def literal(name: str) -> object:
    """The value that setup.py assigns to `name`."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def main() -> int:
    parser = argparse.ArgumentParser(description="Check csrc without Python.")
    parser.add_argument("--emulate-avx512", action="store_true", help="on a processor with AVX2 only")
    emulate = parser.parse_args().emulate_avx512
    compiler = os.environ.get("CC", "cc")
    (base, _), isa_flags = literal("BASE_FLAGS"), literal("ISA_FLAGS")
    architecture = {"x86_64": "x86", "aarch64": "arm", "arm64": "arm"}.get(platform.machine(), "none")
    if emulate and architecture != "x86":
        parser.error("--emulate-avx512 needs an x86 processor with AVX2")
    sources = [
        path for folder in (".", "scalar", architecture) for path in (ROOT / "csrc" / folder).glob("*.c")
    ]

    def compile_one(source: Path, extra: list[str], folder: Path) -> Path:
        isa, _ = isa_flags.get(source.stem.rpartition("_")[2], ([], []))
        if emulate and source.stem == "kernels_avx512":
            isa = [*isa_flags["avx2"][0], *EMULATION]
        target = folder / f"{source.stem}.o"
        subprocess.run([compiler, *base, *isa, *STRICT, *extra, "-c", source, "-o", target], check=True)
        return target

    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(os.cpu_count()) as executor:
        folder = Path(name)
        if emulate:
            sources = [TESTS / "emulated_cpu.c" if path.name == "cpu.c" else path for path in sources]
        else:
            list(executor.map(lambda source: compile_one(source, [], folder), sources))
            print(f"{len(sources)} files of csrc compile without a warning", flush=True)
        checked = EMULATED if emulate else SANITIZED
        objects = list(executor.map(lambda source: compile_one(source, checked, folder), [*sources, CHECKER]))
        program = folder / "check_kernels"
        subprocess.run([compiler, *checked, *objects, "-pthread", "-lm", "-o", program], check=True)
        return subprocess.run([program]).returncode


if __name__ == "__main__":
    sys.exit(main())
