"""phi3c: Microsoft's Phi-3 family of language models from GGUF files, on ordinary CPUs.

Layers, each importing only what stands to its right (tests/test_layers.py):
cli -> model -> engine -> phi3 -> weights -> cache, config, packed, tokenizer, ... -> gguf -> errors;
_kernels under all.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .completion import Chunk, Completion, Timings, Usage
    from .cpu import CPUInfo, cpu_info
    from .divergence import Divergence
    from .errors import (
        ChatTemplateError,
        CheckpointError,
        ContextLengthError,
        CorruptGGUFError,
        DownloadError,
        GGUFVersionError,
        InvalidParameterError,
        LogitsFileError,
        MissingDependencyError,
        ModelClosedError,
        ModelLoadError,
        ModelNotFoundError,
        ModelWriteError,
        NotGGUFError,
        NumericalError,
        OutOfMemoryError,
        Phi3cError,
        TokenizerError,
        ToolsUnsupportedError,
        TruncatedFileError,
        UnsupportedModelError,
        UnsupportedQuantError,
    )
    from .model import Model, ModelInfo, Stream
    from .perplexity import Estimate, Perplexity, Score
    from .quantizer import quantize
    from .sampling import SamplingParams, TokenLogprob
    from .tools import ToolCall
    from .weights import pack

__version__ = "0.1.0"

# Where each public name lives; imported when first asked for, so that `import phi3c` costs next to nothing.
_HOMES = {
    "model": ("Model", "ModelInfo", "Stream"),
    "completion": ("Chunk", "Completion", "Timings", "Usage"),
    "sampling": ("SamplingParams", "TokenLogprob"),
    "perplexity": ("Estimate", "Perplexity", "Score"),
    "divergence": ("Divergence",),
    "cpu": ("CPUInfo", "cpu_info"),
    "errors": (
        "ChatTemplateError", "CheckpointError", "ContextLengthError", "CorruptGGUFError", "DownloadError",
        "GGUFVersionError", "InvalidParameterError", "LogitsFileError", "MissingDependencyError",
        "ModelClosedError", "ModelLoadError", "ModelNotFoundError", "ModelWriteError", "NotGGUFError",
        "NumericalError", "OutOfMemoryError", "Phi3cError", "TokenizerError", "ToolsUnsupportedError",
        "TruncatedFileError", "UnsupportedModelError", "UnsupportedQuantError",
    ),
    "tools": ("ToolCall",),
    "weights": ("pack",),
    "quantizer": ("quantize",),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "CPUInfo", "ChatTemplateError", "CheckpointError", "Chunk", "Completion", "ContextLengthError",
    "CorruptGGUFError", "Divergence", "DownloadError", "Estimate", "GGUFVersionError",
    "InvalidParameterError", "LogitsFileError", "MissingDependencyError", "Model", "ModelClosedError",
    "ModelInfo", "ModelLoadError", "ModelNotFoundError", "ModelWriteError", "NotGGUFError", "NumericalError",
    "OutOfMemoryError", "Perplexity", "Phi3cError", "SamplingParams", "Score", "Stream", "Timings",
    "TokenLogprob", "TokenizerError", "ToolCall", "ToolsUnsupportedError", "TruncatedFileError",
    "UnsupportedModelError", "UnsupportedQuantError", "Usage", "__version__", "cpu_info", "pack", "quantize",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'phi3c' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
