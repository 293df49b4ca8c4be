"""README's Python runs, and its tables are complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkout import ROOT

from phi3c.hub import ALIASES
from phi3c.sampling import SamplingParams

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_snippets_run(demo_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    namespace: dict[str, object] = {}
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(snippet, namespace)
    assert getattr(namespace["scores"], "shape", None) == (5, 49152)
    assert "\n1 1024\n" in capsys.readouterr().out


def test_every_alias_is_listed() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \|", README, re.MULTILINE)) >= {*ALIASES, "demo"}


def test_every_environment_variable_is_listed() -> None:
    sources = [
        path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py*") if path.suffix != ".pyc"
    ]
    used = set(re.findall(r"\bPHI3C_[A-Z_]+", "\n".join(source for source in sources)))
    listed = set(re.findall(r"^\| `(PHI3C_[A-Z_]+)`", README, re.MULTILINE))
    constants = {name for name in used if name in (ROOT / "csrc/phi3c.h").read_text(encoding="utf-8")}
    assert listed == used - constants


def test_defaults_are_those_of_the_code() -> None:
    (text,) = re.findall(r"fields and their defaults: `(.*?)`", README, re.DOTALL)
    assert eval(f"dict({','.join(text.split())})") == {
        name: getattr(SamplingParams(), name) for name in SamplingParams.__dataclass_fields__
    }
