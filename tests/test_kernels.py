"""The extension: every instruction set equals scalar bit for bit, and scalar equals NumPy."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from blocks import FLOAT_TYPES, LAYOUTS, QUANT_TYPES, block_bytes, block_elements, dequantize, random_blocks
from blocks import panels as panels_in_numpy
from numpy.typing import NDArray

from phi3c import _kernels as k
from phi3c.cache import KV_TYPES, kv_type_id
from phi3c.errors import InvalidParameterError
from phi3c.gguf import GGMLType

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

PAGE = 64
TOKENS = 54  # rows of activations: more than one tile of any kernel


@pytest.fixture(params=k.available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set this machine runs; the one in use before comes back."""
    before = k.isa()
    k.use_isa(request.param)
    yield request.param
    k.use_isa(before)


@pytest.fixture(scope="module")
def pool() -> k.Pool:
    return k.Pool(2)


def bits(x: F32) -> NDArray[np.uint32]:
    return np.ascontiguousarray(x).view(np.uint32)


def rows_of(x: Any) -> k.Rows:
    x = np.atleast_2d(np.asarray(x, np.float32))
    rows = k.Rows(*x.shape)
    np.asarray(rows)[:] = x
    return rows


def activation_of(x: F32, pool: k.Pool) -> k.Activation:
    activation = k.Activation(*x.shape)
    np.asarray(activation)[:] = x
    k.quantize(activation, len(x), pool)
    return activation


