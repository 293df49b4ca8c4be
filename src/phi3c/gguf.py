"""The GGUF file format, versions 2 and 3, little-endian: a checked reader over mmap, and a writer.

Knows bytes, types and offsets; knows no model. Layout: 24-byte header, key/value pairs, tensor records,
padding to `alignment`, tensor data. Every length is compared with the bytes that remain before it is used.
"""

from __future__ import annotations

import math
import mmap
import os
import reprlib
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from phi3c.atomic import replacing, require_space
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

Array: TypeAlias = "npt.NDArray[np.generic] | list[str] | list[Array]"
Value: TypeAlias = "bool | int | float | str | Array"
Buffer: TypeAlias = "bytes | bytearray | memoryview | npt.NDArray[np.generic]"
Data: TypeAlias = "Buffer | Callable[[], Buffer]"

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_KEY_BYTES = 65535
_MAX_NAME_BYTES = 64
_MAX_DIMS = 4
_MAX_NESTING = 4  # arrays in arrays; no known file goes beyond 2
_INT64_MAX = 2**63 - 1

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


class GGMLType(IntEnum):
    """How a tensor's elements are stored; the ids of the format (gaps are types it has dropped)."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41


# type id -> (its name, the type that took its place): in files of 2023 and 2024
_DROPPED = {
    4: ("Q4_2", "Q4_K_M"),
    5: ("Q4_3", "Q4_K_M"),
    31: ("Q4_0_4_4", "Q4_0"),
    32: ("Q4_0_4_8", "Q4_0"),
    33: ("Q4_0_8_8", "Q4_0"),
    36: ("IQ4_NL_4_4", "IQ4_NL"),
    37: ("IQ4_NL_4_8", "IQ4_NL"),
    38: ("IQ4_NL_8_8", "IQ4_NL"),
}

# type -> (elements per block, bytes per block)
BLOCKS: dict[GGMLType, tuple[int, int]] = {
    GGMLType.F32: (1, 4),
    GGMLType.F16: (1, 2),
    GGMLType.Q4_0: (32, 18),
    GGMLType.Q4_1: (32, 20),
    GGMLType.Q5_0: (32, 22),
    GGMLType.Q5_1: (32, 24),
    GGMLType.Q8_0: (32, 34),
    GGMLType.Q8_1: (32, 40),
    GGMLType.Q2_K: (256, 84),
    GGMLType.Q3_K: (256, 110),
    GGMLType.Q4_K: (256, 144),
    GGMLType.Q5_K: (256, 176),
    GGMLType.Q6_K: (256, 210),
    GGMLType.Q8_K: (256, 292),
    GGMLType.IQ2_XXS: (256, 66),
    GGMLType.IQ2_XS: (256, 74),
    GGMLType.IQ3_XXS: (256, 98),
    GGMLType.IQ1_S: (256, 50),
    GGMLType.IQ4_NL: (32, 18),
    GGMLType.IQ3_S: (256, 110),
    GGMLType.IQ2_S: (256, 82),
    GGMLType.IQ4_XS: (256, 136),
    GGMLType.I8: (1, 1),
    GGMLType.I16: (1, 2),
    GGMLType.I32: (1, 4),
    GGMLType.I64: (1, 8),
    GGMLType.F64: (1, 8),
    GGMLType.IQ1_M: (256, 56),
    GGMLType.BF16: (1, 2),
    GGMLType.TQ1_0: (256, 54),
    GGMLType.TQ2_0: (256, 66),
    GGMLType.MXFP4: (32, 17),
    GGMLType.NVFP4: (64, 36),
    GGMLType.Q1_0: (128, 18),
}


class _ValueType(IntEnum):
    """Type ids of metadata values."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_DTYPES: dict[_ValueType, np.dtype[np.generic]] = {
    _ValueType.UINT8: np.dtype("<u1"),
    _ValueType.INT8: np.dtype("<i1"),
    _ValueType.UINT16: np.dtype("<u2"),
    _ValueType.INT16: np.dtype("<i2"),
    _ValueType.UINT32: np.dtype("<u4"),
    _ValueType.INT32: np.dtype("<i4"),
    _ValueType.FLOAT32: np.dtype("<f4"),
    _ValueType.BOOL: np.dtype("?"),
    _ValueType.UINT64: np.dtype("<u8"),
    _ValueType.INT64: np.dtype("<i8"),
    _ValueType.FLOAT64: np.dtype("<f8"),
}
_VALUE_TYPES = {dtype: value_type for value_type, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies and how it is stored.

    Attributes:
        name: for example "blk.0.attn_qkv.weight".
        shape: in the file's order: shape[0] elements are contiguous and make one row.
        type: storage type of the elements.
        offset: first byte, counted from the start of the file.
        n_bytes: length of the data, without padding.
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    offset: int
    n_bytes: int

    @property
    def columns(self) -> int:
        """Elements of one row."""
        return self.shape[0]

    @property
    def rows(self) -> int:
        """Number of rows, all dimensions but the first taken together."""
        return math.prod(self.shape[1:])


class TensorSource(Protocol):
    """What a model can be described from: a GGUF file, or something that could become one."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of tensor `name`."""


def n_bytes(shape: Sequence[int], type: GGMLType) -> int:
    """Bytes that a tensor of this shape (shape[0] contiguous, a multiple of the block) takes in this type."""
    block_elements, block_bytes = BLOCKS[type]
    return math.prod(shape) // block_elements * block_bytes


class GGUFFile:
    """A GGUF file, mapped read-only: metadata and tensor table are parsed, tensor data stays in the file.

    Use as a context manager, or call `close()`. The file must not be shortened while it is open: the
    operating system answers a read of vanished mapped bytes with SIGBUS, which Python cannot catch.

    Attributes:
        path: the file.
        version: 2 or 3.
        alignment: tensor data begins at multiples of this many bytes.
        metadata: key -> value, in file order. Scalars are bool, int, float or str; arrays of numbers and of
            bools are 1-D numpy arrays, arrays of strings `list[str]`, arrays of arrays lists.
        tensors: name -> TensorInfo, in file order.

    Raises:
        ModelNotFoundError: no such file; the message lists the GGUF files that are there.
        NotGGUFError: the file is something else; `detected` says what.
        GGUFVersionError: version 1, a version newer than 3, or big-endian.
        TruncatedFileError: contents end beyond the end of the file.
        CorruptGGUFError: the contents contradict the format; `offset` says where.
        UnsupportedQuantError: a tensor type that is not (or no longer) in the format.
        ModelLoadError: the operating system refused to open the file.

    Source: the GGUF specification, ggml project, docs/gguf.md.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Value] = {}
        self.tensors: dict[str, TensorInfo] = {}
        self._map: mmap.mmap | None = _map_file(self.path)
        try:
            self._parse(_Reader(self.path, self._map))
        except BaseException:
            self.close()
            raise

    def data(self, name: str) -> npt.NDArray[np.uint8]:
        """The bytes of tensor `name`: a 1-D read-only uint8 view of the mapped file, not a copy.

        Raises:
            KeyError: no such tensor.
            ModelClosedError: the file was closed.
        """
        info = self.tensors[name]
        return self._bytes(info.offset, info.offset + info.n_bytes, name)

    def _bytes(self, start: int, end: int, what: str) -> npt.NDArray[np.uint8]:
        if self._map is None:
            raise ModelClosedError(f"{self.path} was closed; open it again to read {what}")
        return np.frombuffer(self._map, np.uint8, end - start, start)

    def prefetch(self, name: str) -> None:
        """Have the system begin to read the tensor from disk, where it is not in memory already."""
        self._advise(name, "MADV_WILLNEED")

    def release(self, name: str) -> None:
        """Let the system drop the tensor's pages from this process; they may be read again, at a cost."""
        self._advise(name, "MADV_DONTNEED")

    def _advise(self, name: str, advice: str) -> None:
        """Advise the whole pages of a tensor, where the system has such advice."""
        if self._map is not None and hasattr(mmap, advice):
            info = self.tensors[name]
            start = -(-info.offset // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (info.offset + info.n_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
            if end > start:
                self._map.madvise(getattr(mmap, advice), start, end - start)

    def close(self) -> None:
        """Let go of the mapping. Arrays from `data()` stay valid; the last of them to die unmaps the file."""
        if self._map is not None:
            with suppress(BufferError):  # raised while such arrays live
                self._map.close()
            self._map = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _parse(self, reader: _Reader) -> None:
        self.version = reader.version()
        n_tensors, n_pairs = reader.u64("the tensor count"), reader.u64("the metadata count")

        for _ in range(n_pairs):
            start = reader.pos
            key = reader.string("a metadata key", _MAX_KEY_BYTES)
            if not key or key in self.metadata:
                raise reader.corrupt(f"metadata key {reprlib.repr(key)} is empty or appears twice", start)
            self.metadata[key] = reader.value(reader.value_type())
        self.alignment = self._check_alignment(reader)

        records = [self._tensor(reader) for _ in range(n_tensors)]
        data_start = reader.pos + -reader.pos % self.alignment
        for info in records:
            if info.name in self.tensors:
                raise reader.corrupt(f"two tensors are named {info.name!r}", data_start + info.offset)
            self.tensors[info.name] = replace(info, offset=data_start + info.offset)
        self._check_extents(reader)

    def _check_alignment(self, reader: _Reader) -> int:
        alignment = self.metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not _is_alignment(alignment):
            raise reader.corrupt(
                f"general.alignment is {reprlib.repr(alignment)}, not a power of two from 8 up", reader.pos
            )
        return alignment

    def _tensor(self, reader: _Reader) -> TensorInfo:
        """Read one tensor record; its offset is still relative to the start of the data."""
        start = reader.pos
        name = reader.string("a tensor name", _MAX_NAME_BYTES)
        n_dims = reader.u32(f"the number of dimensions of {name!r}")
        if not 1 <= n_dims <= _MAX_DIMS:
            raise reader.corrupt(f"tensor {name!r} has {n_dims} dimensions, not 1 to {_MAX_DIMS}", start)
        shape = tuple(reader.u64(f"the shape of {name!r}") for _ in range(n_dims))
        type_id = reader.u32(f"the type of {name!r}")
        offset = reader.u64(f"the offset of {name!r}")
        try:
            type = GGMLType(type_id)
        except ValueError:
            type_name, instead = _DROPPED.get(type_id, (str(type_id), "Q4_K_M"))
            verdict = "GGUF has dropped" if type_id in _DROPPED else "this version of phi3c does not know"
            raise UnsupportedQuantError(
                f"{self.path}: tensor {name!r} is stored in type {type_name}, which {verdict}; use the model "
                f"in another quantisation, such as {instead}",
                name,
                type_name,
            ) from None
        if fault := _shape_fault(shape, type):
            raise reader.corrupt(f"tensor {name!r}: {fault}", start)
        if offset % self.alignment:
            raise reader.corrupt(f"tensor {name!r}: {offset} is no multiple of {self.alignment}", start)
        if offset > _INT64_MAX:
            raise reader.corrupt(f"tensor {name!r}: offset {offset} exceeds 63 bits", start)
        return TensorInfo(name, shape, type, offset, n_bytes(shape, type))

    def _check_extents(self, reader: _Reader) -> None:
        by_offset = sorted(self.tensors.values(), key=lambda info: info.offset)
        for before, after in pairwise(by_offset):
            if before.offset + before.n_bytes > after.offset:
                raise reader.corrupt(f"tensors {before.name!r} and {after.name!r} overlap", after.offset)
        if by_offset:
            reader.pos = by_offset[-1].offset
            reader.need(by_offset[-1].n_bytes, f"tensor {by_offset[-1].name!r}")


def _is_alignment(alignment: int) -> bool:
    return alignment >= 8 and alignment & (alignment - 1) == 0


def _shape_fault(shape: Sequence[int], type: GGMLType) -> str | None:
    """What is wrong with storing this shape in this type, or None."""
    block_elements, _ = BLOCKS[type]
    if 0 in shape:
        return f"a dimension of {tuple(shape)} is zero"
    if shape[0] % block_elements:
        return f"rows of {shape[0]} elements are no whole number of {type.name} blocks of {block_elements}"
    if max(math.prod(shape), n_bytes(shape, type)) > _INT64_MAX:
        return f"the size of {tuple(shape)} overflows 63 bits"
    return None


class _Reader:
    """A position in a mapped file; reads little-endian fields there and never past the end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.pos = 0

    def need(self, length: int, what: str) -> None:
        if length > self.size - self.pos:
            raise TruncatedFileError(
                f"{self.path} is cut short: {what} at byte {self.pos} ends at byte {self.pos + length}, "
                f"but the file has {self.size} bytes; download or copy it again",
                self.pos + length,
                self.size,
            )

    def corrupt(self, message: str, offset: int) -> CorruptGGUFError:
        return CorruptGGUFError(
            f"{self.path} is damaged at byte {offset}: {message}; download or convert the model again", offset
        )

    def version(self) -> int:
        """Check magic and version, the first eight bytes."""
        if self.data[:4] != _MAGIC:
            detected, advice = _identify(self.data[:512])
            raise NotGGUFError(f"{self.path} is not a GGUF file: {advice}", detected)
        self.pos = 4
        version = self.u32("the version")
        if version in _VERSIONS:
            return version
        if version and version & 0xFFFF == 0:
            raise GGUFVersionError(
                f"{self.path} is big-endian, phi3c reads little-endian GGUF only; "
                "download or convert a little-endian file"
            )
        raise GGUFVersionError(
            f"{self.path} is GGUF version {version}, phi3c reads versions 2 and 3; "
            + ("convert the model again" if version < 2 else "update phi3c")
        )

    def u32(self, what: str) -> int:
        self.need(4, what)
        (number,) = _U32.unpack_from(self.data, self.pos)
        self.pos += 4
        return int(number)

    def u64(self, what: str) -> int:
        self.need(8, what)
        (number,) = _U64.unpack_from(self.data, self.pos)
        self.pos += 8
        return int(number)

    def string(self, what: str, max_bytes: int = 2**64 - 1) -> str:
        start = self.pos
        length = self.u64(what)
        if length > max_bytes:
            raise self.corrupt(f"{what} of {length} bytes, at most {max_bytes} are allowed", start)
        self.need(length, what)
        self.pos += length
        try:
            return str(self.data[self.pos - length : self.pos], "utf-8")
        except UnicodeDecodeError as error:
            raise self.corrupt(f"{what} is not UTF-8", start) from error

    def strings(self, count: int) -> list[str]:
        """Read `count` strings: vocabularies have 200 000, hence one loop without calls into this class."""
        self.need(8 * count, f"an array of {count} strings")
        data, size, unpack_length = self.data, self.size, _U64.unpack_from
        end = self.pos
        texts = []
        try:
            for _ in range(count):
                self.pos = end
                start = end + 8
                end = start + unpack_length(data, end)[0]
                if end > size:
                    break
                texts.append(str(data[start:end], "utf-8"))
        except (struct.error, UnicodeDecodeError):
            end = size + 1
        if end > size:
            self.string("a string of an array")  # the same bytes again, with the checks that name the fault
        self.pos = end
        return texts

    def numbers(self, value_type: _ValueType, count: int) -> npt.NDArray[np.generic]:
        """Read `count` numbers or bools into an array of their own."""
        dtype = _DTYPES[value_type]
        self.need(count * dtype.itemsize, f"{count} x {value_type.name}")
        if value_type is _ValueType.BOOL and self.data[self.pos : self.pos + count].strip(b"\0\1"):
            raise self.corrupt("a bool that is neither 0 nor 1", self.pos)
        numbers: npt.NDArray[np.generic] = np.frombuffer(self.data, dtype, count, self.pos).copy()
        self.pos += numbers.nbytes
        return numbers

    def value_type(self) -> _ValueType:
        start = self.pos
        type_id = self.u32("a value type")
        try:
            return _ValueType(type_id)
        except ValueError:
            raise self.corrupt(f"value type {type_id} does not exist", start) from None

    def value(self, value_type: _ValueType) -> Value:
        if value_type is _ValueType.STRING:
            return self.string("a metadata string")
        if value_type is _ValueType.ARRAY:
            return self.array(depth=1)
        scalar = self.numbers(value_type, 1)[0]
        if isinstance(scalar, np.float64):
            return scalar  # is a float too, and its type says that it may not fit FLOAT32 when it is written
        plain: bool | int | float = scalar.item()
        return plain

    def array(self, depth: int) -> Array:
        start = self.pos
        element_type, count = self.value_type(), self.u64("the length of an array")
        if element_type is _ValueType.STRING:
            return self.strings(count)
        if element_type is not _ValueType.ARRAY:
            return self.numbers(element_type, count)
        if depth == _MAX_NESTING:
            raise self.corrupt(f"arrays nested more than {_MAX_NESTING} deep", start)
        self.need(12 * count, f"an array of {count} arrays")
        return [self.array(depth + 1) for _ in range(count)]


def _map_file(path: Path) -> mmap.mmap:
    try:
        is_file = path.is_file()
        if is_file:
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_size:
                    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be opened: {error.strerror or error}") from error
    if is_file:
        raise NotGGUFError(f"{path} is empty; download or copy it again", "empty")
    raise ModelNotFoundError(_what_is_there(path))


def _what_is_there(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    problem = f"{path} is a folder, not a GGUF file" if path.is_dir() else f"there is no file {path}"
    found = sorted(entry.name for entry in folder.glob("*.gguf")) if folder.is_dir() else []
    if found:
        return f"{problem}; GGUF files in {folder}: {', '.join(found)}"
    return f"{problem}, nor any other *.gguf in {folder}; check the path"


def _identify(head: bytes) -> tuple[str, str]:
    """Tell what a file that is not GGUF is: a short name for `detected`, and what to do about it."""
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        return "git-lfs", "it is a git-lfs pointer, the model itself was not fetched; run `git lfs pull`"
    if text.startswith((b"<!doctype html", b"<html")):
        return "html", (
            "it is a web page, the address answered with one instead of the model; "
            "log in, or use the file's /resolve/ (not /blob/) link"
        )
    if head.startswith((b"PK\x03\x04", b"\x80\x02")):
        return "pytorch", "it is a ZIP archive or pickle, as PyTorch writes; convert the model to GGUF"
    if head[5:9] == b"\0\0\0{":  # JSON after a 64-bit header length
        return "safetensors", "it is a safetensors file; convert the model to GGUF or download a GGUF of it"
    if head.startswith((b"lmgg", b"fmgg", b"tjgg", b"algg")):
        return "ggml", "it is a GGML/GGJT file, the format before GGUF; download a GGUF of the model"
    if head.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        return "compressed", "it is gzip or zstd data; decompress it first"
    if text.startswith(b"{"):
        return "json", f"it is JSON, perhaps a server's error message: {text[:80].decode('utf-8', 'replace')}"
    return "unknown", f"it starts with {head[:4]!r} instead of {_MAGIC!r}; check where it came from"


def write_gguf(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Value | np.generic],
    tensors: Iterable[tuple[str, Sequence[int], GGMLType, Data]],
    alignment: int = _DEFAULT_ALIGNMENT,
    version: int = 3,
) -> None:
    """Write a GGUF file, whole or not at all: into a temporary file beside it, synced, then renamed.

    Args:
        path: where to; an existing file is replaced.
        metadata: key -> value. bool, int (UINT32, else the first of INT32, UINT64, INT64 that fits), float
            (FLOAT32), str, list of str, list of lists; numpy scalars and 1-D arrays keep their dtype.
        tensors: (name, shape in the file's order, type, data). Data is C-contiguous, or a function that makes
            it, called when its turn to be written comes; it is let go of before the next one.
        alignment: power of two from 8 up. Stored as general.alignment if it is not the default 32.
        version: 2 or 3.

    Raises:
        InvalidParameterError: a value, shape or data length that the format cannot hold.
        OSError: the operating system refused to write, or there is no room for the file.
    """
    path = Path(path)
    if not _is_alignment(alignment) or version not in _VERSIONS:
        raise InvalidParameterError(
            f"alignment {alignment} must be a power of two from 8 up, and version {version} 2 or 3"
        )
    if alignment != _DEFAULT_ALIGNMENT or "general.alignment" in metadata:
        metadata = {**metadata, "general.alignment": alignment}
    tensors = list(tensors)

    header = bytearray(struct.pack("<4sIQQ", _MAGIC, version, len(tensors), len(metadata)))
    for key, value in metadata.items():
        value_type, payload = _encode(value)
        header += _encode_string(key) + _U32.pack(value_type) + payload
    offset = 0
    for name, shape, type, data in tensors:
        fault = _shape_fault(shape, type) if 1 <= len(shape) <= _MAX_DIMS else f"{len(shape)} dimensions"
        if fault:
            raise InvalidParameterError(f"tensor {name!r}: {fault}")
        if not callable(data):
            _content(name, shape, type, data)  # refuses a wrong length before anything is written
        header += _encode_string(name) + _U32.pack(len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        header += _U32.pack(type) + _U64.pack(offset)
        size = n_bytes(shape, type)
        offset += size + -size % alignment

    require_space(path.parent, len(header) + offset)
    with replacing(path) as file:
        file.write(header)
        file.write(bytes(-len(header) % alignment))
        for name, shape, type, data in tensors:
            content = _content(name, shape, type, data() if callable(data) else data)
            file.write(content.data)
            file.write(bytes(-content.size % alignment))
            del content


def _content(name: str, shape: Sequence[int], type: GGMLType, data: Buffer) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor's data, as many as shape and type ask for."""
    content, size = np.frombuffer(data, np.uint8), n_bytes(shape, type)
    if content.size != size:
        raise InvalidParameterError(
            f"tensor {name!r}: {type.name} {tuple(shape)} takes {size} bytes, not {content.size}"
        )
    return content


def _encode_string(text: str) -> bytes:
    data = text.encode()
    return _U64.pack(len(data)) + data


def _encode(value: Value | np.generic) -> tuple[_ValueType, bytes]:
    """Value type and little-endian payload of a metadata value."""
    if isinstance(value, str):
        return _ValueType.STRING, _encode_string(value)
    if isinstance(value, list):
        return _ValueType.ARRAY, _encode_list(value)
    if not isinstance(value, np.ndarray | np.generic):
        value = _as_numpy(value)
    value_type = _VALUE_TYPES.get(value.dtype.newbyteorder("<"))
    if value_type is None or value.ndim > 1:
        raise InvalidParameterError(f"GGUF metadata cannot hold a {value.ndim}-D {value.dtype}")
    payload = value.astype(_DTYPES[value_type]).tobytes()
    if value.ndim == 0:
        return value_type, payload
    return _ValueType.ARRAY, _U32.pack(value_type) + _U64.pack(value.size) + payload


def _encode_list(items: Sequence[Value]) -> bytes:
    encoded = [_encode(item) for item in items]
    element_types = {value_type for value_type, _ in encoded} or {_ValueType.STRING}
    if len(element_types) > 1 or not element_types <= {_ValueType.STRING, _ValueType.ARRAY}:
        raise InvalidParameterError(
            f"a list in GGUF metadata holds strings or lists: make {reprlib.repr(items)} a numpy array"
        )
    return _U32.pack(element_types.pop()) + _U64.pack(len(items)) + b"".join(data for _, data in encoded)


def _as_numpy(value: bool | int | float) -> np.generic:
    if isinstance(value, bool):
        return np.bool_(value)
    if isinstance(value, float):
        return np.float32(value)
    for dtype in (np.uint32, np.int32, np.uint64, np.int64):
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return dtype(value)
    raise InvalidParameterError(f"{value} does not fit 64 bits")
