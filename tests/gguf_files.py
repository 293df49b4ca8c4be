"""Builders of tiny, valid models: metadata without a vocabulary, and random float32 weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from phi3c.gguf import Buffer, GGMLType, Value, write_gguf

Metadata = dict[str, Value]
Tensors = dict[str, tuple[tuple[int, ...], GGMLType, Buffer]]  # name -> (shape, type, data)


def tiny_phi3_metadata(**overrides: Value | None) -> Metadata:
    """A phi3 model of 2 layers, d 64, 4 heads of 16 over 2 key heads, ffn 96.

    Overrides are whole keys, `**{"phi3.block_count": 1}`; None removes the key.
    """
    return _tiny_metadata("phi3", overrides)


def tiny_llama_metadata(**overrides: Value | None) -> Metadata:
    """The same geometry with architecture llama."""
    return _tiny_metadata("llama", overrides)


def _tiny_metadata(architecture: str, overrides: dict[str, Value | None]) -> Metadata:
    metadata: dict[str, Value | None] = {
        "general.architecture": architecture,
        "general.name": "tiny",
        "general.file_type": 0,
        f"{architecture}.context_length": 256,
        f"{architecture}.embedding_length": 64,
        f"{architecture}.feed_forward_length": 96,
        f"{architecture}.block_count": 2,
        f"{architecture}.attention.head_count": 4,
        f"{architecture}.attention.head_count_kv": 2,
        f"{architecture}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{architecture}.rope.dimension_count": 16,
    }
    return {key: value for key, value in (metadata | overrides).items() if value is not None}


def tiny_tensors(
    metadata: Metadata, *, vocab: int = 128, tied: bool = False, fused_qkv: bool = True, seed: int = 0
) -> Tensors:
    """Random F32 weights for such metadata; `fused_qkv` only matters for phi3."""
    architecture = str(metadata["general.architecture"])

    def hyper(key: str) -> int:
        value = metadata[f"{architecture}.{key}"]
        assert isinstance(value, int)
        return value

    d, ffn, heads, kv_heads = map(
        hyper,
        ("embedding_length", "feed_forward_length", "attention.head_count", "attention.head_count_kv"),
    )
    q, kv = d, d // heads * kv_heads
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (d, vocab)}
    for i in range(hyper("block_count")):
        block = f"blk.{i}."
        shapes[block + "attn_norm.weight"] = (d,)
        if architecture == "phi3" and fused_qkv:
            shapes[block + "attn_qkv.weight"] = (d, q + 2 * kv)
        else:
            shapes[block + "attn_q.weight"] = (d, q)
            shapes[block + "attn_k.weight"] = (d, kv)
            shapes[block + "attn_v.weight"] = (d, kv)
        shapes[block + "attn_output.weight"] = (q, d)
        shapes[block + "ffn_norm.weight"] = (d,)
        if architecture == "phi3":
            shapes[block + "ffn_up.weight"] = (d, 2 * ffn)
        else:
            shapes[block + "ffn_gate.weight"] = (d, ffn)
            shapes[block + "ffn_up.weight"] = (d, ffn)
        shapes[block + "ffn_down.weight"] = (ffn, d)
    shapes["output_norm.weight"] = (d,)
    if not tied:
        shapes["output.weight"] = (d, vocab)

    rng = np.random.default_rng(seed)
    return {name: (shape, GGMLType.F32, _random_weight(rng, shape)) for name, shape in shapes.items()}


def _random_weight(rng: np.random.Generator, shape: tuple[int, ...]) -> Buffer:
    """Norm weights around 1, matrices that keep the size of their input; numpy order (rows, columns)."""
    noise = rng.standard_normal(shape[::-1], dtype=np.float32)
    weight: Buffer = 1 + np.float32(0.1) * noise if len(shape) == 1 else noise / np.float32(shape[0] ** 0.5)
    return weight


def write_tiny(path: Path, metadata: Metadata, tensors: Tensors) -> Path:
    """Write both to `path` and return it."""
    write_gguf(path, metadata, [(name, *tensor) for name, tensor in tensors.items()])
    return path
