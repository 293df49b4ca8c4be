"""GGUF blocks in plain NumPy: an independent reference for the C kernels.

Each type is a structured dtype, so a run of blocks is an array and a field of all blocks is a column.
Fields: `d` scale, `m` minimum, `dmin` scale of minima, `qs` and `ql` low bits, `qh` and `hmask` high bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
F32 = NDArray[np.float32]
Blocks = NDArray[np.void]
Codes = NDArray[np.integer[Any]]
Fields = dict[str, NDArray[Any]]

LAYOUTS: dict[str, np.dtype[np.void]] = {
    "F32": np.dtype([("x", "<f4")]),
    "F16": np.dtype([("x", "<f2")]),
    "BF16": np.dtype([("x", "<u2")]),
    "Q4_0": np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
    "Q4_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qs", "u1", 16)]),
    "Q5_0": np.dtype([("d", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q5_1": np.dtype([("d", "<f2"), ("m", "<f2"), ("qh", "u1", 4), ("qs", "u1", 16)]),
    "Q8_0": np.dtype([("d", "<f2"), ("qs", "i1", 32)]),
    "Q2_K": np.dtype([("scales", "u1", 16), ("qs", "u1", 64), ("d", "<f2"), ("dmin", "<f2")]),
    "Q3_K": np.dtype([("hmask", "u1", 32), ("qs", "u1", 64), ("scales", "u1", 12), ("d", "<f2")]),
    "Q4_K": np.dtype([("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qs", "u1", 128)]),
    "Q5_K": np.dtype(
        [("d", "<f2"), ("dmin", "<f2"), ("scales", "u1", 12), ("qh", "u1", 32), ("qs", "u1", 128)]
    ),
    "Q6_K": np.dtype([("ql", "u1", 128), ("qh", "u1", 64), ("scales", "i1", 16), ("d", "<f2")]),
    "IQ4_NL": np.dtype([("d", "<f2"), ("qs", "u1", 16)]),
    "IQ4_XS": np.dtype([("d", "<f2"), ("scales_h", "<u2"), ("scales_l", "u1", 4), ("qs", "u1", 128)]),
}
FLOAT_TYPES = ("F32", "F16", "BF16")
QUANT_TYPES = tuple(name for name in LAYOUTS if name not in FLOAT_TYPES)
TYPES_OF_32 = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")


def block_elements(type_name: str) -> int:
    """Weights per block: 1 for float types, 32 for TYPES_OF_32, 256 for K types and IQ4_XS."""
    return 1 if type_name in FLOAT_TYPES else 32 if type_name in TYPES_OF_32 else 256


def block_bytes(type_name: str) -> int:
    return LAYOUTS[type_name].itemsize


def dequantize(type_name: str, data: U8, n_elements: int) -> F32:
    """The float32 weights that `data` (uint8, whole blocks) stands for, each rounded once per operation."""
    blocks = np.ascontiguousarray(data, np.uint8).reshape(-1).view(LAYOUTS[type_name])
    assert len(blocks) * block_elements(type_name) == n_elements
    return _DEQUANTIZE[type_name](blocks).reshape(-1)


def quantize_simple(type_name: str, x: F32) -> U8:
    """Round `x` (any shape, whole blocks) to the nearest code.

    Legacy types follow the format's own formula. K types and IQ4 take each sub-block's range as it is,
    without the search for better scales that real quantisers do: a little more error, the same kind of
    weights.
    """
    values = np.ascontiguousarray(x, np.float32).reshape(-1, block_elements(type_name))
    fields = _QUANTIZE[type_name](values)
    blocks = np.empty(len(values), LAYOUTS[type_name])
    for name, field in fields.items():
        blocks[name] = field
    return blocks.view(np.uint8)


def random_blocks(type_name: str, n_blocks: int, rng: np.random.Generator, *, extreme: bool = False) -> U8:
    """Bytes of `n_blocks` random blocks: every code occurs, every value is finite.

    Args:
        extreme: scales at the ends of half precision (zero of both signs, subnormal, largest) and, in two
            blocks of three, codes all zero or all at their maximum. Float types get the same range of values.
    """
    layout = LAYOUTS[type_name]
    raw = rng.integers(0, 256, (n_blocks, layout.itemsize), dtype=np.uint8)
    if extreme:
        fill = rng.integers(0, 3, n_blocks)
        raw[fill == 1] = 0
        raw[fill == 2] = 255
    blocks = raw.reshape(-1).view(layout)
    for name in layout.names or ():
        if name in ("x", "d", "m", "dmin"):
            scales = (_extreme_scales if extreme else _ordinary_scales)(type_name, n_blocks, rng)
            blocks[name] = _to_bf16(scales) if type_name == "BF16" else scales
    return raw.reshape(-1)


# P16: fields in packed order, and how each interleaves 16 rows (docs/formats.md).
PANELS: dict[str, list[tuple[str, str]]] = {
    "F32": [("x", "U32")],
    "F16": [("x", "U16")],
    "BF16": [("x", "U16")],
    "Q4_0": [("d", "U16"), ("qs", "U32")],
    "Q4_1": [("d", "U16"), ("m", "U16"), ("qs", "U32")],
    "Q5_0": [("d", "U16"), ("qh", "BIT32"), ("qs", "U32")],
    "Q5_1": [("d", "U16"), ("m", "U16"), ("qh", "BIT32"), ("qs", "U32")],
    "Q8_0": [("d", "U16"), ("qs", "S32")],
    "Q2_K": [("d", "U16"), ("dmin", "U16"), ("scales", "U8"), ("qs", "U32")],
    "Q3_K": [("d", "U16"), ("scales", "SCALES"), ("hmask", "U32"), ("qs", "U32")],
    "Q4_K": [("d", "U16"), ("dmin", "U16"), ("scales", "SCALES_MINS"), ("qs", "U32")],
    "Q5_K": [("d", "U16"), ("dmin", "U16"), ("scales", "SCALES_MINS"), ("qh", "U32"), ("qs", "U32")],
    "Q6_K": [("d", "U16"), ("scales", "U8"), ("qh", "U32"), ("ql", "U32")],
    "IQ4_NL": [("d", "U16"), ("qs", "U32")],
    "IQ4_XS": [("d", "U16"), ("scales_h", "U16"), ("scales_l", "U8"), ("qs", "U32")],
}


def panels(type_name: str, data: U8, rows: int) -> U8:
    """The P16 panels of rows of blocks."""
    blocks = data.view(LAYOUTS[type_name]).reshape(rows, -1)
    blocks = np.concatenate([blocks, np.zeros((-rows % 16, blocks.shape[1]), blocks.dtype)])
    per_super = 256 // block_elements(type_name)
    pieces = [
        _INTERLEAVED[how](
            np.ascontiguousarray(blocks[panel : panel + 16, block][name]).view(np.uint8).reshape(16, -1)
        )
        for panel in range(0, len(blocks), 16)
        for start in range(0, blocks.shape[1], per_super)
        for name, how in PANELS[type_name]
        for block in range(start, min(start + per_super, blocks.shape[1]))
    ]
    return np.concatenate([piece.ravel() for piece in pieces])


def _lanes(size: int) -> Callable[[U8], U8]:
    """(16 rows, bytes) -> (n, 16 rows, size)."""
    return lambda field: field.reshape(16, -1, size).swapaxes(0, 1)


def _spread_bits(field: U8) -> U8:
    bits = np.unpackbits(field, axis=1, bitorder="little").reshape(16, 8, 4)  # bit 4 g + i at [g, i]
    return np.packbits(bits.swapaxes(1, 2), axis=2, bitorder="little")


def _planes(values: Codes) -> U8:
    low = values[:128] & 15 | (values[128:] & 15) << 4
    high = sum(values[64 * i : 64 * i + 64] >> 4 << 2 * i for i in range(4))
    return np.concatenate([low, high]).astype(np.uint8)


def _scales_and_mins_in_planes(field: U8) -> U8:
    scales, mins = (codes.astype(np.int64) for codes in _scales_and_mins(field))
    pairs = mins.reshape(16, 4, 2).swapaxes(0, 1)  # [p][row][i]
    return _planes(np.concatenate([scales.T.ravel(), pairs.ravel()]))


_INTERLEAVED: dict[str, Callable[[U8], U8]] = {
    "U8": _lanes(1),
    "U16": _lanes(2),
    "U32": _lanes(4),
    "S32": lambda field: _lanes(4)(field ^ np.uint8(0x80)),
    "BIT32": _spread_bits,
    "SCALES": lambda field: _planes((_scales_q3(field) + 32).astype(np.int64).T.ravel()),
    "SCALES_MINS": _scales_and_mins_in_planes,
}


def _extreme_scales(type_name: str, n: int, rng: np.random.Generator) -> F32:
    magnitudes = np.array([0, 2.0**-24, 1023 * 2.0**-24, 2.0**-14, 1, 65504], np.float32)
    return rng.choice(np.concatenate([magnitudes, -magnitudes]), n)


def _ordinary_scales(type_name: str, n: int, rng: np.random.Generator) -> F32:
    """Of both signs, and such that a weight is about 0.02 whatever the type's range of codes."""
    if type_name in FLOAT_TYPES:
        return (0.02 * rng.standard_normal(n)).astype(np.float32)
    k_codes = {"Q2_K": 15 * 3, "Q3_K": 32 * 4, "Q4_K": 63 * 15, "Q5_K": 63 * 31, "Q6_K": 128 * 32}
    largest_code = {"Q8_0": 128, **k_codes, "IQ4_NL": 127, "IQ4_XS": 32 * 127}
    signs = rng.choice(np.array([-1, 1], np.float32), n)
    return (signs * rng.uniform(0.01, 0.05, n) / largest_code.get(type_name, 16)).astype(np.float32)


