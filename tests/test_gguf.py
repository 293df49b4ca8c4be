"""The GGUF reader and writer: round trips, damage of every kind, and the PyPI `gguf` package as a witness."""

from __future__ import annotations

import math
import struct
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from phi3c.errors import (
    CorruptGGUFError,
    GGUFVersionError,
    InvalidParameterError,
    ModelClosedError,
    ModelLoadError,
    ModelNotFoundError,
    NotGGUFError,
    TruncatedFileError,
    UnsupportedQuantError,
)
from phi3c.gguf import BLOCKS, GGMLType, GGUFFile, TensorInfo, Value, n_bytes, write_gguf

# --- files, byte by byte, without our writer --------------------------------------------------------------

UINT8, UINT32, BOOL, STRING, ARRAY = 0, 4, 7, 8, 9
U64_MAX = 2**64 - 1


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


def u64(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}Q", *numbers)


def text(data: bytes) -> bytes:
    return u64(len(data)) + data


def pair(key: bytes, value_type: int, payload: bytes) -> bytes:
    return text(key) + u32(value_type) + payload


def record(name: bytes = b"w", shape: tuple[int, ...] = (8,), type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(shape)) + u64(*shape) + u32(type_id) + u64(offset)


def file_bytes(
    pairs: tuple[bytes, ...] = (), records: tuple[bytes, ...] = (), data: bytes = b"", version: int = 3
) -> bytes:
    head = b"GGUF" + u32(version) + u64(len(records), len(pairs)) + b"".join(pairs + records)
    return head + bytes(-len(head) % 32) + data


def load(tmp_path: Path, content: bytes) -> GGUFFile:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    return GGUFFile(path)


# --- what is read -----------------------------------------------------------------------------------------


def test_reads_a_file_made_by_hand(tmp_path: Path) -> None:
    floats = np.arange(8, dtype="<f4")
    content = file_bytes(
        pairs=(
            pair(b"s", STRING, text("é".encode())),
            pair(b"n", UINT32, u32(7)),
            pair(b"words", ARRAY, u32(STRING) + u64(2) + text(b"a") + text(b"")),
            pair(b"bytes", ARRAY, u32(UINT8) + u64(3) + b"\1\2\3"),
            pair(b"nested", ARRAY, u32(ARRAY) + u64(1) + u32(BOOL) + u64(2) + b"\1\0"),
        ),
        records=(record(b"w", (4, 2)),),
        data=floats.tobytes(),
        version=2,
    )
    with load(tmp_path, content) as file:
        assert file.version == 2
        assert file.alignment == 32
        assert list(file.metadata) == ["s", "n", "words", "bytes", "nested"]
        assert (file.metadata["s"], file.metadata["n"], file.metadata["words"]) == ("é", 7, ["a", ""])
        numbers = file.metadata["bytes"]
        np.testing.assert_array_equal(numbers, np.array([1, 2, 3], np.uint8), strict=True)
        assert isinstance(numbers, np.ndarray)
        assert numbers.flags.owndata  # a view would keep the file mapped
        nested = file.metadata["nested"]
        assert isinstance(nested, list)
        np.testing.assert_array_equal(nested[0], np.array([True, False]), strict=True)
        assert file.tensors == {"w": TensorInfo("w", (4, 2), GGMLType.F32, len(content) - 32, 32)}
        assert (file.tensors["w"].columns, file.tensors["w"].rows) == (4, 2)
        np.testing.assert_array_equal(file.data("w").view("<f4"), floats)


def test_data_is_a_read_only_view_that_outlives_close(tmp_path: Path) -> None:
    file = load(tmp_path, file_bytes(records=(record(),), data=bytes(range(32))))
    view = file.data("w")
    assert not view.flags.writeable
    assert not view.flags.owndata
    file.close()
    file.close()
    assert view.tolist() == list(range(32))
    with pytest.raises(ModelClosedError, match="closed"):
        file.data("w")


def test_missing_padding_after_the_last_tensor_is_fine(tmp_path: Path) -> None:
    file = load(tmp_path, file_bytes(records=(record(shape=(3,)),), data=bytes(12)))
    assert file.data("w").size == 12


