"""The checkout's folder, for tests that read sources and documents.

Tests of a wheel run from a copy of this folder elsewhere, as cibuildwheel makes one. There, a module that
imports ROOT skips.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

if not (ROOT / "setup.py").is_file():
    pytest.skip("needs the checkout, which these tests are away from", allow_module_level=True)
