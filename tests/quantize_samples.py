"""What quantisers are compared on: tensors of several kinds, and models of several shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from models import tokenizer_metadata, write_tiny_llama, write_tiny_phi3
from numpy.typing import NDArray

from phi3c.gguf import GGMLType, Value, write_gguf

D, FFN, VOCAB = 1024, 1024, 300

# Name of a sample -> the tensor that holds it in `write_samples`.
SAMPLES = {
    "normal": "blk.0.attn_qkv.weight",
    "heavy tails": "blk.0.attn_output.weight",
    "uneven columns": "blk.0.ffn_up.weight",
    "Q8_0 before": "blk.0.ffn_down.weight",
}

# Models whose mixes are compared: (architecture, arguments of `write_tiny_phi3` or `write_tiny_llama`).
_WIDE: dict[str, Any] = {"head_dim": 64, "ffn": 256, "vocab": 300}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3": ("phi3", {"layers": 16, "kv_heads": 4, **_WIDE}),
    "phi3 tied, 4 heads a key head": ("phi3", {"layers": 9, "kv_heads": 1, "tied": True, **_WIDE}),
    "phi3 of 288 columns": ("phi3", {"layers": 4, "heads": 6, "head_dim": 48, "ffn": 512, "vocab": 300}),
    "phi3 of 288 columns, tied": (
        "phi3",
        {"layers": 1, "heads": 6, "head_dim": 48, "ffn": 512, "vocab": 300, "tied": True},
    ),
    "llama": ("llama", {"layers": 11, **_WIDE}),
}


def samples() -> dict[str, NDArray[np.float32]]:
    """Tensors, (rows, columns), of the size of weights."""
    rng = np.random.default_rng(7)
    normal = rng.standard_normal((3 * D, D), np.float32)
    tails = rng.standard_t(4, (D, D))
    columns = rng.standard_normal((2 * FFN, D)) * np.exp(0.7 * rng.standard_normal(D))
    groups = rng.standard_normal((D * FFN // 32, 32))
    step = np.abs(groups).max(1, keepdims=True) / 127
    rounded = (np.rint(groups / step) * step).reshape(D, FFN)
    tensors = dict(zip(SAMPLES, (normal, tails, columns, rounded), strict=True))
    return {name: (0.02 * x).astype(np.float32) for name, x in tensors.items()}


def write_samples(path: Path, tensors: dict[str, NDArray[np.float32]]) -> Path:
    """A phi3 model of one layer, which is what llama.cpp quantises, with these tensors as matrices."""
    metadata: dict[str, Value] = {
        "general.architecture": "phi3",
        "phi3.context_length": 512,
        "phi3.embedding_length": D,
        "phi3.feed_forward_length": FFN,
        "phi3.block_count": 1,
        "phi3.attention.head_count": 8,
        "phi3.attention.head_count_kv": 8,
        "phi3.attention.layer_norm_rms_epsilon": 1e-5,
        "phi3.attention.sliding_window": 0,
        "phi3.rope.dimension_count": D // 8,
        **tokenizer_metadata(VOCAB),
    }
    matrices = {SAMPLES[name]: x for name, x in tensors.items()}
    matrices["token_embd.weight"] = np.full((VOCAB, D), 0.02, np.float32)
    norms = ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")
    write_gguf(
        path,
        metadata,
        [(name, x.shape[::-1], GGMLType.F32, x) for name, x in matrices.items()]
        + [(name, (D,), GGMLType.F32, np.ones(D, np.float32)) for name in norms],
    )
    return path


def write_tiny(path: Path, name: str) -> Path:
    """The model of TINY with that name."""
    architecture, options = TINY[name]
    return (write_tiny_phi3 if architecture == "phi3" else write_tiny_llama)(path, **options)


def by_role(types: Mapping[str, GGMLType]) -> dict[str, str]:
    """Types of tensors: those of all layers, in order, under "blk.*.attn_qkv" and the like."""
    found: dict[str, list[str]] = {}
    for name in sorted(types, key=_layer):
        role = re.sub(r"\d+", "*", name.removesuffix(".weight"), count=1)
        found.setdefault(role, []).append(types[name].name)
    return {role: " ".join(names) for role, names in sorted(found.items())}


def _layer(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else -1