# Fields to codes. Every function takes and gives arrays whose first axis is the block.


def _column(field: NDArray[Any]) -> F32:
    return field.astype(np.float32)[:, None]


def _unpack(packed: Codes, bits: int, run: int) -> Codes:
    """Codes of `bits` bits in order: each run of bytes holds its lowest bits first, then the next ones."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = packed.reshape(len(packed), -1, 1, run)
    return (runs >> shifts & (1 << bits) - 1).reshape(len(packed), -1)


def _pack(codes: Codes, bits: int, run: int) -> Codes:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    runs = codes.astype(np.uint8).reshape(len(codes), -1, 8 // bits, run)
    return np.asarray(np.bitwise_or.reduce(runs << shifts, axis=2).reshape(len(codes), -1))


def _scales_and_mins(packed: Codes) -> tuple[F32, F32]:
    """Eight 6-bit scales and eight 6-bit minima out of the 12 bytes of Q4_K and Q5_K."""
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.hstack([first & 63, third & 15 | first >> 6 << 4])
    mins = np.hstack([second & 63, third >> 4 | second >> 6 << 4])
    return scales.astype(np.float32), mins.astype(np.float32)


def _pack_scales_and_mins(scales: Codes, mins: Codes) -> Codes:
    first = scales[:, :4] | scales[:, 4:] >> 4 << 6
    second = mins[:, :4] | mins[:, 4:] >> 4 << 6
    third = scales[:, 4:] & 15 | (mins[:, 4:] & 15) << 4
    return np.hstack([first, second, third])


def _scales_q3(packed: Codes) -> F32:
    """Sixteen 6-bit scales, offset by 32: 4 low bits in 8 bytes, 2 high bits in 4."""
    return (_unpack(packed[:, :8], 4, 8) | _unpack(packed[:, 8:], 2, 4) << 4).astype(np.float32) - 32


def _pack_scales_q3(codes: Codes) -> Codes:
    return np.hstack([_pack(codes & 15, 4, 8), _pack(codes >> 4, 2, 4)])


def _codes_q5(blocks: Blocks) -> F32:
    """Codes of Q5_0 and Q5_1: nibbles, and 32 fifth bits in plain order."""
    return (_unpack(blocks["qs"], 4, 16) | _unpack(blocks["qh"], 1, 1) << 4).astype(np.float32)


def _scaled(d: F32, scales: F32, codes: F32) -> F32:
    """d * scale * code; a scale per sub-block, as many sub-blocks as `scales` has columns."""
    sub_blocks = codes.reshape(*scales.shape, -1)
    return (d * scales)[:, :, None] * sub_blocks


def _affine(blocks: Blocks, scales: F32, mins: F32, codes: Codes) -> F32:
    offsets = _column(blocks["dmin"]) * mins
    return _scaled(_column(blocks["d"]), scales, codes.astype(np.float32)) - offsets[:, :, None]


def _dequantize_q4_k(blocks: Blocks) -> F32:
    return _affine(blocks, *_scales_and_mins(blocks["scales"]), _unpack(blocks["qs"], 4, 32))


def _dequantize_q5_k(blocks: Blocks) -> F32:
    codes = _unpack(blocks["qs"], 4, 32) | _unpack(blocks["qh"], 1, 32) << 4
    return _affine(blocks, *_scales_and_mins(blocks["scales"]), codes)


def _dequantize_q2_k(blocks: Blocks) -> F32:
    scales = (blocks["scales"] & 15).astype(np.float32)
    mins = (blocks["scales"] >> 4).astype(np.float32)
    return _affine(blocks, scales, mins, _unpack(blocks["qs"], 2, 32))


def _dequantize_q3_k(blocks: Blocks) -> F32:
    low = _unpack(blocks["qs"], 2, 32).astype(np.float32)
    high = _unpack(blocks["hmask"], 1, 32).astype(np.float32)
    return _scaled(_column(blocks["d"]), _scales_q3(blocks["scales"]), low + 4 * high - 4)


def _dequantize_q6_k(blocks: Blocks) -> F32:
    # A half of the block (128 codes) has 64 bytes of low nibbles and 32 bytes of four 2-bit fields.
    codes = _unpack(blocks["ql"], 4, 64) | _unpack(blocks["qh"], 2, 32) << 4
    scales = blocks["scales"].astype(np.float32)
    return _scaled(_column(blocks["d"]), scales, codes.astype(np.float32) - 32)


IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)


def _dequantize_iq4_xs(blocks: Blocks) -> F32:
    low = _unpack(blocks["scales_l"], 4, 1)
    high = blocks["scales_h"][:, None] >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    scales = (low | high << 4).astype(np.float32) - 32
    return _scaled(_column(blocks["d"]), scales, IQ4_VALUES[_unpack(blocks["qs"], 4, 16)])


_DEQUANTIZE: dict[str, Callable[[Blocks], F32]] = {
    "F32": lambda b: b["x"].astype(np.float32),
    "F16": lambda b: b["x"].astype(np.float32),
    "BF16": lambda b: (b["x"].astype(np.uint32) << 16).view(np.float32),
    "Q4_0": lambda b: _column(b["d"]) * (_unpack(b["qs"], 4, 16).astype(np.float32) - 8),
    "Q4_1": lambda b: _column(b["d"]) * _unpack(b["qs"], 4, 16) + _column(b["m"]),
    "Q5_0": lambda b: _column(b["d"]) * (_codes_q5(b) - 16),
    "Q5_1": lambda b: _column(b["d"]) * _codes_q5(b) + _column(b["m"]),
    "Q8_0": lambda b: _column(b["d"]) * b["qs"],
    "Q2_K": _dequantize_q2_k,
    "Q3_K": _dequantize_q3_k,
    "Q4_K": _dequantize_q4_k,
    "Q5_K": _dequantize_q5_k,
    "Q6_K": _dequantize_q6_k,
    "IQ4_NL": lambda b: _column(b["d"]) * IQ4_VALUES[_unpack(b["qs"], 4, 16)],
    "IQ4_XS": _dequantize_iq4_xs,
}


def _to_bf16(x: F32) -> Codes:
    """Round to nearest, ties to even, on the 16 bits that are dropped; finite `x` only."""
    bits = x.view(np.uint32)
    return (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)


def _ratio(x: F32, d: F32) -> F32:
    """x / d, and 0 where d is 0."""
    return np.divide(x, d, out=np.zeros(np.broadcast_shapes(x.shape, d.shape), np.float32), where=d != 0)


def _inverse(d: F32) -> F32:
    return _ratio(np.ones_like(d), d)


def _symmetric(x: F32, top: int) -> tuple[F32, Codes]:
    """Scale and codes 0 .. 2 * top - 1 around `top`; the value of largest magnitude becomes code 0."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    d = extreme / np.float32(-top)
    codes = np.trunc(x * _inverse(d) + np.float32(top + 0.5))
    return d[:, 0], np.clip(codes, 0, 2 * top - 1).astype(np.uint8)


