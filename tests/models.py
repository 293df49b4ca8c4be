"""Small GGUF models for tests: random weights of realistic scale, a byte-level tokenizer, a chat template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np
from blocks import block_elements, quantize_simple
from numpy.typing import NDArray

from phi3c.gguf import GGMLType, GGUFFile, Value, n_bytes, write_gguf

StrPath = str | PathLike[str]
Types = str | Mapping[str, str]
Tensor = tuple[str, tuple[int, ...], GGMLType, NDArray[np.uint8]]
Matrix = tuple[str, int, int, float]
"""Name without ".weight", rows, columns, standard deviation of a product with columns of unit variance."""

NORMAL, CONTROL, UNUSED = 1, 3, 5
MERGES = ["h e", "l l", "Ġ t", "Ġt he", "i n", "o n", "ll o", "he llo", "Ġ w", "Ġ a"]
SPECIALS = ["<|endoftext|>", "<|user|>", "<|end|>", "<|assistant|>"]
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def write_tiny_phi3(
    path: StrPath,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    rope_dims: int | None = None,
    ffn: int = 256,
    vocab: int = 320,
    window: int | Literal["absent"] | None = None,
    tied: bool = False,
    types: Types = "F32",
    ctx: int = 512,
    rope_base: float = 10000.0,
    factors: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    original_ctx: int | None = None,
    attn_factor: float | None = None,
    seed: int = 0,
) -> Path:
    """Write a random `phi3` model with fused attn_qkv and ffn_up.

    Args:
        rope_dims: rotated elements of each head, all of them when None.
        window: the sliding window; None writes the key with 0 (off), "absent" writes no key.
        types: type of every matrix, or types by "attn_qkv" or "blk.1.attn_qkv" (F32 where neither is named).
            A type's block must divide the columns: 256 for K types.
        rope_base: rope.freq_base.
        factors: LongRoPE's divisors of the frequencies, (short, long), rope_dims / 2 floats each; written as
            rope_factors_short.weight and rope_factors_long.weight.
        original_ctx: rope.scaling.original_context_length; None writes no key.
        attn_factor: rope.scaling.attn_factor; None writes no key.
    """
    width = heads * head_dim
    matrices: list[Matrix] = []
    for n in range(layers):
        matrices += [
            (f"blk.{n}.attn_qkv", (heads + 2 * kv_heads) * head_dim, width, 1.5),
            (f"blk.{n}.attn_output", width, width, 1.0),
            (f"blk.{n}.ffn_up", 2 * ffn, width, 1.0),
            (f"blk.{n}.ffn_down", width, ffn, 1.0),
        ]
    metadata: dict[str, Value] = {
        **_geometry("phi3", layers, heads, kv_heads, head_dim, rope_dims, ffn, ctx),
        "phi3.rope.freq_base": rope_base,
        **tokenizer_metadata(vocab),
    }
    if window != "absent":
        metadata["phi3.attention.sliding_window"] = window or 0
    if original_ctx is not None:
        metadata["phi3.rope.scaling.original_context_length"] = original_ctx
    if attn_factor is not None:
        metadata["phi3.rope.scaling.attn_factor"] = attn_factor
    tensors = _tensors(matrices, layers, width, vocab, tied, types, seed)
    for name, divisors in zip(("short", "long"), factors or (), strict=factors is not None):
        data = np.asarray(divisors, np.float32)
        tensors.append((f"rope_factors_{name}.weight", data.shape, GGMLType.F32, data.view(np.uint8)))
    write_gguf(path, metadata, tensors)
    return Path(path)


def write_tiny_llama(
    path: StrPath,
    *,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    rope_dims: int | None = None,
    ffn: int = 256,
    vocab: int = 320,
    tied: bool = False,
    types: Types = "F32",
    ctx: int = 512,
    seed: int = 0,
) -> Path:
    """Write a random `llama` model: q, k, v, gate and up apart. Arguments as for `write_tiny_phi3`."""
    width, kv_width = heads * head_dim, kv_heads * head_dim
    matrices: list[Matrix] = []
    for n in range(layers):
        matrices += [
            (f"blk.{n}.attn_q", width, width, 1.5),
            (f"blk.{n}.attn_k", kv_width, width, 1.5),
            (f"blk.{n}.attn_v", kv_width, width, 1.5),
            (f"blk.{n}.attn_output", width, width, 1.0),
            (f"blk.{n}.ffn_gate", ffn, width, 1.0),
            (f"blk.{n}.ffn_up", ffn, width, 1.0),
            (f"blk.{n}.ffn_down", width, ffn, 1.0),
        ]
    metadata: dict[str, Value] = {
        **_geometry("llama", layers, heads, kv_heads, head_dim, rope_dims, ffn, ctx),
        **tokenizer_metadata(vocab),
    }
    write_gguf(path, metadata, _tensors(matrices, layers, width, vocab, tied, types, seed))
    return Path(path)


def store_as(src_path: StrPath, dst_path: StrPath, tensor: str, type_name: str) -> Path:
    """Write a copy in which one tensor is zeros of another type, of those that phi3c refuses too."""
    with GGUFFile(src_path) as file:
        tensors = [(t.name, t.shape, t.type, file.data(t.name)) for t in file.tensors.values()]
        other, shape = GGMLType[type_name], file.tensors[tensor].shape
        zeros = np.zeros(n_bytes(shape, other), np.uint8)
        copies = [(tensor, shape, other, zeros) if t[0] == tensor else t for t in tensors]
        write_gguf(dst_path, file.metadata, copies)
    return Path(dst_path)


def fuse_llama_to_phi3(src_path: StrPath, dst_path: StrPath) -> Path:
    """Write the `phi3` twin of a `llama` GGUF: the same weights, byte for byte, in Phi-3's arrangement.

    Stacks the rows of q, k, v and those of gate, up, and takes the rows of each q and k head from interleaved
    rotary order (pairs 2i, 2i+1) to NEOX order (pairs i, i + n_rot/2). The twin has no sliding window.
    """
    with GGUFFile(src_path) as file:
        metadata: dict[str, Value] = {
            key.replace("llama.", "phi3.", 1) if key.startswith("llama.") else key: value
            for key, value in file.metadata.items()
        }
        metadata["general.architecture"] = "phi3"
        metadata["phi3.attention.sliding_window"] = 0
        n_rot, n_heads = (
            int(str(metadata[f"phi3.{key}"])) for key in ("rope.dimension_count", "attention.head_count")
        )
        head_dim = file.tensors["blk.0.attn_q.weight"].rows // n_heads
        rows_of_head = np.arange(head_dim)
        rows_of_head[:n_rot] = rows_of_head[:n_rot].reshape(-1, 2).T.reshape(-1)

        def rows(name: str) -> NDArray[np.uint8]:
            return file.data(name).reshape(file.tensors[name].rows, -1)

        def unpermuted(name: str) -> NDArray[np.uint8]:
            heads = rows(name).reshape(-1, head_dim, rows(name).shape[1])
            return heads[:, rows_of_head].reshape(rows(name).shape)

        def fused(name: str, sources: list[str], parts: list[NDArray[np.uint8]]) -> Tensor:
            infos = [file.tensors[source] for source in sources]
            (kind,) = {info.type for info in infos}
            stacked = np.concatenate(parts)
            return name, (infos[0].columns, len(stacked)), kind, stacked.reshape(-1)

        tensors: list[Tensor] = []
        for name, info in file.tensors.items():
            if name.endswith("attn_q.weight"):
                block = name.removesuffix("attn_q.weight")
                q, k, v = (f"{block}attn_{part}.weight" for part in "qkv")
                parts = [unpermuted(q), unpermuted(k), rows(v)]
                tensors.append(fused(f"{block}attn_qkv.weight", [q, k, v], parts))
            elif name.endswith("ffn_gate.weight"):
                up = name.replace("ffn_gate", "ffn_up")
                tensors.append(fused(up, [name, up], [rows(name), rows(up)]))
            elif not name.endswith(("attn_k.weight", "attn_v.weight", "ffn_up.weight")):
                tensors.append((name, info.shape, info.type, file.data(name)))
        write_gguf(dst_path, metadata, tensors)
    return Path(dst_path)


def tokenizer_metadata(vocab: int) -> dict[str, Value]:
    """A gpt2 vocabulary of `vocab` tokens: 256 bytes, MERGES, SPECIALS, then unused ones."""
    tokens = list(_byte_alphabet()) + [merge.replace(" ", "") for merge in MERGES]
    types = [NORMAL] * len(tokens) + [CONTROL] * len(SPECIALS)
    ids = {text: len(tokens) + n for n, text in enumerate(SPECIALS)}
    tokens += SPECIALS
    n_unused = vocab - len(tokens)
    assert n_unused >= 0, f"at least {len(tokens)} tokens"
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens + [f"[PAD{n}]" for n in range(n_unused)],
        "tokenizer.ggml.token_type": np.array(types + [UNUSED] * n_unused, np.int32),
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.eot_token_id": ids["<|end|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }


def _byte_alphabet() -> Iterable[str]:
    """The printable stand-in of each byte in byte-level BPE: itself, or the next free one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    substitutes = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(substitutes)) for byte in range(256)]


