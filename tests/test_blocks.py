"""The NumPy blocks against the PyPI package `gguf`, which shares no code with them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from blocks import (
    FLOAT_TYPES,
    LAYOUTS,
    QUANT_TYPES,
    block_bytes,
    block_elements,
    dequantize,
    quantize_simple,
    random_blocks,
)

N_BLOCKS = 300


@pytest.mark.parametrize("type_name", LAYOUTS)
def test_block_sizes_are_those_of_the_format(type_name: str) -> None:
    expected = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[type_name]]
    assert (block_elements(type_name), block_bytes(type_name)) == expected


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("type_name", LAYOUTS)
def test_dequantize_equals_gguf_bit_for_bit(type_name: str, extreme: bool) -> None:
    data = random_blocks(type_name, N_BLOCKS, np.random.default_rng(1), extreme=extreme)
    ours = dequantize(type_name, data, N_BLOCKS * block_elements(type_name))
    theirs = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[type_name]).reshape(-1)
    assert np.isfinite(ours).all()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.astype(np.float32).view(np.uint32))


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantize_equals_gguf_byte_for_byte(type_name: str) -> None:
    x = np.random.default_rng(2).standard_normal((N_BLOCKS, 32), np.float32)
    x[0] = 0
    theirs = gguf.quants.quantize(x, gguf.GGMLQuantizationType[type_name])
    np.testing.assert_array_equal(quantize_simple(type_name, x), theirs.reshape(-1).view(np.uint8))


# Relative RMS error of uniform rounding over the range of 16 or 32 Gaussian weights, about -2 to 2, is
# step / sqrt(12); a third on top because scales are rounded too. IQ4's 15 uneven steps are held to the same.
@pytest.mark.parametrize(
    ("type_name", "steps"),
    [("Q2_K", 3), ("Q3_K", 6), ("Q4_K", 15), ("Q5_K", 31), ("Q6_K", 62), ("IQ4_NL", 15), ("IQ4_XS", 15)],
)
def test_quantizers_without_a_twin_lose_no_more_than_their_step(type_name: str, steps: int) -> None:
    x = np.random.default_rng(3).standard_normal(64 * 256).astype(np.float32)
    x[:256] = 0
    restored = dequantize(type_name, quantize_simple(type_name, x), x.size)
    error = np.sqrt(np.mean((restored - x) ** 2) / np.mean(x**2))
    assert error < 4 / 3 * (4 / steps) / np.sqrt(12)
    assert not restored[:256].any()


@pytest.mark.parametrize("type_name", QUANT_TYPES)
def test_random_blocks_use_every_byte(type_name: str) -> None:
    blocks = random_blocks(type_name, 4000, np.random.default_rng(4)).view(LAYOUTS[type_name])
    codes = blocks["ql" if type_name == "Q6_K" else "qs"]
    assert len(np.unique(codes)) == 256


@pytest.mark.parametrize("type_name", [*FLOAT_TYPES, *QUANT_TYPES])
def test_extreme_blocks_reach_both_ends(type_name: str) -> None:
    data = random_blocks(type_name, N_BLOCKS, np.random.default_rng(5), extreme=True)
    values = np.abs(dequantize(type_name, data, N_BLOCKS * block_elements(type_name)))
    assert values.max() >= 65000
    assert values[values > 0].min() <= 2.0**-23
