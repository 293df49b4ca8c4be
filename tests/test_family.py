"""Every model of the Phi-3 family, in its real shape: what its file says, and what that means.

The files are sparse: they hold headers, rotary factors, and otherwise holes as large as the weights would be.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from phi3c.config import Config
from phi3c.packed import ModelFile
from phi3c.phi3 import kv_bytes_per_token, rope_frequencies

SHORT = tuple(1 + j / 64 for j in range(64))  # stand-ins of LongRoPE's factors, exact in float32
LONG = tuple(1 + j * j / 64 for j in range(64))
VINTAGE = {"April": SHORT, "July": tuple(1 + j / 128 for j in range(64))}  # the short ones were changed once
EPS = float(np.float32(1e-5))
ATTN_FACTOR = float(np.float32(1.190238))


@dataclass(frozen=True)
class Shape:
    """Tensors of a file, by (name, columns, rows); rows 0: a vector."""

    layers: int
    d: int
    q: int
    kv: int
    ffn: int
    vocab: int
    factors: int = 0
    tied: bool = False
    is_split: bool = False  # q, k, v apart, gate and up apart: how llama files have it
    qkv_apart: bool = False

    def tensors(self) -> Iterator[tuple[str, int, int]]:
        d = self.d
        yield "token_embd", d, self.vocab
        for i in range(self.layers):
            block = f"blk.{i}."
            yield block + "attn_norm", d, 0
            if self.is_split or self.qkv_apart:
                yield block + "attn_q", d, self.q
                yield block + "attn_k", d, self.kv
                yield block + "attn_v", d, self.kv
            else:
                yield block + "attn_qkv", d, self.q + 2 * self.kv
            yield block + "attn_output", self.q, d
            yield block + "ffn_norm", d, 0
            if self.is_split:
                yield block + "ffn_gate", d, self.ffn
                yield block + "ffn_up", d, self.ffn
            else:
                yield block + "ffn_up", d, 2 * self.ffn
            yield block + "ffn_down", self.ffn, d
        yield "output_norm", d, 0
        if not self.tied:
            yield "output", d, self.vocab
        for name in ("long", "short") if self.factors else ():
            yield f"rope_factors_{name}", self.factors, 0


@dataclass(frozen=True)
class Row:
    """A model's file, and what is expected of it."""

    keys: dict[str, int | float]  # in the metadata, under the architecture
    shape: Shape
    n_tensors: int
    n_parameters: int
    kv_bytes: int  # of a token, f16
    config: Config
    architecture: str = "phi3"
    name: str = "Phi3"
    short: tuple[float, ...] = SHORT
    types: dict[str, str] = field(default_factory=dict)  # of some tensors; the others are Q4_K


def geometry(
    layers: int, d: int, ffn: int, heads: int, kv_heads: int, rope_dims: int, context: int
) -> dict[str, int | float]:
    return {
        "context_length": context,
        "embedding_length": d,
        "feed_forward_length": ffn,
        "block_count": layers,
        "attention.head_count": heads,
        "attention.head_count_kv": kv_heads,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": rope_dims,
    }


MINI = Config(
    architecture="phi3",
    name="Phi3",
    block_count=32,
    embedding_length=3072,
    feed_forward_length=8192,
    head_count=32,
    head_count_kv=32,
    head_dim=96,
    rope_dimension_count=96,
    rope_freq_base=10000.0,
    rope_factors_short=None,
    rope_factors_long=None,
    rope_attn_factor=1.0,
    layer_norm_rms_epsilon=EPS,
    context_length=4096,
    original_context_length=4096,
    sliding_window=2047,
    vocab_size=32064,
    tied=False,
    file_type=15,
)
MEDIUM = replace(
    MINI,
    block_count=40,
    embedding_length=5120,
    feed_forward_length=17920,
    head_count=40,
    head_count_kv=10,
    head_dim=128,
    rope_dimension_count=128,
)
MINI_KEYS = geometry(32, 3072, 8192, 32, 32, 96, 4096)
MEDIUM_KEYS = geometry(40, 5120, 17920, 40, 10, 128, 4096)
MINI_SHAPE = Shape(32, 3072, 3072, 3072, 8192, 32064)
MEDIUM_SHAPE = Shape(40, 5120, 5120, 1280, 17920, 32064)
N_MINI, N_MEDIUM, N_PHI4, N_PHI4_MINI = 3_821_079_552, 13_960_238_080, 14_659_507_200, 3_836_021_760

