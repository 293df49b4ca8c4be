"""That cibuildwheel, on the runners of wheels.yml, builds and tests for what docs/releasing.md says."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# runner -> cibuildwheel's platform and architecture, which it finds for itself there
RUNNERS = {
    "ubuntu-24.04": ("linux", "x86_64"),
    "ubuntu-24.04-arm": ("linux", "aarch64"),
    "macos-15": ("macos", "arm64"),
    "macos-15-intel": ("macos", "x86_64"),
    "windows-2022": ("windows", "AMD64"),
    "windows-11-arm": ("windows", "ARM64"),
}
PYTHONS = {"cp311", "cp312", "cp313", "cp314", "cp315", "cp314t", "cp315t"}
PLATFORMS = {
    *("manylinux_x86_64", "musllinux_x86_64", "manylinux_aarch64", "musllinux_aarch64"),
    *("macosx_arm64", "macosx_x86_64", "win_amd64", "win_arm64"),
}


def identifiers(platform: str, arch: str) -> set[str]:
    options = ["--print-build-identifiers", "--platform", platform, "--archs", arch]
    command = ["cibuildwheel", *options, str(ROOT)]
    return set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())


def main() -> None:
    workflow = (ROOT / ".github/workflows/wheels.yml").read_text(encoding="utf-8")
    assert set(re.findall(r"^ +- ([a-z]+-[\w.-]+)", workflow, re.MULTILINE)) == RUNNERS.keys()
    found = set().union(*(identifiers(*runner) for runner in RUNNERS.values()))
    expected = {f"{python}-{platform}" for python in PYTHONS for platform in PLATFORMS}
    assert found == expected, f"missing: {sorted(expected - found)}; not listed: {sorted(found - expected)}"
    print(f"{len(found)} builds on {len(RUNNERS)} runners")


if __name__ == "__main__":
    main()
