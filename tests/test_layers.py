"""The rules of docs/architecture.md that can be read off the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from checkout import ROOT

PACKAGE = ROOT / "src/phi3c"
CSRC = ROOT / "csrc"

# A module imports only from layers before its own; `cli` is a package whose modules may import one another.
LAYERS = (
    ("errors", "atomic", "cgroup", "_kernels"),
    ("gguf", "safetensors", "sandbox", "reasoning", "tools", "stopping", "lookup", "threads"),
    ("memory", "cpu", "config", "packed", "logits_file", "hub", "cache", "sampling", "vocabulary"),
    ("completion", "weights", "tokenizer", "checkpoint_tokenizer"),
    ("phi3", "chat", "answer", "checkpoint"),
    ("engine", "profile", "quantizer"),
    ("perplexity",),
    ("divergence",),
    ("model", "bench"),
    ("cli",),
    ("__main__", "__init__"),
)
RANK = {module: rank for rank, layer in enumerate(LAYERS) for module in layer}

# Who may import the extension: what computes, what reports on it, what makes the pool, and what measures.
KERNEL_USERS = {
    "cache", "sampling", "weights", "phi3", "engine", "perplexity", "divergence", "cpu", "model", "bench",
    "profile", "quantizer",
}  # fmt: skip


def imports(path: Path) -> set[str]:
    """Modules of phi3c that a file imports anywhere, functions included; `phi3c.cli.run` counts as cli."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("phi3c.")}
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")
            if node.level == 0 and module[0] == "phi3c":
                module = module[1:]
            elif node.level == 0:
                continue
            found |= {module[0]} if module and module[0] else {alias.name for alias in node.names}
    return found & RANK.keys()


def modules() -> list[tuple[str, Path]]:
    """(module, file) for every file of the package; the files of cli all count as cli."""
    paths = [(path.stem, path) for path in sorted(PACKAGE.glob("*.py"))]
    return paths + [("cli", path) for path in sorted(PACKAGE.glob("cli/*.py"))]


def test_every_module_has_a_layer() -> None:
    assert {module for module, _ in modules()} | {"_kernels"} == RANK.keys()


@pytest.mark.parametrize(("module", "path"), modules(), ids=lambda value: getattr(value, "name", ""))
def test_imports_point_one_way(module: str, path: Path) -> None:
    for imported in imports(path):
        same_package = module == imported == "cli"
        assert same_package or RANK[imported] < RANK[module], f"{path.name} imports {imported}"


def test_imports_are_found(tmp_path: Path) -> None:
    lines = ["import phi3c.gguf", "from . import hub", "from .cache import KVCache", "def f():"]
    lines += [
        "    from phi3c import model, Model",
        "    from phi3c.cli.run import main",
        "import gguf, errors",
    ]
    (tmp_path / "a.py").write_text("\n".join(lines))
    assert imports(tmp_path / "a.py") == {"gguf", "hub", "cache", "model", "cli"}


def test_who_imports_the_extension() -> None:
    assert {module for module, path in modules() if "_kernels" in imports(path)} == KERNEL_USERS


def test_names_are_resolved_only_at_the_top() -> None:
    assert {module for module, path in modules() if "hub" in imports(path)} == {"model", "cli"}


def test_the_file_format_knows_no_model() -> None:
    assert imports(PACKAGE / "gguf.py") == {"errors", "atomic"}


# --- C ---


def c_files(pattern: str) -> list[Path]:
    found = sorted(CSRC.glob(pattern))
    assert found
    return found


def includes(path: Path) -> set[str]:
    return set(re.findall(r'^#include "(?:\.\./)?([\w.]+)"', path.read_text(encoding="utf-8"), re.MULTILINE))


def test_only_the_ladder_asks_for_the_processor() -> None:
    assert {path.name for path in c_files("**/*.[ch]") if "cpu.h" in includes(path)} == {"cpu.c", "kernels.c"}


def test_kernels_know_no_threads() -> None:
    for path in c_files("*/*.[ch]"):
        assert includes(path) <= {"kernels.h", "expf.h", "quantised.h", "quantised_avx512.h"}, path


def external_symbols(source: str) -> list[str]:
    """Functions and objects defined at the left margin without `static`."""
    pattern = r"^(?!static\b|typedef\b|extern\b|return\b|else\b)[a-z][\w ]*?[ *](\w+)(?:\[\w*\])*(?:\(| = |;)"
    return re.findall(pattern, source, re.MULTILINE)


@pytest.mark.parametrize("path", c_files("**/*.c"), ids=lambda path: path.name)
def test_external_symbols_carry_the_prefix(path: Path) -> None:
    symbols = external_symbols(path.read_text(encoding="utf-8"))
    assert symbols
    assert all(symbol.startswith("phi3c_") for symbol in symbols), symbols


def test_external_symbols_are_found() -> None:
    source = (
        "static int a(void) {\nint b(void) {\nconst char *c(int i) {\n    f(1);\nconst t d[N] = {\nint e;\n"
    )
    assert external_symbols(source) == ["b", "c", "d", "e"]


# --- one word for an instruction set ---


def isa_flags() -> dict[str, object]:
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ISA_FLAGS":
            flags: dict[str, object] = ast.literal_eval(node.value)
            return flags
    raise AssertionError("setup.py has no ISA_FLAGS")


def test_one_word_for_an_instruction_set() -> None:
    suffixes = {path.stem.removeprefix("kernels_"): path for path in c_files("*/kernels_*.c")}
    ladder = re.findall(r"\{&phi3c_kernels_(\w+),", (CSRC / "kernels.c").read_text(encoding="utf-8"))
    assert set(ladder) == suffixes.keys() == {"scalar", *isa_flags()}
    for isa, path in suffixes.items():
        assert f'.name = "{isa}"' in path.read_text(encoding="utf-8")
