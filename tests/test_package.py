"""The package as others see it: what importing it costs, what it offers, what it exports."""

from __future__ import annotations

import ast
import ctypes
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import entry_points, version
from pathlib import Path

import pytest

import phi3c
from phi3c import _kernels


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def test_import_loads_nothing_heavy_and_says_nothing() -> None:
    result = run("import sys, phi3c; phi3c.__all__; sys.stderr.write(' '.join(sys.modules))")
    loaded = set(result.stderr.split())
    assert "phi3c" in loaded
    assert not loaded & {"numpy", "tokenizers", "huggingface_hub", "jinja2", "tqdm", "phi3c._kernels"}
    assert result.stdout == ""


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, phi3c.cli\ntry: phi3c.cli.main(['--help'])\nexcept SystemExit: pass\n"
    loaded = set(run(code + "sys.stderr.write(' '.join(sys.modules))").stderr.split())
    assert "phi3c.cli.run" in loaded
    assert not loaded & {"numpy", "tokenizers", "huggingface_hub", "jinja2", "tqdm"}


@pytest.mark.parametrize("name", phi3c.__all__)
def test_public_names_exist_and_are_explained(name: str) -> None:
    value = getattr(phi3c, name)
    assert name == "__version__" or value.__doc__


def test_all_lists_what_can_be_had() -> None:
    assert set(phi3c.__all__) == phi3c._HOME.keys() | {"__version__"}
    assert dir(phi3c) == sorted(phi3c.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Modle'"):
        phi3c.Modle  # noqa: B018


def test_version_and_command_are_those_of_the_distribution() -> None:
    assert phi3c.__version__ == version("phi3c")
    (command,) = entry_points(group="console_scripts", name="phi3c")
    assert command.value == "phi3c.cli:main"


def test_stub_names_what_the_extension_has(checkout: Path) -> None:
    stub = ast.parse((checkout / "src/phi3c/_kernels.pyi").read_text(encoding="utf-8"))
    named = {node.target.id for node in stub.body if isinstance(node, ast.AnnAssign)}
    named |= {node.name for node in stub.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    imported = {"InvalidParameterError", "os"}
    assert named == {name for name in dir(_kernels) if not name.startswith("_")} - imported


def test_the_extension_exports_its_entry_point_only(checkout: Path) -> None:
    library = ctypes.CDLL(_kernels.__file__)
    assert library.PyInit__kernels
    header = (checkout / "csrc/phi3c.h").read_text(encoding="utf-8")
    functions = set(re.findall(r"\b(phi3c_\w+)\(", header))
    assert {"phi3c_init", "phi3c_matmul"} <= functions
    for name in [*functions, "phi3c_kernel", "phi3c_kernels_scalar", "phi3c_layouts"]:
        assert not hasattr(library, name), name


def test_the_extension_leaves_free_threading_on() -> None:
    result = run("import sys, phi3c._kernels; print(getattr(sys, '_is_gil_enabled', lambda: True)())")
    assert result.stdout == f"{not sysconfig.get_config_var('Py_GIL_DISABLED')}\n"


def test_an_unknown_instruction_set_is_refused_by_name() -> None:
    code = "import os; os.environ['PHI3C_ISA'] = 'sse9'; from phi3c import _kernels"
    with pytest.raises(subprocess.CalledProcessError) as caught:
        run(code)
    last = caught.value.stderr.strip().splitlines()[-1]
    assert last.startswith("phi3c.errors.InvalidParameterError: PHI3C_ISA: instruction set 'sse9' is unknown")
    assert "scalar" in last
