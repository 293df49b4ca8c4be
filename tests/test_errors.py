"""Every exception is a Phi3cError and the builtin that people already catch."""

from __future__ import annotations

import inspect
import pickle

import pytest

from phi3c import errors
from phi3c.errors import ModelLoadError, Phi3cError

BUILTINS = {
    "ModelNotFoundError": FileNotFoundError,
    "DownloadError": OSError,
    "NotGGUFError": ValueError,
    "GGUFVersionError": ValueError,
    "TruncatedFileError": ValueError,
    "CorruptGGUFError": ValueError,
    "CheckpointError": ValueError,
    "UnsupportedModelError": NotImplementedError,
    "UnsupportedQuantError": NotImplementedError,
    "TokenizerError": ValueError,
    "ModelWriteError": OSError,
    "LogitsFileError": ValueError,
    "InvalidParameterError": ValueError,
    "ContextLengthError": ValueError,
    "ChatTemplateError": ValueError,
    "ToolsUnsupportedError": ValueError,
    "NumericalError": ArithmeticError,
    "OutOfMemoryError": MemoryError,
    "MissingDependencyError": ImportError,
    "ModelClosedError": RuntimeError,
}
LOADING = {
    "ModelNotFoundError",
    "DownloadError",
    "NotGGUFError",
    "GGUFVersionError",
    "TruncatedFileError",
    "CorruptGGUFError",
    "CheckpointError",
    "UnsupportedModelError",
    "UnsupportedQuantError",
    "TokenizerError",
}


def test_the_table_is_complete() -> None:
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert defined == BUILTINS.keys() | {"Phi3cError", "ModelLoadError"}


@pytest.mark.parametrize("name", BUILTINS)
def test_bases(name: str) -> None:
    error = getattr(errors, name)
    assert issubclass(error, Phi3cError)
    assert issubclass(error, BUILTINS[name])
    assert issubclass(error, ModelLoadError) == (name in LOADING)


FIELDS = {
    "NotGGUFError": {"detected": "html"},
    "TruncatedFileError": {"expected_bytes": 100, "actual_bytes": 60},
    "CorruptGGUFError": {"offset": 24},
    "UnsupportedQuantError": {"tensor": "output.weight", "type": "IQ2_XS"},
    "ContextLengthError": {"n_prompt": 5000, "max_tokens": None, "n_ctx": 4096},
}


@pytest.mark.parametrize("name", BUILTINS)
def test_message_and_fields(name: str) -> None:
    error = getattr(errors, name)("what happened", **FIELDS.get(name, {}))
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert type(copy) is type(error)
        assert str(copy) == "what happened"
        for field, value in FIELDS.get(name, {}).items():
            assert getattr(copy, field) == value