def test_vocabulary_file(shared: Path) -> None:
    with GGUFFile(shared / "vocab" / "ggml-vocab-phi-3.gguf") as file:
        tokens, scores = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.scores"]
        assert isinstance(tokens, list)
        assert isinstance(scores, np.ndarray)
        assert len(tokens) == scores.size == 32064
        assert (tokens[1], tokens[32000], tokens[32007], tokens[32010]) == (
            "<s>",
            "<|endoftext|>",
            "<|end|>",
            "<|user|>",
        )
        assert scores.dtype == np.float32
        assert file.metadata["tokenizer.ggml.add_bos_token"] is True
        assert file.metadata["phi3.rope.freq_base"] == 10000.0
        assert file.tensors == {}


# --- block sizes ------------------------------------------------------------------------------------------


def test_types_and_blocks_equal_those_of_the_gguf_package() -> None:
    theirs = {(type.name, type.value): sizes for type, sizes in gguf.GGML_QUANT_SIZES.items()}
    ours = {(type.name, type.value): sizes for type, sizes in BLOCKS.items()}
    assert ours.items() <= theirs.items()
    assert set(BLOCKS) == set(GGMLType)


def test_n_bytes_of_the_official_phi3_mini_q4_file() -> None:
    # 2 392 493 568 is the size of the data that llama.cpp maps for Phi-3-mini-4k-instruct-q4.gguf.
    d, ffn, vocab = 3072, 8192, 32064
    total = n_bytes((d, vocab), GGMLType.Q4_K) + n_bytes((d, vocab), GGMLType.Q6_K) + 65 * 4 * d
    total += 32 * n_bytes((d, 3 * d), GGMLType.Q5_K)
    total += 32 * (n_bytes((d, d), GGMLType.Q4_K) + n_bytes((d, 2 * ffn), GGMLType.Q4_K))
    total += 16 * (n_bytes((ffn, d), GGMLType.Q4_K) + n_bytes((ffn, d), GGMLType.Q6_K))
    assert total == 2_392_493_568


# --- round trips ------------------------------------------------------------------------------------------

NUMBERS = st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "?", "u8", "i8", "f8"])
TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
ARRAYS = st.one_of(
    st.lists(TEXT, max_size=4),
    NUMBERS.flatmap(lambda dtype: hnp.arrays(dtype, st.integers(0, 5))),
)
VALUES = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(width=32),
    TEXT,
    ARRAYS,
    st.lists(ARRAYS, min_size=1, max_size=3),
    st.lists(st.lists(ARRAYS, min_size=1, max_size=2), min_size=1, max_size=2),
)
METADATA = st.dictionaries(
    TEXT.filter(bool).filter(lambda key: key != "general.alignment"), VALUES, max_size=6
)


@st.composite
def tensor_lists(draw: st.DrawFn) -> list[tuple[str, tuple[int, ...], GGMLType, bytes]]:
    names = draw(st.lists(st.text("abc.0", min_size=1, max_size=8), unique=True, max_size=4))
    tensors: list[tuple[str, tuple[int, ...], GGMLType, bytes]] = []
    for name in names:
        type = draw(st.sampled_from(GGMLType))
        rest = draw(st.lists(st.integers(1, 3), max_size=3))
        shape = (BLOCKS[type][0] * draw(st.integers(1, 3)), *rest)
        data = np.random.default_rng(len(tensors)).bytes(n_bytes(shape, type))
        tensors.append((name, shape, type, data))
    return tensors


