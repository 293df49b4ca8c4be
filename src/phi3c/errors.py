"""Every exception phi3c raises on purpose; each also is the builtin that people already catch."""

from __future__ import annotations


class Phi3cError(Exception):
    """Base class of all errors raised by phi3c; they survive pickling, attributes included."""

    def __reduce__(self) -> tuple[object, ...]:
        fields = {name: value for name, value in self.__dict__.items() if name != "__notes__"}
        return _rebuild, (type(self), self.args, fields)


def _rebuild(kind: type[Phi3cError], args: tuple[object, ...], fields: dict[str, object]) -> Phi3cError:
    return kind(*args, **fields)


class ModelLoadError(Phi3cError):
    """A model could not be found, fetched or read."""


class ModelNotFoundError(ModelLoadError, FileNotFoundError):
    """No such file, repository or file in a repository."""

    def __str__(self) -> str:  # FileNotFoundError would print errno fields
        return str(self.args[0]) if self.args else ""


class DownloadError(ModelLoadError, OSError):
    """A download failed: gated, offline, out of disk space or damaged on the way."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class NotGGUFError(ModelLoadError, ValueError):
    """The file is something else; `detected` names what it looks like."""

    def __init__(self, message: str, detected: str) -> None:
        super().__init__(message)
        self.detected = detected


class GGUFVersionError(ModelLoadError, ValueError):
    """A GGUF version (or byte order) that phi3c does not read."""


class TruncatedFileError(ModelLoadError, ValueError):
    """The file ends before its contents do."""

    def __init__(self, message: str, expected_bytes: int, actual_bytes: int) -> None:
        super().__init__(message)
        self.expected_bytes = expected_bytes
        self.actual_bytes = actual_bytes


class CorruptGGUFError(ModelLoadError, ValueError):
    """The file contradicts itself or the format at byte `offset`."""

    def __init__(self, message: str, offset: int) -> None:
        super().__init__(message)
        self.offset = offset


class CheckpointError(ModelLoadError, ValueError):
    """A checkpoint in safetensors, or a file beside it, is damaged or contradicts the others."""


class UnsupportedModelError(ModelLoadError, NotImplementedError):
    """A valid file whose architecture, or a feature of it, phi3c does not run."""


class UnsupportedQuantError(UnsupportedModelError):
    """A tensor is stored in a type phi3c has no kernels for."""

    def __init__(self, message: str, tensor: str, type: str) -> None:
        super().__init__(message)
        self.tensor = tensor
        self.type = type


class TokenizerError(ModelLoadError, ValueError):
    """The file's vocabulary is missing, contradictory or of an unsupported kind."""


class ModelWriteError(Phi3cError, OSError):
    """A file could not be written: no room on the disk, no permission, no such folder."""

    def __str__(self) -> str:
        return str(self.args[0]) if self.args else ""


class LogitsFileError(Phi3cError, ValueError):
    """A file of log-probabilities is none, is damaged, or belongs to a model with other tokens."""


class InvalidParameterError(Phi3cError, ValueError):
    """An argument is out of its range."""


class ContextLengthError(Phi3cError, ValueError):
    """Prompt and requested tokens do not fit the context."""

    def __init__(self, message: str, n_prompt: int, max_tokens: int | None, n_ctx: int) -> None:
        super().__init__(message)
        self.n_prompt = n_prompt
        self.max_tokens = max_tokens
        self.n_ctx = n_ctx


class ChatTemplateError(Phi3cError, ValueError):
    """A chat template is missing, malformed or refused the messages."""


class ToolsUnsupportedError(InvalidParameterError):
    """Tools, or messages about their calls, for a model that was not made to call any."""


class NumericalError(Phi3cError, ArithmeticError):
    """The forward pass produced NaN or infinite logits."""


class OutOfMemoryError(Phi3cError, MemoryError):
    """The memory a request needs cannot be had."""


class MissingDependencyError(Phi3cError, ImportError):
    """An optional package is needed; the message has the command that installs it."""


class ModelClosedError(Phi3cError, RuntimeError):
    """The model was used after `close()`."""
