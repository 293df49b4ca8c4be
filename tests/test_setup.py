"""setup.py's choice of the machine to build for, on systems that are made up."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SETUP = Path(__file__).resolve().parents[1] / "setup.py"
UNIVERSAL = "macosx-11.0-universal2"


def target_machine(system: str, environ: Mapping[str, str], host: str, interpreter: str) -> str:
    """What the function of setup.py says; running all of setup.py would build."""
    tree = ast.parse(SETUP.read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if getattr(node, "name", "") == "target_machine"]
    names: dict[str, Any] = {
        "os": SimpleNamespace(environ=environ),
        "platform": SimpleNamespace(machine=lambda: host),
        "re": re,
        "sys": SimpleNamespace(platform=system, exit=sys.exit),
        "sysconfig": SimpleNamespace(get_platform=lambda: interpreter),
    }
    exec(compile(tree, SETUP, "exec"), names)
    machine: str = names["target_machine"]()
    return machine


@pytest.mark.parametrize(
    ("system", "environ", "host", "interpreter", "target"),
    [
        ("linux", {}, "x86_64", "linux-x86_64", "x86_64"),
        ("linux", {}, "x86_64", "linux-aarch64", "aarch64"),  # named by _PYTHON_HOST_PLATFORM
        ("darwin", {}, "arm64", "macosx-11.0-arm64", "arm64"),
        ("darwin", {}, "arm64", UNIVERSAL, "arm64"),
        ("darwin", {"ARCHFLAGS": "-arch x86_64"}, "arm64", UNIVERSAL, "x86_64"),
        ("win32", {}, "AMD64", "win-amd64", "amd64"),
        ("win32", {"VSCMD_ARG_TGT_ARCH": "arm64"}, "AMD64", "win-amd64", "arm64"),
        ("win32", {}, "AMD64", "win32", "win32"),
        ("win32", {}, "AMD64", "mingw_x86_64_ucrt_gnu", "AMD64"),
    ],
)
def test_target_machine(
    system: str, environ: dict[str, str], host: str, interpreter: str, target: str
) -> None:
    assert target_machine(system, environ, host, interpreter) == target


def test_two_architectures_at_once_are_refused() -> None:
    with pytest.raises(SystemExit, match="one architecture at a time"):
        target_machine("darwin", {"ARCHFLAGS": "-arch arm64 -arch x86_64"}, "arm64", UNIVERSAL)