def assert_same(left: Value, right: Value) -> None:
    assert type(left) is type(right)
    if isinstance(left, list):
        assert isinstance(right, list)
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            assert_same(a, b)
    else:
        np.testing.assert_array_equal(left, right, strict=True)  # NaN equals NaN


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    metadata=METADATA,
    tensors=tensor_lists(),
    alignment=st.sampled_from([8, 32, 256]),
    version=st.sampled_from([2, 3]),
)
def test_what_is_written_is_read(
    tmp_path: Path,
    metadata: dict[str, Value],
    tensors: list[tuple[str, tuple[int, ...], GGMLType, bytes]],
    alignment: int,
    version: int,
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, metadata, tensors, alignment=alignment, version=version)
    with GGUFFile(path) as file:
        assert (file.version, file.alignment) == (version, alignment)
        assert list(file.metadata) == list(metadata) + ["general.alignment"] * (alignment != 32)
        for key, value in metadata.items():
            assert_same(file.metadata[key], value)
        assert list(file.tensors) == [name for name, *_ in tensors]
        for name, shape, type, data in tensors:
            info = file.tensors[name]
            assert (info.shape, info.type, info.offset % alignment) == (shape, type, 0)
            assert file.data(name).tobytes() == data
    assert list(tmp_path.iterdir()) == [path]


def test_a_copy_through_reader_and_writer_is_identical(tmp_path: Path) -> None:
    first, second = tmp_path / "a.gguf", tmp_path / "b.gguf"
    metadata: dict[str, Value] = {"name": "x", "scores": np.arange(3, dtype=np.float32)}
    write_gguf(first, metadata, [("w", (5,), GGMLType.F32, np.arange(5, dtype=np.float32))], alignment=64)
    with GGUFFile(first) as file:
        tensors = [(i.name, i.shape, i.type, file.data(i.name)) for i in file.tensors.values()]
        write_gguf(second, file.metadata, tensors, alignment=file.alignment)
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(
    "metadata",
    [
        {"k": [1, 2]},
        {"k": ["a", ["b"]]},
        {"k": np.zeros((2, 2))},
        {"k": np.float16(1)},
        {"k": np.array(["a"])},
        {"k": 2**64},
    ],
)
def test_metadata_that_gguf_cannot_hold_is_refused(tmp_path: Path, metadata: dict[str, Value]) -> None:
    with pytest.raises(InvalidParameterError):
        write_gguf(tmp_path / "model.gguf", metadata, [])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "type", "size", "alignment"),
    [
        ((8,), GGMLType.F32, 31, 32),
        ((8, 0), GGMLType.F32, 0, 32),
        ((), GGMLType.F32, 4, 32),
        ((1, 1, 1, 1, 1), GGMLType.F32, 4, 32),
        ((48,), GGMLType.Q8_0, 51, 32),
        ((8,), GGMLType.F32, 32, 24),
    ],
)
def test_tensors_that_gguf_cannot_hold_are_refused(
    tmp_path: Path, shape: tuple[int, ...], type: GGMLType, size: int, alignment: int
) -> None:
    with pytest.raises(InvalidParameterError):
        write_gguf(tmp_path / "model.gguf", {}, [("w", shape, type, bytes(size))], alignment=alignment)


def test_data_may_be_made_when_its_turn_comes(tmp_path: Path) -> None:
    """One tensor at a time: what the last function made is gone when the next is called."""
    alive: list[weakref.ref[np.ndarray]] = []

    def data(value: int) -> np.ndarray:
        assert all(array() is None for array in alive)
        made = np.full(4, value, np.float32)
        alive.append(weakref.ref(made))
        return made

    tensors = [(f"t{i}", (4,), GGMLType.F32, partial(data, i)) for i in range(3)]
    write_gguf(tmp_path / "model.gguf", {}, tensors)
    with GGUFFile(tmp_path / "model.gguf") as file:
        for i in range(3):
            assert file.data(f"t{i}").view(np.float32).tolist() == [i] * 4

    with pytest.raises(InvalidParameterError, match=r"'short'.*takes 16 bytes, not 4"):
        write_gguf(tmp_path / "model.gguf", {}, [("short", (4,), GGMLType.F32, lambda: bytes(4))])
    with GGUFFile(tmp_path / "model.gguf") as file:
        assert len(file.tensors) == 3