EXTENDED = {
    "context_length": 131072,
    "rope.scaling.original_context_length": 4096,
    "rope.scaling.attn_factor": 1.190238,
}
MINI_128K = Row(
    MINI_KEYS | EXTENDED,
    replace(MINI_SHAPE, factors=48),
    197,
    N_MINI + 96,
    393216,
    replace(
        MINI,
        context_length=131072,
        rope_factors_short=SHORT[:48],
        rope_factors_long=LONG[:48],
        rope_attn_factor=ATTN_FACTOR,
        sliding_window=None,
    ),
)
MEDIUM_128K = Row(
    MEDIUM_KEYS | EXTENDED | {"attention.sliding_window": 131072, "rope.freq_base": 10000.0},
    replace(MEDIUM_SHAPE, factors=64),
    245,
    N_MEDIUM + 128,
    204800,
    replace(
        MEDIUM,
        context_length=131072,
        rope_factors_short=SHORT,
        rope_factors_long=LONG,
        rope_attn_factor=ATTN_FACTOR,
        sliding_window=None,
    ),
)
PHI4 = Row(
    MEDIUM_KEYS | {"context_length": 16384, "rope.freq_base": 250000.0, "attention.sliding_window": 0},
    replace(MEDIUM_SHAPE, vocab=100352),
    243,
    N_PHI4,
    204800,
    replace(
        MEDIUM,
        context_length=16384,
        original_context_length=16384,
        rope_freq_base=250000.0,
        sliding_window=None,
        vocab_size=100352,
    ),
)

# The types of the official Phi-3-mini-4k-instruct-q4.gguf, whose data are 2 392 493 568 bytes.
OFFICIAL_TYPES = {"attn_qkv": "Q5_K", "output": "Q6_K"} | {
    f"blk.{i}.ffn_down": "Q6_K" for i in (0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31)
}

FAMILY = {
    "Phi-3-mini-4k, official": Row(MINI_KEYS, MINI_SHAPE, 195, N_MINI, 393216, MINI, types=OFFICIAL_TYPES),
    "Phi-3-mini-4k, July 2024": Row(
        MINI_KEYS
        | {
            "rope.scaling.original_context_length": 4096,
            "rope.freq_base": 10000.0,
            "attention.sliding_window": 2047,
        },
        MINI_SHAPE,
        195,
        N_MINI,
        393216,
        replace(MINI, name="Phi 3.1 Mini 4k Instruct"),
        name="Phi 3.1 Mini 4k Instruct",
    ),
    "Phi-3-mini-4k, April 2024": Row(
        MINI_KEYS | {"rope.freq_base": 10000.0},
        replace(MINI_SHAPE, is_split=True),
        291,
        N_MINI,
        393216,
        replace(MINI, architecture="llama", name="LLaMA v2"),
        architecture="llama",
        name="LLaMA v2",
    ),
    "Phi-3-medium-4k": Row(
        MEDIUM_KEYS | {"rope.scaling.original_context_length": 4096, "attention.sliding_window": 2047},
        MEDIUM_SHAPE,
        243,
        N_MEDIUM,
        204800,
        MEDIUM,
    ),
    "Phi-3-medium-4k without the window": Row(MEDIUM_KEYS, MEDIUM_SHAPE, 243, N_MEDIUM, 204800, MEDIUM),
    "Phi-3-mini-128k, April 2024": replace(MINI_128K, short=VINTAGE["April"]),
    "Phi-3-mini-128k, July 2024": replace(
        MINI_128K,
        keys=MINI_128K.keys | {"attention.sliding_window": 262144},
        short=VINTAGE["July"],
        config=replace(MINI_128K.config, rope_factors_short=VINTAGE["July"][:48]),
    ),
    "Phi-3-mini-128k without attn_factor": replace(
        MINI_128K,
        keys={key: value for key, value in MINI_128K.keys.items() if "attn_factor" not in key},
        config=replace(MINI_128K.config, rope_attn_factor=pytest.approx(1.1902380714238083, rel=1e-15)),
    ),
    "Phi-3-mini-128k, converted before the factors": replace(
        MINI_128K,
        keys=MINI_KEYS | {"context_length": 131072},
        shape=MINI_SHAPE,
        n_tensors=195,
        n_parameters=N_MINI,
        config=replace(MINI, context_length=131072, original_context_length=131072, sliding_window=None),
    ),
    "Phi-3.5-mini": replace(
        MINI_128K,
        keys=MINI_128K.keys | {"attention.sliding_window": 262144, "rope.freq_base": 10000.0},
        config=replace(MINI_128K.config, name="Phi 3.5 Mini Instruct"),
        name="Phi 3.5 Mini Instruct",
    ),
    "Phi-3-medium-128k": MEDIUM_128K,
    "Phi-4": PHI4,
    "Phi-4, window 131072": replace(PHI4, keys=PHI4.keys | {"attention.sliding_window": 131072}),
    "Phi-4-reasoning": replace(
        PHI4,
        keys=PHI4.keys | {"context_length": 32768, "rope.freq_base": 500000.0},
        config=replace(
            PHI4.config, context_length=32768, original_context_length=32768, rope_freq_base=500000.0
        ),
    ),
    "Phi-4-mini": Row(
        geometry(32, 3072, 8192, 24, 8, 96, 131072)
        | EXTENDED
        | {"rope.freq_base": 10000.0, "attention.sliding_window": 262144},
        Shape(32, 3072, 3072, 1024, 8192, 200064, factors=48, tied=True),
        196,
        N_PHI4_MINI + 96,
        131072,
        replace(
            MINI_128K.config,
            name="Phi 4 Mini Instruct",
            head_count=24,
            head_count_kv=8,
            head_dim=128,
            vocab_size=200064,
            tied=True,
        ),
        name="Phi 4 Mini Instruct",
        types={"token_embd": "Q6_K"},
    ),
    "a fine-tune with q, k, v apart": replace(
        MINI_128K,
        shape=replace(MINI_128K.shape, qkv_apart=True),
        n_tensors=197 + 2 * 32,
    ),
    "a fine-tune of 24 layers": Row(
        MINI_KEYS | {"block_count": 24},
        replace(MINI_SHAPE, layers=24, vocab=32011),
        147,
        3072 + 2 * 32011 * 3072 + 24 * (2 * 3072 + 4 * 3072**2 + 3 * 3072 * 8192),
        294912,
        replace(MINI, block_count=24, vocab_size=32011, sliding_window=None),
    ),
}