def _asymmetric(x: F32, top: int) -> tuple[F32, F32, Codes]:
    """Scale, minimum and codes 0 .. top."""
    low = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(top)
    codes = np.trunc((x - low) * _inverse(d) + np.float32(0.5))
    return d[:, 0], low[:, 0], np.clip(codes, 0, top).astype(np.uint8)


def _quantize_legacy(x: F32, top: int, *, minimum: bool) -> Fields:
    """Q4_0, Q4_1, Q5_0, Q5_1: `top` is the largest code."""
    fields: Fields = {}
    if minimum:
        fields["d"], fields["m"], codes = _asymmetric(x, top)
    else:
        fields["d"], codes = _symmetric(x, (top + 1) // 2)
    fields["qs"] = _pack(codes & 15, 4, 16)
    if top == 31:
        fields["qh"] = _pack(codes >> 4, 1, 1)
    return fields


def _quantize_q8_0(x: F32) -> Fields:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    away_from_zero = np.trunc(scaled + np.copysign(np.float32(0.5), scaled))
    return {"d": d[:, 0], "qs": away_from_zero.astype(np.int8)}


def _half(x: F32) -> F32:
    return x.astype(np.float16).astype(np.float32)


def _range_codes(x: F32, n_sub_blocks: int, top: int, scale_top: int) -> tuple[F32, F32, Codes, Codes, Codes]:
    """d, dmin, scale codes, minimum codes and codes 0 .. top, for w = d * scale * code - dmin * minimum."""
    sub_blocks = x.reshape(len(x), n_sub_blocks, -1)
    low = np.minimum(sub_blocks.min(axis=2), 0)
    ranges = (np.maximum(sub_blocks.max(axis=2), 0) - low) / np.float32(top)
    d = _half(ranges.max(axis=1, keepdims=True) / np.float32(scale_top))
    dmin = _half(-low.min(axis=1, keepdims=True) / np.float32(scale_top))
    scales = np.clip(np.rint(_ratio(ranges, d)), 0, scale_top)
    mins = np.clip(np.rint(_ratio(-low, dmin)), 0, scale_top)
    shifted = sub_blocks + (dmin * mins)[:, :, None]
    codes = np.clip(np.rint(_ratio(shifted, (d * scales)[:, :, None])), 0, top)
    as_bytes = [a.astype(np.uint8) for a in (scales, mins, codes.reshape(len(x), -1))]
    return d[:, 0], dmin[:, 0], as_bytes[0], as_bytes[1], as_bytes[2]


def _centred_codes(x: F32, top: int, scale_top: int) -> tuple[F32, Codes, Codes]:
    """d, sixteen scale codes and codes 0 .. 2 * top - 1, for w = d * scale * (code - top)."""
    groups = x.reshape(len(x), 16, 16)
    largest = np.abs(groups).max(axis=2) / np.float32(top - 1)
    d = _half(largest.max(axis=1, keepdims=True) / np.float32(scale_top))
    scales = np.clip(np.rint(_ratio(largest, d)), 0, scale_top)
    codes = np.clip(np.rint(_ratio(groups, (d * scales)[:, :, None])), -top, top - 1) + top
    return d[:, 0], scales.astype(np.int8), codes.reshape(len(x), -1).astype(np.uint8)


def _quantize_q2_k(x: F32) -> Fields:
    d, dmin, scales, mins, codes = _range_codes(x, 16, 3, 15)
    return {"d": d, "dmin": dmin, "scales": scales | mins << 4, "qs": _pack(codes, 2, 32)}


def _quantize_q3_k(x: F32) -> Fields:
    d, scales, codes = _centred_codes(x, 4, 31)
    return {
        "d": d,
        "scales": _pack_scales_q3(scales.astype(np.uint8) + 32),
        "qs": _pack(codes & 3, 2, 32),
        "hmask": _pack(codes >> 2, 1, 32),
    }


def _quantize_q4_k(x: F32) -> Fields:
    d, dmin, scales, mins, codes = _range_codes(x, 8, 15, 63)
    packed = _pack_scales_and_mins(scales, mins)
    return {"d": d, "dmin": dmin, "scales": packed, "qs": _pack(codes, 4, 32)}


def _quantize_q5_k(x: F32) -> Fields:
    d, dmin, scales, mins, codes = _range_codes(x, 8, 31, 63)
    return {
        "d": d,
        "dmin": dmin,
        "scales": _pack_scales_and_mins(scales, mins),
        "qs": _pack(codes & 15, 4, 32),
        "qh": _pack(codes >> 4, 1, 32),
    }


def _quantize_q6_k(x: F32) -> Fields:
    d, scales, codes = _centred_codes(x, 32, 127)
    return {
        "d": d,
        "scales": scales,
        "ql": _pack(codes & 15, 4, 64),
        "qh": _pack(codes >> 4, 2, 32),
    }


def _nearest_iq4(x: F32) -> Codes:
    """The code of the value nearest to x."""
    return np.searchsorted((IQ4_VALUES[1:] + IQ4_VALUES[:-1]) / 2, x).astype(np.uint8)


def _iq4_scale(x: F32) -> F32:
    """What makes the value of largest magnitude on the last axis code 0, that is -127."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=-1, keepdims=True), axis=-1) / np.float32(-127)


def _quantize_iq4_nl(x: F32) -> Fields:
    d = _half(_iq4_scale(x))
    return {"d": d[:, 0], "qs": _pack(_nearest_iq4(_ratio(x, d)), 4, 16)}


def _quantize_iq4_xs(x: F32) -> Fields:
    groups = x.reshape(len(x), 8, 32)
    scales = _iq4_scale(groups)[:, :, 0]
    d = _half(np.abs(scales).max(axis=1, keepdims=True) / np.float32(31))
    rounded = np.clip(np.rint(_ratio(scales, d)), -32, 31)
    codes = _nearest_iq4(_ratio(groups, (d * rounded)[:, :, None]))
    scale_codes = (rounded + 32).astype(np.uint16)
    return {
        "d": d[:, 0],
        "scales_h": (scale_codes >> 4 << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=1, dtype=np.uint16),
        "scales_l": _pack(scale_codes & 15, 4, 1),
        "qs": _pack(codes.reshape(len(x), -1), 4, 16),
    }


_QUANTIZE: dict[str, Callable[[F32], Fields]] = {
    "F32": lambda x: {"x": x[:, 0]},
    "F16": lambda x: {"x": x[:, 0]},
    "BF16": lambda x: {"x": _to_bf16(x[:, 0])},
    "Q4_0": lambda x: _quantize_legacy(x, 15, minimum=False),
    "Q4_1": lambda x: _quantize_legacy(x, 15, minimum=True),
    "Q5_0": lambda x: _quantize_legacy(x, 31, minimum=False),
    "Q5_1": lambda x: _quantize_legacy(x, 31, minimum=True),
    "Q8_0": _quantize_q8_0,
    "Q2_K": _quantize_q2_k,
    "Q3_K": _quantize_q3_k,
    "Q4_K": _quantize_q4_k,
    "Q5_K": _quantize_q5_k,
    "Q6_K": _quantize_q6_k,
    "IQ4_NL": _quantize_iq4_nl,
    "IQ4_XS": _quantize_iq4_xs,
}
