"""Compile csrc/ with every warning an error, then run check_kernels.c under sanitizers.

With --emulate: compile once, kernels_avxvnni.c and kernels_avx512.c for AVX2 with their intrinsics emulated
in C, then run check_kernels.c on those too, without sanitizers.

With --threads: compile with the thread sanitizer, and run all checks of the pool and few of the kernels.

With --qemu: compile for x86-64 and for aarch64 as setup.py does, and run check_kernels.c, one check in SHARE,
on the processors of QEMU: no illegal instruction, the right rung of the ladder, equality with scalar, and one
digest of results everywhere; on the best processor of the machine that is not this one, under sanitizers.

Needs a C compiler (`cc`, or what CC names) and nothing else: no package, no extension. --qemu needs qemu-user
and a compiler for the other machine (Debian: qemu-user, gcc-aarch64-linux-gnu, libc6-dev-arm64-cross). The
flags are those of setup.py, read from its text.
"""

from __future__ import annotations

import argparse
import ast
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests/c"
CHECKER = TESTS / "check_kernels.c"
STRICT = ["-Wall", "-Wextra", "-Werror"]
SANITIZED = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
RACES = ["-O1", "-g", "-fsanitize=thread"]
EMULATED = ["-O1"]
EMULATED_ISAS = ("avxvnni", "avx512")
EMULATION = ["-fno-inline", "-include"]  # inlining would treble the minute that it takes to compile
ARCHITECTURE = {"x86_64": "x86", "aarch64": "arm", "arm64": "arm"}  # folder of csrc
QEMU = {  # by machine: processors, and the best instruction set that each must find
    "x86_64": {"Nehalem": "scalar", "Haswell": "avx2", "max": "avx2"},
    "aarch64": {"cortex-a72": "neon", "neoverse-n1": "dotprod", "max": "dotprod"},
}
SHARE = "7"  # prime to the numbers of kinds, widths, queries and masks, so that all of them come up


def literal(name: str) -> object:
    """The value that setup.py assigns to `name`."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


def sources_of(machine: str) -> list[Path]:
    folders = (".", "scalar", ARCHITECTURE.get(machine, "none"))
    return [path for folder in folders for path in sorted((ROOT / "csrc" / folder).glob("*.c"))]


def compiler_of(machine: str) -> str:
    native = machine == platform.machine()
    return os.environ.get("CC", "cc") if native else f"{machine}-linux-gnu-gcc"


def compile_all(
    sources: list[Path], folder: Path, machine: str, extra: list[str], emulate: bool = False
) -> list[Path]:
    """Object files in `folder`, each compiled with the flags that setup.py gives it, and `extra`."""
    (base, _), isa_flags = literal("BASE_FLAGS"), literal("ISA_FLAGS")

    def compile_one(source: Path) -> Path:
        name = source.stem.rpartition("_")[2]
        isa, _ = isa_flags.get(name, ([], []))
        if emulate and name in EMULATED_ISAS:
            isa = [*isa_flags["avx2"][0], *EMULATION, TESTS / f"emulate_{name}.h"]
        target = folder / f"{source.stem}.o"
        command = [compiler_of(machine), *base, *isa, *STRICT, *extra, "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        return list(executor.map(compile_one, sources))


def link(objects: list[Path], program: Path, machine: str, extra: list[str]) -> Path:
    command = [compiler_of(machine), *extra, *objects, "-pthread", "-lm", "-o", program]
    subprocess.run(command, check=True)
    return program


def check_here(folder: Path, extra: list[str], emulate: bool = False, share: str = "1") -> int:
    machine = platform.machine()
    sources = sources_of(machine)
    if emulate:
        sources = [TESTS / "emulated_cpu.c" if path.name == "cpu.c" else path for path in sources]
    else:
        compile_all(sources, folder, machine, [])
        print(f"{len(sources)} files of csrc compile without a warning", flush=True)
    objects = compile_all([*sources, CHECKER], folder, machine, extra, emulate)
    return subprocess.run([link(objects, folder / "check_kernels", machine, extra), share]).returncode


def check_in_qemu(folder: Path) -> int:
    def build(machine: str, name: str, extra: list[str], linked: list[str]) -> Path:
        (folder / name).mkdir()
        objects = compile_all([*sources_of(machine), CHECKER], folder / name, machine, extra)
        return link(objects, folder / name / "check_kernels", machine, linked)

    programs: dict[tuple[str, str], Path] = {}
    for machine, processors in QEMU.items():
        plain = build(machine, machine, [], ["-static"])
        programs |= {(machine, processor): plain for processor in processors}
        if machine != platform.machine():  # which has had sanitizers without QEMU
            linked = [*SANITIZED, "-static-libasan", "-static-libubsan"]
            programs[machine, "max"] = build(machine, f"{machine}-sanitized", SANITIZED, linked)
    print(f"compiled for {' and '.join(QEMU)} without a warning", flush=True)

    def run(machine: str, processor: str) -> tuple[bool, set[str]]:
        started = time.monotonic()
        emulator = [f"qemu-{machine}", "-L", f"/usr/{machine}-linux-gnu", "-cpu", processor]
        result = subprocess.run(
            [*emulator, programs[machine, processor], SHARE],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0"},  # QEMU cannot stop threads to look for them
        )
        digests = dict(re.findall(r"^(\w+) +digest (\w+)$", result.stdout, re.MULTILINE))
        best = list(digests)[-1] if digests else "nothing"
        ok = result.returncode == 0 and best == QEMU[machine][processor]
        last = result.stdout.splitlines()[-1:]
        seconds = time.monotonic() - started
        print(f"{machine} {processor}: up to {best}: {'; '.join(last)} ({seconds:.0f} s)", flush=True)
        if not ok:
            print(f"exit status {result.returncode}, not up to {QEMU[machine][processor]}\n{result.stdout}")
        return ok, set(digests.values())

    runs = [(machine, processor) for machine in QEMU for processor in QEMU[machine]]
    with ThreadPoolExecutor(os.cpu_count()) as executor:
        results = list(executor.map(lambda item: run(*item), runs))
    digests = set().union(*(found for _, found in results))
    print(f"digests of all results: {' '.join(sorted(digests))}")
    return 0 if len(digests) == 1 and all(ok for ok, _ in results) else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Check csrc without Python.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--emulate", action="store_true", help="on a processor with AVX2 only")
    how.add_argument("--qemu", action="store_true", help="on emulated processors of x86-64 and aarch64")
    how.add_argument("--threads", action="store_true", help="under the thread sanitizer")
    args = parser.parse_args()
    if args.emulate and ARCHITECTURE.get(platform.machine()) != "x86":
        parser.error("--emulate needs an x86 processor with AVX2")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.qemu:
            return check_in_qemu(folder)
        if args.threads:
            return check_here(folder, RACES, share="1001")
        return check_here(folder, EMULATED if args.emulate else SANITIZED, args.emulate)


if __name__ == "__main__":
    sys.exit(main())