def write_sparse(path: Path, row: Row) -> int:
    """Write the file, holes for weights; returns the bytes of its tensors."""
    writer = gguf.GGUFWriter(path, row.architecture)
    writer.add_name(row.name)
    writer.add_file_type(15)
    for key, value in row.keys.items():
        add = writer.add_uint32 if isinstance(value, int) else writer.add_float32
        add(f"{row.architecture}.{key}", value)
    n_bytes = 0
    for name, columns, rows in row.shape.tensors():
        kind = "F32" if rows == 0 else row.types.get(name, row.types.get(name.rpartition(".")[2], "Q4_K"))
        ggml_type = gguf.GGMLQuantizationType[kind]
        block, block_bytes = gguf.GGML_QUANT_SIZES[ggml_type]
        size = columns * max(rows, 1) // block * block_bytes
        shape = (rows, columns) if rows else (columns,)
        writer.add_tensor_info(name + ".weight", shape, np.dtype(np.float32), size, ggml_type)
        n_bytes += size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    header = -(-path.stat().st_size // 32) * 32  # every tensor is a multiple of 32 bytes long
    with path.open("r+b") as file:
        file.truncate(header + n_bytes)
        if row.shape.factors:  # long, then short, behind all else
            file.seek(-2 * 4 * row.shape.factors, os.SEEK_END)
            for factors in (LONG, row.short):
                file.write(np.array(factors[: row.shape.factors], "<f4").tobytes())
    return n_bytes


@pytest.mark.parametrize("row", FAMILY.values(), ids=FAMILY.keys())
def test_model(tmp_path: Path, row: Row) -> None:
    n_bytes = write_sparse(tmp_path / "model.gguf", row)
    with ModelFile(tmp_path / "model.gguf") as file:
        config = Config.from_gguf(file)
        tensors = file.tensors.values()
        assert len(tensors) == row.n_tensors
        assert sum(tensor.columns * tensor.rows for tensor in tensors) == row.n_parameters
        assert sum(tensor.n_bytes for tensor in tensors) == n_bytes
    assert config == row.config
    assert kv_bytes_per_token(config, "f16") == row.kv_bytes
    if row.types is OFFICIAL_TYPES:
        assert n_bytes == 2_392_493_568


def test_frequencies_of_phi_4_mini(tmp_path: Path) -> None:
    """The exponent counts rotated dimensions, 96, not those of a head, 128; factors divide."""
    write_sparse(tmp_path / "model.gguf", FAMILY["Phi-4-mini"])
    with ModelFile(tmp_path / "model.gguf") as file:
        frequencies = rope_frequencies(Config.from_gguf(file))
    trained = 10000.0 ** (-np.arange(48) / 48)
    expected = [trained / SHORT[:48], trained / LONG[:48]]
    np.testing.assert_allclose(frequencies, expected, rtol=1e-15)
