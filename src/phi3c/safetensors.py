"""The safetensors file format: a checked reader over mmap.

Knows bytes, types and offsets; knows no model. Layout: the length of the header in 8 bytes, the header as
JSON, tensor data. (The package of that name cannot give BF16, which Phi-3 checkpoints are in, to NumPy.)
"""

from __future__ import annotations

import json
import math
import mmap
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from phi3c.errors import CheckpointError, ModelLoadError, TruncatedFileError

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own reader


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: the format's name of its type, shape with rows first, first byte, bytes."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class SafetensorsFile:
    """A safetensors file, mapped read-only. It must not be shortened while it is open.

    Attributes:
        path: the file.
        tensors: name -> StoredTensor, in the header's order.

    Raises:
        CheckpointError: the file is something else, or contradicts the format.
        TruncatedFileError: contents end beyond the end of the file.
        ModelLoadError: the operating system refused to open the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                if size < 8:
                    raise CheckpointError(f"{path} is no safetensors file: it has {size} bytes")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ModelLoadError(f"{path} cannot be opened: {error.strerror or error}") from error
        try:
            self.tensors = self._parse(size)
        except BaseException:
            self.close()
            raise

    def _parse(self, size: int) -> dict[str, StoredTensor]:
        header_bytes = int.from_bytes(self._map[:8], "little")
        if header_bytes > _MAX_HEADER_BYTES:
            raise self._damaged(f"a header of {header_bytes} bytes")
        start = 8 + header_bytes
        self._need(start, size)
        try:
            header = json.loads(self._map[8:start])
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"the header is no JSON ({error})") from None
        if not isinstance(header, dict):
            raise self._damaged("the header is no JSON object")
        tensors = {}
        for name, record in header.items():
            if name != "__metadata__":
                tensors[name] = tensor = self._tensor(name, record, start)
                self._need(tensor.offset + tensor.n_bytes, size)
        return tensors

    def _tensor(self, name: str, record: object, start: int) -> StoredTensor:
        if not isinstance(record, dict):
            raise self._damaged(f"tensor {name!r} is no JSON object")
        dtype, shape, offsets = record.get("dtype"), record.get("shape"), record.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
            raise CheckpointError(
                f"{self.path}: tensor {name!r} has type {dtype!r:.20}, which phi3c does not read"
            )
        if not (_are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2):
            raise self._damaged(f"tensor {name!r} has a shape or offsets that are no lists of whole numbers")
        begin, end = offsets
        if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
            raise self._damaged(f"tensor {name!r}, {dtype} {shape}, lies in bytes {begin} to {end}")
        return StoredTensor(dtype, tuple(shape), start + begin, end - begin)

    def _need(self, end: int, size: int) -> None:
        if end > size:
            raise TruncatedFileError(
                f"{self.path} is cut short: contents end at byte {end}, but the file has {size} bytes; "
                "download or copy it again",
                end,
                size,
            )

    def _damaged(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged: {message}; download or copy it again")

    def data(self, name: str) -> NDArray[np.uint8]:
        """The bytes of tensor `name`: a read-only view of the mapped file."""
        tensor = self.tensors[name]
        return np.frombuffer(self._map, np.uint8, tensor.n_bytes, tensor.offset)

    def close(self) -> None:
        """Let go of the mapping; the last array from `data()` to die unmaps the file."""
        with suppress(BufferError):  # raised while such arrays live
            self._map.close()


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**48 for item in value)
