"""Write a full-size synthetic Phi-3-mini-4k: its geometry and tensor types, random weights.

usage: python benchmarks/make_model.py OUT.gguf [--type q4_k_m|q4_0|q8_0|iq4_xs|iq4_nl] [--layers 32]

Speed and memory do not depend on the values of weights. The vocabulary is a small one padded to the model's
32064 entries, so that texts can be tokenised; what the model answers is noise. Needs as much memory as the
file is large: 2.4 GB for q4_k_m.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from blocks import block_elements, random_blocks
from models import tokenizer_metadata

from phi3c.gguf import GGMLType, write_gguf

D, FFN, HEADS, VOCAB, CONTEXT, WINDOW = 3072, 8192, 32, 32064, 4096, 2047
FILE_TYPE = {"q4_k_m": 15, "q4_0": 2, "q8_0": 7, "iq4_xs": 30, "iq4_nl": 25}
Tensor = tuple[str, tuple[int, ...], GGMLType, NDArray[np.uint8]]


def tensor_types(kind: str, name: str, layer: int, layers: int) -> str:
    """Type of a matrix; q4_k_m spends more bits where llama.cpp's rule of that name does."""
    if kind != "q4_k_m":
        return "Q6_K" if name == "output" and kind != "q8_0" else kind.upper()
    more_bits = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if name == "output" or (name == "ffn_down" and more_bits):
        return "Q6_K"
    return "Q5_K" if name == "attn_qkv" else "Q4_K"


def tensors(kind: str, layers: int) -> Iterator[Tensor]:
    """All tensors, in the order of the official files."""
    rng = np.random.default_rng(0)

    def matrix(prefix: str, name: str, columns: int, rows: int, layer: int = 0) -> Tensor:
        type_name = tensor_types(kind, name, layer, layers)
        data = random_blocks(type_name, rows * columns // block_elements(type_name), rng)
        return f"{prefix}{name}.weight", (columns, rows), GGMLType[type_name], data

    def norm(name: str) -> Tensor:
        return f"{name}.weight", (D,), GGMLType.F32, np.ones(D, np.float32).view(np.uint8)

    yield matrix("", "token_embd", D, VOCAB)
    for i in range(layers):
        blk = f"blk.{i}."
        yield norm(blk + "attn_norm")
        yield matrix(blk, "attn_qkv", D, 3 * D, i)
        yield matrix(blk, "attn_output", D, D, i)
        yield norm(blk + "ffn_norm")
        yield matrix(blk, "ffn_up", D, 2 * FFN, i)
        yield matrix(blk, "ffn_down", FFN, D, i)
    yield norm("output_norm")
    yield matrix("", "output", D, VOCAB)


def main() -> None:
    parser = argparse.ArgumentParser(description="write a synthetic Phi-3-mini")
    parser.add_argument("out", type=Path, metavar="OUT.gguf")
    parser.add_argument("--type", choices=FILE_TYPE, default="q4_k_m")
    parser.add_argument("--layers", type=int, default=32, metavar="N")
    args = parser.parse_args()
    metadata = {
        "general.architecture": "phi3",
        "general.name": "Synthetic mini model",  # llama.cpp expects tokens <unk> and <s> of a "Phi-3"
        "general.file_type": FILE_TYPE[args.type],
        "phi3.context_length": CONTEXT,
        "phi3.embedding_length": D,
        "phi3.feed_forward_length": FFN,
        "phi3.block_count": args.layers,
        "phi3.attention.head_count": HEADS,
        "phi3.attention.head_count_kv": HEADS,
        "phi3.attention.layer_norm_rms_epsilon": 1e-5,
        "phi3.attention.sliding_window": WINDOW,
        "phi3.rope.dimension_count": D // HEADS,
        **tokenizer_metadata(VOCAB),
    }
    write_gguf(args.out, metadata, tensors(args.type, args.layers))


if __name__ == "__main__":
    main()