def _geometry(
    arch: str,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    rope_dims: int | None,
    ffn: int,
    ctx: int,
) -> dict[str, Value]:
    return {
        "general.architecture": arch,
        "general.name": f"tiny random {arch}",
        f"{arch}.context_length": ctx,
        f"{arch}.embedding_length": heads * head_dim,
        f"{arch}.feed_forward_length": ffn,
        f"{arch}.block_count": layers,
        f"{arch}.attention.head_count": heads,
        f"{arch}.attention.head_count_kv": kv_heads,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.dimension_count": rope_dims or head_dim,
        f"{arch}.rope.freq_base": 10000.0,
    }


def _tensors(
    matrices: Iterable[Matrix], layers: int, width: int, vocab: int, tied: bool, types: Types, seed: int
) -> list[Tensor]:
    """Gaussian matrices; norm weights spread by a factor of 1.35, so that activations differ in size."""
    rng = np.random.default_rng(seed)
    norms = [f"blk.{n}.{kind}_norm" for n in range(layers) for kind in ("attn", "ffn")] + ["output_norm"]
    tensors: list[Tensor] = []
    for name in norms:
        weights = np.exp(0.3 * rng.standard_normal(width)).astype(np.float32)
        tensors.append((name + ".weight", (width,), GGMLType.F32, weights.view(np.uint8)))
    # A spread of 3 between logits; an embedding that is not also the output has entries of about 1.
    ends: list[Matrix] = [("token_embd", vocab, width, 3.0 if tied else width**0.5)]
    if not tied:
        ends.append(("output", vocab, width, 3.0))
    for name, rows, columns, spread in [*ends, *matrices]:
        x = rng.standard_normal((rows, columns)).astype(np.float32) * np.float32(spread / columns**0.5)
        kind = types
        if not isinstance(kind, str):
            kind = kind.get(name, kind.get(name.rpartition(".")[2], "F32"))
        assert columns % block_elements(kind) == 0, f"{kind} in rows of {columns}"
        tensors.append((name + ".weight", (columns, rows), GGMLType[kind], quantize_simple(kind, x)))
    return tensors
