"""Compile csrc/ and check_kernels.c for other systems with every warning an error, and run what runs here.

    python tests/c/check_targets.py [TARGET...]      all targets when none is named

`zig cc` is clang with the headers and C libraries of other systems, so the flags are setup.py's for gcc and
clang. What is for x86-64 Linux runs here, for Windows in Wine, for aarch64 Linux in QEMU, one check in SHARE
each, and digests of results must be the same everywhere. For macOS, and for Windows on ARM, compiling and
linking is all that can be had.

Needs the package ziglang; for running, Debian's wine64 and qemu-user. What is not there is left out aloud.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from check import CHECKER, SHARE, STRICT, literal, sources_of

ZIG = [sys.executable, "-m", "ziglang", "cc"]
CPUS = {  # zig's names for processors
    "-march=armv8-a": "-mcpu=generic",
    "-march=armv8.2-a+dotprod": "-mcpu=generic+v8_2a+dotprod",
}
RUNNERS = {  # by target: a program that runs such programs on x86-64 Linux; "" for none
    "x86_64-linux-musl": "",
    "aarch64-linux-musl": "qemu-aarch64",
    "x86_64-windows-gnu": "wine64",
    "aarch64-windows-gnu": None,
    "x86_64-macos": None,
    "aarch64-macos": None,
}


def build(target: str, folder: Path) -> Path:
    """The checker as a program of `target`."""
    (base, _), isa_flags = literal("BASE_FLAGS"), literal("ISA_FLAGS")

    def compile_one(source: Path) -> Path:
        isa, _ = isa_flags.get(source.stem.rpartition("_")[2], ([], []))
        compiled = folder / f"{source.stem}.o"
        command = [*ZIG, "-target", target, *base, *(CPUS.get(flag, flag) for flag in isa), *STRICT]
        subprocess.run([*command, "-c", source, "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(os.cpu_count()) as executor:
        objects = list(executor.map(compile_one, [*sources_of(target.partition("-")[0]), CHECKER]))
    program = folder / "check_kernels.exe"
    subprocess.run([*ZIG, "-target", target, *objects, "-o", program], check=True)
    return program


def runner_of(target: str) -> list[str] | None:
    """What comes before a program of `target` to run it here; None where it cannot run."""
    name = RUNNERS[target]
    if name is None or platform.system() != "Linux" or platform.machine() != "x86_64":
        return None
    if not name:
        return []
    path = shutil.which(name) or shutil.which(name, path="/usr/lib/wine")  # Debian has wine64 in no PATH
    return [path] if path else None


def run(runner: list[str], program: Path, wine: Path) -> tuple[bool, set[str]]:
    environment = {**os.environ, "WINEPREFIX": str(wine), "WINEDEBUG": "-all", "DISPLAY": ""}
    result = subprocess.run([*runner, program, SHARE], capture_output=True, text=True, env=environment)
    digests = dict(re.findall(r"^(\w+) +digest (\w+)$", result.stdout, re.MULTILINE))
    last = "; ".join(result.stdout.splitlines()[-1:])
    print(f"  {' '.join(runner) or 'here'}: up to {(list(digests) or ['nothing'])[-1]}: {last}", flush=True)
    if result.returncode:
        print(result.stdout + result.stderr)
    return result.returncode == 0, set(digests.values())


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile csrc for other systems, and run what runs here.")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(RUNNERS))
    targets = parser.parse_args().targets or list(RUNNERS)
    if unknown := set(targets) - set(RUNNERS):
        parser.error(f"no such target: {', '.join(unknown)}")
    if importlib.util.find_spec("ziglang") is None:
        parser.error("needs zig: pip install ziglang")
    digests: set[str] = set()
    ok = True
    with tempfile.TemporaryDirectory() as name:
        for target in targets:
            folder = Path(name, target)
            folder.mkdir()
            program = build(target, folder)
            print(f"{target}: compiled and linked without a warning", flush=True)
            runner = runner_of(target)
            if runner is None:
                print("  not run: nothing here runs it", flush=True)
                continue
            passed, found = run(runner, program, Path(name, "wine"))
            ok, digests = ok and passed, digests | found
    print(f"digests of all results: {' '.join(sorted(digests)) or 'none'}")
    return 0 if ok and len(digests) <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