def matrix_of(
    segments: list[tuple[str, NDArray[np.uint8]]], columns: int, pool: k.Pool, order: Any = None
) -> k.Matrix:
    """Blocks of several types below one another."""
    sizes = []
    for kind, data in segments:
        sizes.append(len(data) // (columns // block_elements(kind) * block_bytes(kind)))
    n_bytes = sum(
        k.packed_bytes(GGMLType[kind], n, columns) for (kind, _), n in zip(segments, sizes, strict=True)
    )
    arena = k.Arena(n_bytes)
    matrix = k.Matrix(arena, columns)
    for (kind, data), n in zip(segments, sizes, strict=True):
        matrix.append(data, GGMLType[kind], n, order, pool)
    assert arena.used == n_bytes
    return matrix


def multiply(matrix: k.Matrix, x: k.Activation, n: int, pool: k.Pool) -> F32:
    out = k.Rows(n, matrix.rows)
    k.matmul(out, matrix, x, n, False, pool)
    return np.array(out)


def with_isa(isa: str, compute: Any) -> Any:
    before = k.isa()
    k.use_isa(isa)
    try:
        return compute()
    finally:
        k.use_isa(before)


# --- packed weights ---


def columns_for(kind: str) -> int:
    """Two super-blocks; the second one short where the type allows it."""
    return 512 if block_elements(kind) == 256 else 352


@pytest.mark.parametrize("kind", LAYOUTS)
def test_packing_keeps_every_byte(kind: str, pool: k.Pool) -> None:
    columns, rows = columns_for(kind), 37
    rng = np.random.default_rng(1)
    data = random_blocks(kind, rows * columns // block_elements(kind), rng)
    order = rng.permutation(rows)
    matrix = matrix_of([(kind, data)], columns, pool, order)
    expected = data.reshape(rows, -1)[order]
    for row in range(rows):
        assert matrix.unpack_row(row) == (GGMLType[kind], expected[row].tobytes())
    for row in (-1, rows):
        with pytest.raises(IndexError, match=f"row {row} of {rows}"):
            matrix.unpack_row(row)


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_embedding_rows_are_the_weights(kind: str, extreme: bool) -> None:
    columns, rows = columns_for(kind), 20
    data = random_blocks(
        kind, rows * columns // block_elements(kind), np.random.default_rng(2), extreme=extreme
    )
    ids = np.array([3, 0, 19, 3], np.int64)
    out = k.Rows(4, columns)
    k.embed(out, data, GGMLType[kind], ids)
    weights = dequantize(kind, data, rows * columns).reshape(rows, columns)
    np.testing.assert_array_equal(np.asarray(out), weights[ids])


def rounded(blocks: F32) -> F64:
    """What one x8 block (csrc/blocks.h) keeps of each row of blocks (n, 256)."""
    groups = blocks.reshape(-1, 8, 32)
    group = np.abs(groups).max(axis=2, keepdims=True)
    largest = group.max(axis=1, keepdims=True)
    tiny = largest < 2.0**-100
    safe = np.where(tiny, np.float32(1), largest)
    factor = np.clip(np.ceil(group * (np.float32(8) / safe)), 1, 8)
    codes = np.rint(groups * (np.float32(1016) / safe / factor))
    d = safe / np.float32(1016)
    kept = np.where(tiny, 0, codes.astype(np.float64) * factor * d)
    return kept.reshape(-1, 256)


def quantised(x: F32) -> F64:
    """What matrices see of x (n, columns): x8 blocks, whose outliers stay as they are."""
    n, columns = x.shape
    blocks = np.zeros((n, -(-columns // 256) * 256), np.float32)
    blocks[:, :columns] = x
    in_block = np.tile(np.minimum(columns - np.arange(0, columns, 256), 256), n)[:, None]
    blocks = blocks.reshape(-1, 256)
    mean = np.abs(blocks.astype(np.float64)).sum(axis=1, keepdims=True) / in_block
    is_outlier = np.abs(blocks) > 10 * mean
    rest = rounded(np.where(is_outlier, np.float32(0), blocks))
    return np.where(is_outlier, blocks, rest).reshape(n, -1)[:, :columns]


def hard_activations(columns: int) -> F32:
    """Rows that reach the ends of the number format."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((TOKENS, columns)).astype(np.float32)
    x[0] = 1  # every code 127, every factor 8
    x[1] = np.where(np.arange(columns) % 2, -1, 1)
    x[2] = 0
    x[3, ::97] = 500
    x[4] *= np.float32(2.0) ** -(np.arange(columns) // 32 % 12)
    x[5] *= np.float32(1e-31)  # below 2^-100: counts as zero
    x[6, :256] *= np.float32(1e20)
    x[7, :256] = 0
    x[8, 40:] = 0
    x[9] = np.round(x[9] * 4) / 4  # ties
    return x


@pytest.mark.parametrize("extreme", [False, True])
@pytest.mark.parametrize("kind", LAYOUTS)
def test_matmul(kind: str, extreme: bool, isa: str, pool: k.Pool) -> None:
    columns, rows = columns_for(kind), 37
    data = random_blocks(
        kind, rows * columns // block_elements(kind), np.random.default_rng(4), extreme=extreme
    )
    matrix = matrix_of([(kind, data)], columns, pool)
    x = hard_activations(columns)
    actual = multiply(matrix, activation_of(x, pool), TOKENS, pool)

    expected = with_isa("scalar", lambda: multiply(matrix, activation_of(x, pool), TOKENS, pool))
    np.testing.assert_array_equal(bits(actual), bits(expected))

    weights = dequantize(kind, data, rows * columns).reshape(rows, columns).astype(np.float64)
    seen = x.astype(np.float64) if kind in FLOAT_TYPES else quantised(x)
    # Only float32 roundings are left: of a handful of terms per 32 columns, relative to their sizes.
    tolerance = 2e-5 * (np.abs(seen) @ np.abs(weights).T) + 1e-30
    assert (np.abs(actual - seen @ weights.T) <= tolerance).all()


def test_what_int8_activations_keep() -> None:
    x = hard_activations(512)
    seen = quantised(x)
    group = np.abs(x).reshape(TOKENS, -1, 32).max(axis=2)
    block = np.repeat(np.abs(x).reshape(TOKENS, -1, 256).max(axis=2), 8, axis=1)
    step = (group + block / 8) / 127  # a range ends within an eighth of the block's
    error = np.abs(seen - x).reshape(TOKENS, -1, 32).max(axis=2)
    assert (error <= 0.502 * step + 2.0**-100).all()
    assert (seen[3] == x[3])[x[3] == 500].all()
    assert (error[3] <= 0.502 * 4 / 127).all()  # neighbours of the 500s, all below 4


@pytest.mark.parametrize("kind", LAYOUTS)
def test_number_of_rows_and_threads_change_nothing(kind: str, isa: str, pool: k.Pool) -> None:
    columns = columns_for(kind)
    data = random_blocks(kind, 70 * columns // block_elements(kind), np.random.default_rng(5))
    matrix = matrix_of([(kind, data)], columns, pool)
    x = hard_activations(columns)
    activation = activation_of(x, pool)
    expected = bits(multiply(matrix, activation, TOKENS, k.Pool(1)))
    for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 24, 47, 48, 49):
        np.testing.assert_array_equal(bits(multiply(matrix, activation, n, pool)), expected[:n])
    np.testing.assert_array_equal(bits(multiply(matrix, activation, TOKENS, k.Pool(3))), expected)


def test_segments_of_different_types_are_rows_of_one_matrix(isa: str, pool: k.Pool) -> None:
    rng = np.random.default_rng(6)
    parts = [(kind, random_blocks(kind, n * 512 // block_elements(kind), rng)) for kind, n in
             [("Q4_K", 48), ("Q6_K", 20), ("F16", 3), ("Q8_0", 16)]]  # fmt: skip
    x = activation_of(hard_activations(512), pool)
    whole = multiply(matrix_of(parts, 512, pool), x, TOKENS, pool)
    apart = [multiply(matrix_of([part], 512, pool), x, TOKENS, pool) for part in parts]
    np.testing.assert_array_equal(bits(whole), bits(np.hstack(apart)))


def test_matmul_adds_to_what_is_there(isa: str, pool: k.Pool) -> None:
    data = random_blocks("Q4_0", 20 * 3, np.random.default_rng(7))
    matrix = matrix_of([("Q4_0", data)], 96, pool)
    x = activation_of(np.random.default_rng(8).standard_normal((4, 96)).astype(np.float32), pool)
    out = rows_of(np.random.default_rng(9).standard_normal((4, 20)))
    before = np.array(out)
    k.matmul(out, matrix, x, 3, True, pool)
    np.testing.assert_array_equal(np.asarray(out)[:3], before[:3] + multiply(matrix, x, 3, pool))
    np.testing.assert_array_equal(np.asarray(out)[3], before[3])


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_what_is_not_a_number_comes_out(kind: str, poison: float, isa: str, pool: k.Pool) -> None:
    columns = columns_for(kind)
    data = random_blocks(kind, 16 * columns // block_elements(kind), np.random.default_rng(10))
    x = np.ones((2, columns), np.float32)
    x[1, 33] = poison
    out = multiply(matrix_of([(kind, data)], columns, pool), activation_of(x, pool), 2, pool)
    assert np.isfinite(out[0]).all()
    if kind in QUANT_TYPES:
        assert np.isnan(out[1]).all()
    else:
        assert not np.isfinite(out[1]).any()


# --- rows ---


@pytest.mark.parametrize("columns", [32, 96, 352, 3072])
def test_rms_norm(columns: int, isa: str, pool: k.Pool) -> None:
    rng = np.random.default_rng(11)
    x = (rng.standard_normal((7, columns)) * np.array([[1], [1e-3], [1e3], [0], [30], [1], [1]])).astype(
        np.float32
    )
    weight = rng.standard_normal((1, columns)).astype(np.float32)

    def compute() -> F32:
        out = k.Activation(7, columns)
        k.rms_norm(out, rows_of(x), rows_of(weight), 1e-5, 7, pool)
        return np.array(out)

    actual = compute()
    np.testing.assert_array_equal(bits(actual), bits(with_isa("scalar", compute)))
    mean = (x.astype(np.float64) ** 2).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(actual, x / np.sqrt(mean + 1e-5) * weight, rtol=1e-6)


@pytest.mark.parametrize("n", [1, TOKENS])  # all of gate first; panels of gate and up by turns
def test_silu_of_gate_times_up(n: int, isa: str, pool: k.Pool) -> None:
    # Over the whole range of the exponential, with both of its ends, and what is beyond them.
    gate = np.linspace(-110, 110, 2 * 1024 - 32, dtype=np.float32)
    edges = np.array([-88.72284, -88.72283, 87.33654, 87.33655, 0.0, 1e-40, np.inf], np.float32)
    gate = np.concatenate([gate, edges, -edges[:-1], np.zeros(19, np.float32)])
    up = np.random.default_rng(12).standard_normal(gate.shape).astype(np.float32)
    weights = np.zeros((2 * len(gate), 32), np.float32)
    weights[:, 0] = np.concatenate([gate, up])  # and x is 1 in column 0, so these are the products
    matrix = matrix_of([("F32", weights.view(np.uint8).ravel())], 32, pool)
    x = activation_of(np.tile(np.eye(1, 32, dtype=np.float32), (n, 1)), pool)

    def compute() -> F32:
        out = k.Activation(n, len(gate))
        k.gate_up(out, matrix, x, n, pool)
        return np.array(out)

    actual = compute()
    np.testing.assert_array_equal(bits(actual), bits(with_isa("scalar", compute)))
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(actual, np.tile(expected, (n, 1)), rtol=1e-6, atol=1e-36)


@pytest.mark.parametrize("kinds", [("Q4_K", "Q4_K"), ("Q6_K", "F16")])
def test_gate_up_is_two_products_however_it_is_shared_out(
    kinds: tuple[str, str], isa: str, pool: k.Pool
) -> None:
    rng, ffn = np.random.default_rng(17), 320  # 20 panels: whole runs of them and a shorter one
    parts = [(kind, random_blocks(kind, ffn * 512 // block_elements(kind), rng)) for kind in kinds]
    matrix = matrix_of(parts, 512, pool)
    x = activation_of(rng.standard_normal((TOKENS, 512)).astype(np.float32), pool)
    gate, up = np.hsplit(multiply(matrix, x, TOKENS, pool).astype(np.float64), 2)
    out = k.Activation(TOKENS, ffn)
    k.gate_up(out, matrix, x, TOKENS, pool)
    whole = np.array(out)
    with np.errstate(over="ignore"):
        expected = gate / (1 + np.exp(-gate)) * up
    np.testing.assert_allclose(whole, expected, rtol=1e-6, atol=1e-30)
    following = matrix_of([("Q8_0", random_blocks("Q8_0", 16 * ffn // 32, rng))], ffn, pool)
    products = multiply(following, out, TOKENS, pool)  # by the quantised form
    np.testing.assert_array_equal(
        bits(products), bits(multiply(following, activation_of(whole, pool), TOKENS, pool))
    )
    same = [matrix]
    if kinds[0] == kinds[1]:
        same.append(matrix_of([(kinds[0], np.concatenate([data for _, data in parts]))], 512, pool))
    for weights in same:
        for n_threads in (1, 2, 3):
            for n in (1, 2, 23, 24, 25, TOKENS):
                k.gate_up(out, weights, x, n, k.Pool(n_threads))
                np.testing.assert_array_equal(bits(np.asarray(out)[:n]), bits(whole[:n]))
                np.testing.assert_array_equal(bits(multiply(following, out, n, pool)), bits(products[:n]))


def test_keep_rows_moves_both_forms(isa: str, pool: k.Pool) -> None:
    data = random_blocks("Q8_0", 16 * 3, np.random.default_rng(13))
    matrix = matrix_of([("Q8_0", data)], 96, pool)
    x = activation_of(np.random.default_rng(14).standard_normal((6, 96)).astype(np.float32), pool)
    floats, products = np.array(x), multiply(matrix, x, 6, pool)
    kept = np.array([0, 3, 5], np.int64)
    k.keep_rows(x, kept)
    np.testing.assert_array_equal(np.asarray(x)[:3], floats[kept])
    np.testing.assert_array_equal(multiply(matrix, x, 3, pool), products[kept])


# --- rotary positions and attention ---


def stored_f16(x: F32) -> F64:
    return x.astype(np.float16).astype(np.float64)


def stored_q8_0(x: F32) -> F64:
    """What q8_0 keeps of x (..., head_dim): per 32 values, 8 bits each and a scale in half precision."""
    groups = x.reshape(*x.shape[:-1], -1, 32)
    scale = (np.abs(groups).max(axis=-1, keepdims=True) / np.float32(127)).astype(np.float16)
    scale = scale.astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    q = np.clip(np.rint(groups * inverse), -127, 127)
    return (q.astype(np.float64) * scale).reshape(x.shape)


def stored_q8_0_keys(keys: F32) -> F64:
    """What q8_0 keeps of keys (..., head_dim): of H k per 32 values, with Sylvester's H, so that H H = 32."""
    mixed = keys.reshape(*keys.shape[:-1], -1, 2, 2, 2, 2, 2)
    for axis in range(-1, -6, -1):  # in float32 and this order, as the kernels round
        mixed = np.concatenate([mixed.sum(axis, keepdims=True), -np.diff(mixed, axis=axis)], axis=axis)
    stored = stored_q8_0(mixed.reshape(keys.shape)).reshape(*keys.shape[:-1], -1, 32)
    sylvester = [[(-1) ** (i & j).bit_count() for j in range(32)] for i in range(32)]
    return (stored @ np.array(sylvester) / 32).reshape(keys.shape)


class Attention:
    """One layer's heads over random q, k and v, and the same in NumPy."""

    def __init__(
        self,
        kv_type: str,
        heads: int,
        kv_heads: int,
        head_dim: int,
        rope_dims: int,
        window: int,
        n: int,
        size: float = 1.0,
    ) -> None:
        self.heads, self.kv_heads, self.head_dim, self.window = heads, kv_heads, head_dim, window
        self.rope_dims, self.n = rope_dims, n
        self.stored_keys = {"f16": stored_f16, "q8_0": stored_q8_0_keys}[kv_type]
        self.stored = {"f16": stored_f16, "q8_0": stored_q8_0}[kv_type]
        self.geometry = k.Heads(heads, kv_heads, head_dim, rope_dims, window, kv_type_id(kv_type, head_dim))
        # A set of rotary frequencies for each of the two sequences.
        self.frequency = 10000.0 ** (-np.arange(rope_dims // 2) * 2 / rope_dims) / [[1.0], [3.0]]
        rng = np.random.default_rng(15)
        # One sequence of n positions and a shorter one, so that pages and rows do not coincide.
        self.qkv = [
            (size * rng.standard_normal((length, self.geometry.qkv_columns))).astype(np.float32)
            for length in (n, n // 2 + 1)
        ]

    def run(self, chunk: int, n_threads: int) -> list[F32]:
        """Rows of the two sequences, `chunk` positions of each at a time, through one batch per step."""
        pool, pages = k.Pool(n_threads), k.Pages(self.geometry.page_bytes(2))
        pages.take()  # page ids do not start at 0
        rope = k.RopeTable(self.frequency, 1.0)
        for sequence, x in enumerate(self.qkv):
            rope.extend(sequence, len(x))
        n_pages = -(-self.n // PAGE)
        tables = np.array([[pages.take() for _ in range(n_pages)] for _ in self.qkv], np.int32)
        out: list[list[F32]] = [[], []]
        for start in range(0, self.n, chunk):
            new = [(s, x[start : start + chunk]) for s, x in enumerate(self.qkv) if start < len(x)]
            spans, row = [], 0
            for sequence, x in new:
                spans.append((sequence, row, len(x), start, sequence))
                row += len(x)
            batch = k.Batch(np.array(spans, np.int32), tables, pages, self.window)
            qkv = rows_of(np.concatenate([x for _, x in new]))
            mixed = k.Activation(row, self.geometry.columns)
            k.rope_append(self.geometry, 1, qkv, batch, pages, rope, pool)
            k.attend(mixed, self.geometry, 1, qkv, batch, pages, pool)
            for sequence, row, length, *_ in spans:
                out[sequence].append(np.array(mixed)[row : row + length])
        return [np.concatenate(parts) for parts in out]

    def expected(self, sequence: int) -> F64:
        x = self.qkv[sequence]
        n, hd = len(x), self.head_dim
        q, keys, values = np.split(x.reshape(n, -1, hd), [self.heads, self.heads + self.kv_heads], axis=1)
        angle = np.arange(n)[:, None] * self.frequency[sequence]
        cosine, sine = (f(angle).astype(np.float32)[:, None, :] for f in (np.cos, np.sin))

        def rotated(y: F32) -> F32:
            half, end = self.rope_dims // 2, self.rope_dims
            a, b = y[..., :half], y[..., half:end]
            return np.concatenate([a * cosine - b * sine, b * cosine + a * sine, y[..., end:]], axis=-1)

        group = self.heads // self.kv_heads
        q = rotated(q).astype(np.float64)
        stored = self.stored_keys(rotated(keys)).repeat(group, axis=1)
        shown = self.stored(values).repeat(group, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, stored) / np.sqrt(hd)
        age = np.arange(n)[:, None] - np.arange(n)
        scores[:, (age < 0) | ((age >= self.window) if self.window else False)] = -np.inf
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        weights /= weights.sum(axis=2, keepdims=True)
        mixed: F64 = np.einsum("hqk,khd->qhd", weights, shown).reshape(n, -1)
        return mixed


ATTENTIONS: dict[str, tuple[Any, ...]] = {
    # heads, kv_heads, head_dim, rope_dims, window, positions[, size of q, k, v]
    "a kv head each": (3, 3, 96, 96, 0, 150),
    "groups of two": (4, 2, 64, 64, 0, 130),
    "one kv head for twenty": (20, 1, 16, 16, 0, 100),
    "head of 128, 96 rotated": (2, 1, 128, 96, 0, 100),
    "head of 512": (2, 1, 512, 64, 0, 70),
    "one kv head for fifty": (50, 1, 32, 32, 0, 70),
    "head of 48, a pair rotated": (2, 2, 48, 2, 0, 70),
    "window of 1": (4, 2, 32, 32, 1, 130),
    "window of 20": (4, 2, 32, 32, 20, 150),
    "window of a page": (4, 2, 32, 32, PAGE, 200),
    "window of 100": (6, 2, 32, 16, 100, 250),
    "one key takes all": (2, 1, 64, 64, 0, 130, 30.0),
    "halves and scales subnormal": (2, 1, 32, 32, 0, 70, 1e-5),
    "scales that round to 0": (2, 1, 32, 32, 0, 70, 1e-7),
}


@pytest.mark.parametrize("kv_type", KV_TYPES)
@pytest.mark.parametrize("geometry", ATTENTIONS.values(), ids=ATTENTIONS.keys())
def test_attention(geometry: tuple[Any, ...], kv_type: str, isa: str) -> None:
    if kv_type == "q8_0" and geometry[2] % 32:
        with pytest.raises(InvalidParameterError, match="32"):
            Attention(kv_type, *geometry)
        return
    attention = Attention(kv_type, *geometry)
    actual = attention.run(attention.n, 2)
    expected = with_isa("scalar", lambda: attention.run(attention.n, 1))
    size = geometry[6] if len(geometry) > 6 else 1.0
    for sequence, (ours, scalar) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_array_equal(bits(ours), bits(scalar))
        # float32 sums of up to 250 terms; a score of size s carries its rounding into the weights
        exact = attention.expected(sequence)
        np.testing.assert_allclose(ours, exact, rtol=0, atol=1e-5 * size * max(1, size**2))


@pytest.mark.parametrize(("chunk", "n_threads"), [(1, 2), (7, 3), (64, 1), (65, 2)])
@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_attention_in_chunks_gives_the_same_bits(
    kv_type: str, window: int, chunk: int, n_threads: int, isa: str
) -> None:
    attention = Attention(kv_type, 4, 2, 32, 32, window, 200)
    for cut, whole in zip(attention.run(chunk, n_threads), attention.run(200, 2), strict=True):
        np.testing.assert_array_equal(bits(cut), bits(whole))


@pytest.mark.parametrize(("heads", "kv_heads"), [(12, 3), (9, 3), (40, 10), (28, 4), (50, 1)])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_heads_shared_out_among_threads_give_the_same_bits(
    kv_type: str, heads: int, kv_heads: int, isa: str
) -> None:
    """One token at a time, of two sequences and then of the longer alone, whose groups threads share."""
    attention = Attention(kv_type, heads, kv_heads, 32, 32, 20, 70)
    whole = attention.run(70, 1)
    for n_threads in range(1, 9):
        for cut, expected in zip(attention.run(1, n_threads), whole, strict=True):
            np.testing.assert_array_equal(bits(cut), bits(expected))


@pytest.mark.parametrize("chunk", [529, 526])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (20, 10)])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_pages_shared_out_among_threads_give_the_same_bits(
    kv_type: str, heads: int, kv_heads: int, chunk: int, isa: str
) -> None:
    """One token behind 529, or four behind 526: a head's pages are read by several threads in turn."""
    attention = Attention(kv_type, heads, kv_heads, 32, 32, 0, 530)
    whole = attention.run(530, 1)
    for n_threads in (2, 4, 7, 8):
        for cut, expected in zip(attention.run(chunk, n_threads), whole, strict=True):
            np.testing.assert_array_equal(bits(cut), bits(expected))


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_a_value_that_is_no_number_reaches_its_own_and_later_positions(
    kv_type: str, poison: float, isa: str
) -> None:
    attention = Attention(kv_type, 2, 1, 32, 32, 0, 100)
    expected = attention.run(100, 2)[0]
    attention.qkv[0][70, -5] = poison  # dimension 27 of the value
    actual = attention.run(100, 2)[0]
    np.testing.assert_array_equal(bits(actual[:70]), bits(expected[:70]))
    assert not np.isfinite(actual[70:, [27, 32 + 27]]).any()


@pytest.mark.parametrize("scale", [1.0, 1.190238])
def test_rope_table_is_right_to_the_last_bit(scale: float, pool: k.Pool) -> None:
    """Rotating (1, 0) shows (cos, sin); q is divided by sqrt(16)."""
    head_dim, n = 16, 131072
    geometry = k.Heads(1, 1, head_dim, head_dim, 1, GGMLType.F16)
    frequency = 10000.0 ** (-np.arange(head_dim // 2) / 8)
    rope = k.RopeTable(frequency[None], scale)
    rope.extend(0, 100)  # and grown afterwards
    rope.extend(0, n)
    pages = k.Pages(geometry.page_bytes(1))
    page = pages.take()
    tables = np.full((1, n // PAGE), page, np.int32)
    for start in (0, 512, 4096 - 64, n - 64):
        qkv = np.zeros((64, 3 * head_dim), np.float32)
        qkv[:, : head_dim // 2] = 1
        rows = rows_of(qkv)
        batch = k.Batch(np.array([[0, 0, 64, start, 0]], np.int32), tables, pages, 1)
        k.rope_append(geometry, 0, rows, batch, pages, rope, pool)
        angle = np.arange(start, start + 64)[:, None] * frequency
        expected = np.hstack([np.cos(angle), np.sin(angle)]) * np.float32(scale)
        error = np.abs(np.asarray(rows)[:, :head_dim] * 4.0 - expected)
        assert (error <= np.spacing(np.abs(expected).astype(np.float32))).all()


# --- what is refused ---


def test_pages_are_used_again() -> None:
    pages = k.Pages(1000)
    first, second = pages.take(), pages.take()
    assert (first != second, pages.in_use, pages.count) == (True, 2, 2)
    pages.give_back(first)
    assert pages.in_use == 1
    assert pages.take() == first
    assert pages.count == 2


@pytest.mark.parametrize("size", [0, -1, 1025])
def test_pool_refuses(size: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 1024 threads, not {size}"):
        k.Pool(size)


@pytest.mark.parametrize(
    "arguments",
    [
        (4, 2, 8, 8, 0, GGMLType.F16),
        (4, 2, 40, 40, 0, GGMLType.F16),
        (4, 2, 528, 32, 0, GGMLType.F16),
        (4, 3, 32, 32, 0, GGMLType.F16),
        (4, 0, 32, 32, 0, GGMLType.F16),
        (4, 2, 32, 31, 0, GGMLType.F16),
        (4, 2, 32, 34, 0, GGMLType.F16),
        (4, 2, 32, 32, -1, GGMLType.F16),
        (4, 2, 48, 48, 0, GGMLType.Q8_0),
        (4, 2, 32, 32, 0, GGMLType.Q4_0),
        (4, 2, 32, 32, 0, -1),
    ],
)
def test_heads_refuse(arguments: tuple[int, int, int, int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"heads|rotary|cache"):
        k.Heads(*arguments)


def test_matrix_refuses(pool: k.Pool) -> None:
    block = np.zeros(18 * 2, np.uint8)
    matrix = k.Matrix(k.Arena(4096), 32)
    q4_0 = GGMLType.Q4_0
    for message, data, kind, rows, order in [
        ("no packing for type 16", block, GGMLType.IQ2_XXS, 2, None),
        ("no packing for type 12", block, GGMLType.Q4_K, 2, None),
        ("no packing for type 99", block, 99, 2, None),
        ("36 bytes", block, q4_0, 3, None),
        ("0 rows", block[:0], q4_0, 0, None),
        ("order names 1 of 2", block, q4_0, 2, np.zeros(1, np.int64)),
        (r"order\[1\] is 2", block, q4_0, 2, np.array([0, 2])),
        (r"order\[0\] is -1", block, q4_0, 2, np.array([-1, 0])),
    ]:
        with pytest.raises(ValueError, match=message):
            matrix.append(data, kind, rows, order, pool)
    with pytest.raises(ValueError, match="no room"):
        k.Matrix(k.Arena(64), 32).append(block, q4_0, 2, None, pool)
    assert matrix.rows == 0
    with pytest.raises(IndexError):
        matrix.unpack_row(0)


def aligned(n_bytes: int) -> NDArray[np.uint8]:
    """Zeros that begin at a multiple of 64."""
    room = np.zeros(n_bytes + 64, np.uint8)
    start = -room.ctypes.data % 64
    return room[start : start + n_bytes]


@pytest.mark.parametrize("kind", LAYOUTS)
def test_panels_that_lie_elsewhere(kind: str, pool: k.Pool) -> None:
    """They are those that docs/formats.md draws, their buffer lives with the matrix, rows come out again.

    Files hold them: a change here counts up LAYOUT_VERSION in packed.py.
    """
    columns, rows = columns_for(kind), 37
    rng = np.random.default_rng(3)
    data = random_blocks(kind, rows * columns // block_elements(kind), rng)
    panels = aligned(48 * columns // block_elements(kind) * block_bytes(kind))  # three panels of 16 rows
    k.pack(panels, data, GGMLType[kind], rows, columns, None, pool)
    np.testing.assert_array_equal(panels, panels_in_numpy(kind, data, rows))
    matrix, other = k.Matrix(None, columns), matrix_of([(kind, data)], columns, pool)
    matrix.append_packed(panels, GGMLType[kind], rows)
    gone = weakref.ref(panels)
    del panels
    gc.collect()
    assert gone() is not None
    for row in range(rows):
        assert matrix.unpack_row(row) == other.unpack_row(row)
    ids = np.array([36, 0, 17, 17])
    looked_up, expected = k.Rows(4, columns), k.Rows(4, columns)
    k.embed_packed(looked_up, matrix, ids)
    k.embed(expected, data, GGMLType[kind], ids)
    np.testing.assert_array_equal(np.array(looked_up).view(np.uint32), np.array(expected).view(np.uint32))
    del matrix
    gc.collect()
    assert gone() is None


def test_packed_rows_refuse(pool: k.Pool) -> None:
    q4_0, panels, block = GGMLType.Q4_0, aligned(18 * 16 + 64), np.zeros(18, np.uint8)
    matrix = k.Matrix(None, 32)
    with pytest.raises(ValueError, match="multiple of 64"):
        matrix.append_packed(panels[32 : 32 + 18 * 16], q4_0, 1)
    with pytest.raises(ValueError, match="288 bytes: not 17 packed rows x 32"):
        matrix.append_packed(panels[: 18 * 16], q4_0, 17)
    with pytest.raises(ValueError, match="0 rows"):
        matrix.append_packed(panels[:0], q4_0, 0)
    with pytest.raises(ValueError, match="no packing for type 99"):
        matrix.append_packed(panels, 99, 1)
    with pytest.raises(ValueError, match="without an arena"):
        matrix.append(block, q4_0, 1, None, pool)
    with pytest.raises(ValueError, match="352 bytes: not 1 packed rows"):
        k.pack(panels, block, q4_0, 1, 32, None, pool)
    with pytest.raises(ValueError, match="no packing for type 2 with -32 columns"):
        k.pack(panels, block, q4_0, 1, -32, None, pool)
    with pytest.raises(ValueError, match="token id 0 is not in the vocabulary of 0"):
        k.embed_packed(k.Rows(1, 32), matrix, np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="embed: shapes"):
        k.embed_packed(k.Rows(1, 64), matrix, np.zeros(1, np.int64))
    assert matrix.rows == 0


def test_keep_rows_refuses() -> None:
    rows = k.Rows(4, 32)
    for wanted in ([4], [-1], [1, 0], [0, 1, 2, 3, 4]):
        with pytest.raises(ValueError, match=r"row -?\d cannot become row \d of 4"):
            k.keep_rows(rows, np.array(wanted, np.int64))


def test_embed_refuses() -> None:
    data = np.zeros(18 * 5, np.uint8)
    out = k.Rows(2, 32)
    for wanted in ([5], [-1], [0, 5]):
        with pytest.raises(ValueError, match="not in the vocabulary of 5"):
            k.embed(out, data, GGMLType.Q4_0, np.array(wanted, np.int64))
    with pytest.raises(ValueError, match="embed"):
        k.embed(out, data, GGMLType.Q4_0, np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="embed"):
        k.embed(out, data, GGMLType.Q4_K, np.zeros(1, np.int64))


@pytest.mark.parametrize(
    ("spans", "window", "message"),
    [
        ([], 0, "spans are rows"),
        ([(0, 0, 1)], 0, "spans are rows"),
        ([(2, 0, 1, 0, 0)], 0, "span 0 is out of place"),
        ([(-1, 0, 1, 0, 0)], 0, "span 0 is out of place"),
        ([(0, 1, 1, 0, 0)], 0, "span 0 is out of place"),
        ([(0, 0, 2, 0, 0), (1, 1, 1, 0, 0)], 0, "span 1 is out of place"),
        ([(0, 0, 0, 0, 0)], 0, "span 0 is out of place"),
        ([(0, 0, 1, -1, 0)], 0, "span 0 is out of place"),
        ([(0, 0, 100, 29, 0)], 0, "span 0 ends at position 129"),
        ([(0, 0, 2**31 - 1, 2**31 - 1, 0)], 0, "beyond its page table"),
        ([(1, 0, 1, 100, 0)], 0, "span 0 has no page 0"),
        ([(1, 0, 1, 100, 0)], 38, "span 0 has no page 0"),  # sees key 63
    ],
)
def test_batch_refuses(spans: list[tuple[int, ...]], window: int, message: str) -> None:
    pages = k.Pages(64)
    tables = np.array([[pages.take(), pages.take()], [-1, pages.take()]], np.int32)
    array = np.array(spans, np.int32).reshape(len(spans), -1) if spans else np.empty((0, 5), np.int32)
    with pytest.raises(ValueError, match=message):
        k.Batch(array, tables, pages, window)


def test_batch_takes_what_fits() -> None:
    pages = k.Pages(64)
    tables = np.array([[pages.take(), pages.take()], [-1, pages.take()]], np.int32)
    spans = np.array([(0, 0, 100, 28, 0), (1, 100, 1, 100, 1)], np.int32)
    batch = k.Batch(spans, tables, pages, 37)  # sees keys 64 to 100: page 0 may be gone
    assert batch.n_rows == 101


def test_operations_refuse_shapes_that_do_not_fit(pool: k.Pool) -> None:
    data = random_blocks("Q4_0", 20, np.random.default_rng(16))
    matrix = matrix_of([("Q4_0", data)], 32, pool)
    gate_up, uneven, three = (
        matrix_of([("Q4_0", random_blocks("Q4_0", n, np.random.default_rng(n))) for n in rows], 32, pool)
        for rows in ([64], [48, 16], [16, 16, 32])
    )
    x, rows, out = k.Activation(2, 32), k.Rows(2, 32), k.Rows(2, 20)
    calls: list[tuple[str, Any]] = [
        ("matmul", lambda: k.matmul(out, matrix, x, 3, False, pool)),
        ("matmul", lambda: k.matmul(out, matrix, x, 0, False, pool)),
        ("matmul", lambda: k.matmul(k.Rows(2, 21), matrix, x, 2, False, pool)),
        ("matmul", lambda: k.matmul(out, matrix, k.Activation(2, 64), 2, False, pool)),
        ("rms_norm", lambda: k.rms_norm(x, rows, k.Rows(1, 31), 1e-5, 2, pool)),
        ("rms_norm", lambda: k.rms_norm(x, k.Rows(1, 32), rows, 1e-5, 2, pool)),
        ("gate_up", lambda: k.gate_up(x, matrix, x, 2, pool)),  # 20 rows, not 64
        ("gate_up", lambda: k.gate_up(x, gate_up, x, 3, pool)),
        ("gate_up", lambda: k.gate_up(x, gate_up, x, 0, pool)),
        ("gate_up", lambda: k.gate_up(x, gate_up, k.Activation(2, 64), 2, pool)),
        ("gate_up", lambda: k.gate_up(x, uneven, x, 2, pool)),
        ("gate_up", lambda: k.gate_up(x, three, x, 2, pool)),
        ("quantize", lambda: k.quantize(x, 3, pool)),
        ("quantize", lambda: k.quantize(x, 0, pool)),
        ("multiple of 32", lambda: k.Activation(1, 48)),
        ("a matrix of 0 x 4", lambda: k.Rows(0, 4)),
    ]
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_rope_and_attention_refuse_shapes_that_do_not_fit(pool: k.Pool) -> None:
    geometry = k.Heads(2, 1, 32, 32, 0, GGMLType.F16)
    pages = k.Pages(geometry.page_bytes(1))
    tables = np.array([[pages.take()]], np.int32)
    batch = k.Batch(np.array([[0, 0, 3, 0, 1]], np.int32), tables, pages, 0)
    rope = k.RopeTable(np.ones((2, 16)), 1.0)
    qkv, out = k.Rows(3, geometry.qkv_columns), k.Activation(3, geometry.columns)
    with pytest.raises(ValueError, match="rope_append"):  # no table yet
        k.rope_append(geometry, 0, qkv, batch, pages, rope, pool)
    rope.extend(0, 3)  # of another set
    with pytest.raises(ValueError, match="rope_append"):
        k.rope_append(geometry, 0, qkv, batch, pages, rope, pool)
    rope.extend(1, 3)
    k.rope_append(geometry, 0, qkv, batch, pages, rope, pool)
    for frequency in (np.ones((1, 16)), np.ones((2, 15))):  # no set 1; not half of the rotary dimensions
        other = k.RopeTable(frequency, 1.0)
        other.extend(0, 3)
        if len(frequency) > 1:
            other.extend(1, 3)
        with pytest.raises(ValueError, match="rope_append"):
            k.rope_append(geometry, 0, qkv, batch, pages, other, pool)
    with pytest.raises(ValueError, match="no rotary set 2"):
        rope.extend(2, 1)
    for set_of_nobody in (-1, 2):
        spans = np.array([[0, 0, 3, 0, set_of_nobody]], np.int32)
        with pytest.raises(ValueError, match="rope_append"):
            k.rope_append(geometry, 0, qkv, k.Batch(spans, tables, pages, 0), pages, rope, pool)
    for layer, rows in [(1, qkv), (0, k.Rows(2, geometry.qkv_columns)), (0, k.Rows(3, 64))]:
        with pytest.raises(ValueError, match="rope_append"):
            k.rope_append(geometry, layer, rows, batch, pages, rope, pool)
        with pytest.raises(ValueError, match="attend"):
            k.attend(out, geometry, layer, rows, batch, pages, pool)
    with pytest.raises(ValueError, match="attend"):
        k.attend(k.Activation(3, 32), geometry, 0, qkv, batch, pages, pool)


def test_unknown_instruction_set_is_refused() -> None:
    before = k.isa()
    with pytest.raises(ValueError, match=r"'sse9' is unknown.*scalar"):
        k.use_isa("sse9")
    assert k.isa() == before


# --- limits -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", [16, 2064])  # one piece of work; 33 with a short one at the end
@pytest.mark.parametrize("n_threads", [1, 2, 3])
def test_read_reads_every_byte_once(n_rows: int, n_threads: int) -> None:
    words = np.random.default_rng(n_rows).integers(2**32, size=(n_rows, 1024), dtype=np.uint32)
    pool, half = k.Pool(n_threads), n_rows // 2
    matrix = k.Matrix(k.Arena(2 * words.nbytes), 1024)
    assert k.read(matrix, pool) == 0
    # packing F32 moves words about and changes none; rows of two segments are padded with zeros
    for rows in (words[:half], words[half:]):
        matrix.append(rows.view(np.uint8).ravel(), GGMLType.F32, half, None, pool)
    assert k.read(matrix, pool) == np.bitwise_xor.reduce(words, axis=None)


def test_peak_counts_its_multiply_adds(isa: str, pool: k.Pool) -> None:
    chains_times_bytes = {"scalar": 0, "avx2": 12 * 32, "avxvnni": 12 * 32, "avx512": 12 * 64}
    chains_times_bytes |= {"neon": 12 * 8, "dotprod": 16 * 16}
    assert k.peak(1, pool) == 8192 * chains_times_bytes[isa]
    assert k.peak(7, pool) == 7 * k.peak(1, pool)
    assert k.peak(0, pool) == 0