def test_double_precision_survives_a_copy(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", {"base": np.float64(10000.0001)}, [])
    with GGUFFile(tmp_path / "a.gguf") as file:
        assert file.metadata["base"] == 10000.0001
        assert isinstance(file.metadata["base"], float)
        write_gguf(tmp_path / "b.gguf", file.metadata, [])
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"old")

    def no_space(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("phi3c.gguf.os.replace", no_space)
    with pytest.raises(OSError, match="no space left"):
        write_gguf(path, {"k": 1}, [])
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# --- the gguf package as a witness ------------------------------------------------------------------------


def test_reads_what_the_gguf_package_writes(tmp_path: Path) -> None:
    path = tmp_path / "theirs.gguf"
    rng = np.random.default_rng(1)
    floats, halves = rng.standard_normal((3, 64), np.float32), rng.standard_normal(8).astype(np.float16)
    quantised = gguf.quantize(floats, gguf.GGMLQuantizationType.Q8_0)
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_name("Größe")
    writer.add_context_length(4096)
    writer.add_int32("int", -5)
    writer.add_uint64("big", 2**40)
    writer.add_float64("double", 0.1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_add_bos_token(True)
    writer.add_token_list(["a", "▁b", "<0x0A>"])
    writer.add_token_scores([0.0, -1.5, 2.0])
    writer.add_token_types([1, 2, 6])
    writer.add_tensor("floats", floats)
    writer.add_tensor("halves", halves)
    writer.add_tensor("quantised", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    with GGUFFile(path) as file:
        expected: dict[str, Value] = {
            "general.architecture": "phi3",
            "general.name": "Größe",
            "phi3.context_length": 4096,
            "int": -5,
            "big": 2**40,
            "double": np.float64(0.1),
            "phi3.attention.layer_norm_rms_epsilon": float(np.float32(1e-5)),
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.tokens": ["a", "▁b", "<0x0A>"],
            "tokenizer.ggml.scores": np.array([0.0, -1.5, 2.0], np.float32),
            "tokenizer.ggml.token_type": np.array([1, 2, 6], np.int32),
        }
        assert file.metadata.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(file.metadata[key], value)
        shapes = {info.name: (info.shape, info.type) for info in file.tensors.values()}
        assert shapes == {
            "floats": ((64, 3), GGMLType.F32),
            "halves": ((8,), GGMLType.F16),
            "quantised": ((64, 3), GGMLType.Q8_0),
        }
        for name, array in (("floats", floats), ("halves", halves), ("quantised", quantised)):
            assert file.data(name).tobytes() == array.tobytes()


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "ours.gguf"
    matrix = np.arange(64, dtype=np.float32).reshape(2, 32)
    blocks = np.arange(3 * 144, dtype=np.uint32).astype(np.uint8)
    metadata: dict[str, Value | np.generic] = {
        "general.architecture": "phi3",
        "yes": True,
        "small": 7,
        "large": 2**40,
        "negative": -3,
        "real": 0.5,
        "byte": np.uint8(200),
        "words": ["ab", "", "é"],
        "scores": np.array([1.5, -2.0], np.float64),
    }
    write_gguf(
        path,
        metadata,
        [("m", (32, 2), GGMLType.F32, matrix), ("q", (256, 3), GGMLType.Q4_K, blocks)],
        alignment=64,
    )
    reader = gguf.GGUFReader(path)
    kinds = gguf.GGUFValueType
    expected = {
        "general.architecture": (kinds.STRING, "phi3"),
        "yes": (kinds.BOOL, True),
        "small": (kinds.UINT32, 7),
        "large": (kinds.UINT64, 2**40),
        "negative": (kinds.INT32, -3),
        "real": (kinds.FLOAT32, 0.5),
        "byte": (kinds.UINT8, 200),
        "words": (kinds.ARRAY, ["ab", "", "é"]),
        "scores": (kinds.ARRAY, [1.5, -2.0]),
        "general.alignment": (kinds.UINT32, 64),
    }
    for key, (kind, value) in expected.items():
        field = reader.fields[key]
        assert (field.types[0], field.contents()) == (kind, value)
    m, q = reader.tensors
    assert (m.name, m.shape.tolist(), m.tensor_type.name) == ("m", [32, 2], "F32")
    assert (q.name, q.shape.tolist(), q.tensor_type.name) == ("q", [256, 3], "Q4_K")
    np.testing.assert_array_equal(m.data, matrix)
    assert q.data.tobytes() == blocks.tobytes()


# --- damage -----------------------------------------------------------------------------------------------


def small_model() -> bytes:
    return file_bytes(
        pairs=(
            pair(b"general.architecture", STRING, text(b"phi3")),
            pair(b"general.alignment", UINT32, u32(32)),
            pair(b"flag", BOOL, b"\1"),
            pair(b"words", ARRAY, u32(STRING) + u64(3) + text(b"a") + text("é".encode()) + text(b"")),
            pair(b"nested", ARRAY, u32(ARRAY) + u64(1) + u32(UINT32) + u64(2) + u32(1, 2)),
        ),
        records=(record(b"v", (8,), 0, 0), record(b"w", (32, 16), 8, 32)),
        data=bytes(range(32)) + bytes(16 * 34),
    )


def test_a_file_cut_at_any_byte_is_a_load_error(tmp_path: Path) -> None:
    whole = small_model()
    load(tmp_path, whole).close()
    for length in range(len(whole)):
        with pytest.raises(ModelLoadError) as caught:
            load(tmp_path, whole[:length])
        assert isinstance(caught.value, NotGGUFError if length < 4 else TruncatedFileError), length


@settings(max_examples=500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.dictionaries(st.integers(0, len(small_model()) - 1), st.integers(0, 255), min_size=1, max_size=4)
)
def test_changed_bytes_raise_load_errors_or_parse(tmp_path: Path, flips: dict[int, int]) -> None:
    content = bytearray(small_model())
    for position, byte in flips.items():
        content[position] = byte
    try:
        file = load(tmp_path, bytes(content))
    except ModelLoadError:
        return
    with file:
        for name, info in file.tensors.items():
            assert file.data(name).size == info.n_bytes == n_bytes(info.shape, info.type)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(n_tensors=st.integers(0, 3), n_pairs=st.integers(0, 3), rest=st.binary(max_size=200))
def test_random_bytes_after_the_header_raise_load_errors_or_parse(
    tmp_path: Path, n_tensors: int, n_pairs: int, rest: bytes
) -> None:
    with suppress(ModelLoadError):
        load(tmp_path, b"GGUF" + u32(3) + u64(n_tensors, n_pairs) + rest).close()


@pytest.mark.parametrize(
    "content",
    [
        b"GGUF" + u32(3) + u64(U64_MAX, 0),
        b"GGUF" + u32(3) + u64(0, U64_MAX),
        file_bytes(pairs=(u64(60000) + b"key",)),
        file_bytes(pairs=(pair(b"k", STRING, u64(U64_MAX)),)),
        file_bytes(pairs=(pair(b"k", ARRAY, u32(UINT32) + u64(2**62)),)),
        file_bytes(pairs=(pair(b"k", ARRAY, u32(STRING) + u64(2**61)),)),
        file_bytes(pairs=(pair(b"k", ARRAY, u32(STRING) + u64(2) + u64(U64_MAX) + u64(0)),)),
        file_bytes(pairs=(pair(b"k", ARRAY, u32(ARRAY) + u64(2**60)),)),
    ],
    ids=["tensors", "pairs", "key", "string", "numbers", "strings", "string in array", "arrays"],
)
def test_a_length_beyond_the_end_is_a_truncated_file(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(TruncatedFileError) as caught:
        load(tmp_path, content)
    assert caught.value.actual_bytes == len(content) < caught.value.expected_bytes


def test_tensor_data_cut_short_tells_both_sizes(tmp_path: Path) -> None:
    whole = file_bytes(records=(record(b"v", offset=64), record(b"w", offset=0)), data=bytes(96))
    with pytest.raises(TruncatedFileError, match=f"'v'.*{len(whole)}.*{len(whole) - 40}") as caught:
        load(tmp_path, whole[:-40])
    assert caught.value.expected_bytes == len(whole)
    assert caught.value.actual_bytes == len(whole) - 40


DEEP = u32(ARRAY) + u64(1)

CORRUPT = {
    "empty key": (file_bytes(pairs=(pair(b"", UINT32, u32(1)),)), 24),
    "duplicate key": (file_bytes(pairs=(pair(b"k", UINT32, u32(1)),) * 2), 24 + 17),
    "long key": (file_bytes(pairs=(pair(b"k" * 65536, UINT32, u32(1)),)), 24),
    "key not UTF-8": (file_bytes(pairs=(pair(b"\xff", UINT32, u32(1)),)), 24),
    "value type": (file_bytes(pairs=(pair(b"k", 13, u32(1)),)), 24 + 9),
    "element type": (file_bytes(pairs=(pair(b"k", ARRAY, u32(99) + u64(0)),)), 24 + 13),
    "string not UTF-8": (file_bytes(pairs=(pair(b"k", STRING, text(b"\xc3")),)), 24 + 13),
    "element not UTF-8": (
        file_bytes(pairs=(pair(b"k", ARRAY, u32(STRING) + u64(2) + text(b"ok") + text(b"\xff")),)),
        24 + 13 + 12 + 10,
    ),
    "bool": (file_bytes(pairs=(pair(b"k", BOOL, b"\2"),)), 24 + 13),
    "bool in array": (file_bytes(pairs=(pair(b"k", ARRAY, u32(BOOL) + u64(3) + b"\1\3\0"),)), 24 + 25),
    "nesting": (file_bytes(pairs=(pair(b"k", ARRAY, DEEP * 1000 + u32(UINT8) + u64(0)),)), None),
    "alignment 0": (file_bytes(pairs=(pair(b"general.alignment", UINT32, u32(0)),)), None),
    "alignment 4": (file_bytes(pairs=(pair(b"general.alignment", UINT32, u32(4)),)), None),
    "alignment 48": (file_bytes(pairs=(pair(b"general.alignment", UINT32, u32(48)),)), None),
    "alignment text": (file_bytes(pairs=(pair(b"general.alignment", STRING, text(b"32")),)), None),
    "long name": (file_bytes(records=(record(b"n" * 65),), data=bytes(32)), 24),
    "duplicate name": (file_bytes(records=(record(), record(offset=32)), data=bytes(64)), None),
    "no dimensions": (file_bytes(records=(record(shape=()),), data=bytes(32)), 24),
    "five dimensions": (file_bytes(records=(record(shape=(1,) * 5),), data=bytes(32)), 24),
    "zero dimension": (file_bytes(records=(record(shape=(8, 0)),), data=bytes(32)), 24),
    "elements overflow": (file_bytes(records=(record(shape=(2**33, 2**33)),), data=bytes(32)), 24),
    "bytes overflow": (file_bytes(records=(record(shape=(2**62,)),), data=bytes(32)), 24),
    "part of a block": (file_bytes(records=(record(shape=(48, 2), type_id=8),), data=bytes(102)), 24),
    "misaligned": (file_bytes(records=(record(offset=8),), data=bytes(64)), 24),
    "offset overflow": (file_bytes(records=(record(offset=2**64 - 32),), data=bytes(64)), 24),
    "same place": (file_bytes(records=(record(b"v"), record(b"w")), data=bytes(64)), 96),
    "overlap": (
        file_bytes(records=(record(b"v", offset=32), record(b"w", shape=(9,))), data=bytes(64)),
        96 + 32,
    ),
}


@pytest.mark.parametrize(("content", "offset"), CORRUPT.values(), ids=CORRUPT.keys())
def test_contradictions_are_corrupt_and_located(tmp_path: Path, content: bytes, offset: int | None) -> None:
    with pytest.raises(CorruptGGUFError, match="damaged at byte") as caught:
        load(tmp_path, content)
    assert f"byte {caught.value.offset}:" in str(caught.value)
    if offset is not None:
        assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("type_id", "name", "advice"),
    [
        (4, "Q4_2", "GGUF has dropped.*Q4_K_M"),
        (5, "Q4_3", "GGUF has dropped.*Q4_K_M"),
        (31, "Q4_0_4_4", "GGUF has dropped.*Q4_0$"),
        (32, "Q4_0_4_8", "GGUF has dropped.*Q4_0$"),
        (33, "Q4_0_8_8", "GGUF has dropped.*Q4_0$"),
        (36, "IQ4_NL_4_4", "GGUF has dropped.*IQ4_NL$"),
        (37, "IQ4_NL_4_8", "GGUF has dropped.*IQ4_NL$"),
        (38, "IQ4_NL_8_8", "GGUF has dropped.*IQ4_NL$"),
        (1000, "1000", "does not know.*Q4_K_M"),
        (2**32 - 1, "4294967295", "does not know.*Q4_K_M"),
    ],
)
def test_tensor_types_outside_the_format(tmp_path: Path, type_id: int, name: str, advice: str) -> None:
    with pytest.raises(UnsupportedQuantError, match=f"'w' is stored in type {name}, .*{advice}") as caught:
        load(tmp_path, file_bytes(records=(record(type_id=type_id),), data=bytes(32)))
    assert (caught.value.tensor, caught.value.type) == ("w", name)


# --- other files ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "detected", "advice"),
    [
        (b"", "empty", "download"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "git-lfs", "git lfs pull"),
        (b"\n<!DOCTYPE html><html><head>", "html", "log in.*/resolve/"),
        (b"\xef\xbb\xbf<html lang='en'>", "html", "log in"),
        (b"PK\x03\x04\x14\x00", "pytorch", "convert"),
        (b"\x80\x02}q\x00", "pytorch", "convert"),
        (u64(123) + b'{"__metadata__":{}}', "safetensors", "convert"),
        (struct.pack("<I", 0x67676D6C) + bytes(32), "ggml", "before GGUF"),
        (struct.pack("<I", 0x67676A74) + bytes(32), "ggml", "before GGUF"),
        (b"\x1f\x8b\x08\x00", "compressed", "decompress"),
        (b'{"error": "Repository not found"}', "json", "repository not found"),
        (b"GG", "unknown", "starts with"),
        (b"once upon a time", "unknown", "starts with"),
    ],
)
def test_a_file_that_is_not_gguf_is_named(tmp_path: Path, content: bytes, detected: str, advice: str) -> None:
    with pytest.raises(NotGGUFError, match=f"(?s)model.gguf.*{advice}") as caught:
        load(tmp_path, content)
    assert caught.value.detected == detected


@pytest.mark.parametrize(
    ("version", "message"),
    [(0, "version 0"), (1, "version 1.*convert"), (4, "version 4.*update"), (U64_MAX >> 32, "update")],
)
def test_other_versions(tmp_path: Path, version: int, message: str) -> None:
    with pytest.raises(GGUFVersionError, match=message):
        load(tmp_path, file_bytes(version=version))


def test_big_endian(tmp_path: Path) -> None:
    path = tmp_path / "big.gguf"
    writer = gguf.GGUFWriter(path, "phi3", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(GGUFVersionError, match="big-endian"):
        GGUFFile(path)


def test_a_missing_file_or_a_folder_names_the_models_that_are_there(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf", "notes.txt"):
        (tmp_path / name).touch()
    with pytest.raises(ModelNotFoundError, match=r"no file .*c\.gguf; GGUF files in .*: a\.gguf, b\.gguf$"):
        GGUFFile(tmp_path / "c.gguf")
    with pytest.raises(ModelNotFoundError, match=r"is a folder.*: a\.gguf, b\.gguf$"):
        GGUFFile(tmp_path)
    with pytest.raises(FileNotFoundError, match="check the path"):
        GGUFFile(tmp_path / "nowhere" / "c.gguf")


@pytest.mark.parametrize("name", ["nul\0byte.gguf", "x" * 5000])
def test_impossible_paths_are_load_errors(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelLoadError):
        GGUFFile(tmp_path / name)


def test_numbers_of_a_large_file_stay_finite(tmp_path: Path) -> None:
    """Sizes are exact integers: a tensor of 6 GB is reported missing to the byte."""
    shape = (2**20, 1500)
    content = file_bytes(records=(record(shape=shape),))
    with pytest.raises(TruncatedFileError) as caught:
        load(tmp_path, content)
    assert caught.value.expected_bytes == len(content) + 4 * math.prod(shape)
