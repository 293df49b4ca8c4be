"""The packed form of a model file: a GGUF whose matrices are P16 panels (docs/formats.md), and `ModelFile`, which
shows packed and ordinary files to the rest alike.

It is a file of its own architecture, "phi3c", which other readers refuse by name. Each panel tensor is a row of I8;
what it stands for is told by lists in the metadata.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from typing import Final

import numpy as np

from phi3c.errors import CorruptGGUFError, UnsupportedModelError
from phi3c.gguf import BLOCKS, GGMLType, GGUFFile, TensorInfo, Value, n_bytes

ARCHITECTURE: Final = "phi3c"
LAYOUT: Final = "p16"
LAYOUT_VERSION: Final = 1
ALIGNMENT: Final = 64  # bytes; a register of AVX-512, a line of the cache
_PANEL_ROWS: Final = 16


def panel_bytes(tensor: TensorInfo) -> int:
    """Bytes of a matrix's panels: those of its blocks, the rows rounded up to whole panels."""
    rows = -(-tensor.rows // _PANEL_ROWS) * _PANEL_ROWS
    return n_bytes((tensor.columns, rows), tensor.type)


def packed_metadata(file: GGUFFile, packed: Iterable[TensorInfo]) -> dict[str, Value]:
    """Metadata of the file that holds these tensors of `file` as panels, and its others as they are."""
    packed = list(packed)
    return {
        **file.metadata,
        "general.architecture": ARCHITECTURE,
        "phi3c.layout": LAYOUT,
        "phi3c.layout_version": LAYOUT_VERSION,
        "phi3c.source": file.path.name,
        "phi3c.architecture": file.metadata["general.architecture"],
        "phi3c.packed.names": [tensor.name for tensor in packed],
        "phi3c.packed.types": np.array([tensor.type for tensor in packed], np.uint32),
        "phi3c.packed.columns": np.array([tensor.columns for tensor in packed], np.uint64),
        "phi3c.packed.rows": np.array([tensor.rows for tensor in packed], np.uint64),
    }


class ModelFile(GGUFFile):
    """A GGUF file as the model sees it, whether its matrices are packed already or not.

    For a packed file, `metadata["general.architecture"]` and the names, shapes and types in `tensors` are those of
    the file it was packed from. `n_bytes`, `offset` and `data()` of a packed tensor are those of its panels.

    Attributes:
        layout: for example "p16 version 1", None for an ordinary file.
        packed: names of the tensors that are panels.

    Raises:
        UnsupportedModelError: packed in another layout, or in another version of it.
        CorruptGGUFError: what the file says of its panels contradicts itself.
        And what GGUFFile raises.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path)
        self.layout: str | None = None
        self.packed: frozenset[str] = frozenset()
        if self.metadata.get("general.architecture") == ARCHITECTURE:
            try:
                self._read_layout()
            except BaseException:
                self.close()
                raise

    def _read_layout(self) -> None:
        get = self.metadata.get
        layout, version = get("phi3c.layout"), get("phi3c.layout_version")
        if layout != LAYOUT or version != LAYOUT_VERSION:
            source = reprlib.repr(get("phi3c.source", "the original file"))
            raise UnsupportedModelError(
                f"{self.path} is packed in layout {reprlib.repr(layout)} version {reprlib.repr(version)}, this "
                f"version of phi3c reads {LAYOUT} version {LAYOUT_VERSION}; pack it again from {source}"
            )
        names = get("phi3c.packed.names")
        numbers = [get(f"phi3c.packed.{column}") for column in ("types", "columns", "rows")]
        if not isinstance(names, list) or not all(
            isinstance(column, np.ndarray) and column.dtype.kind == "u" and len(column) == len(names)
            for column in numbers
        ):
            raise self._damaged("the lists phi3c.packed.* are missing, of other types or of different lengths")
        for name, type_id, columns, rows in zip(
            names, *(column.tolist() for column in numbers if isinstance(column, np.ndarray)), strict=True
        ):
            self._show_packed(name, type_id, columns, rows)
        self.packed = frozenset(names)
        if len(self.packed) < len(names):
            raise self._damaged("phi3c.packed.names has a name twice")
        self.layout = f"{LAYOUT} version {LAYOUT_VERSION}"
        self.metadata["general.architecture"] = get("phi3c.architecture", "")

    def _show_packed(self, name: object, type_id: int, columns: int, rows: int) -> None:
        stored = self.tensors.get(name) if isinstance(name, str) else None
        if stored is None:
            raise self._damaged(f"there is no tensor {reprlib.repr(name)}, of which it has panels")
        if stored.type is not GGMLType.I8 or len(stored.shape) != 1:
            raise self._damaged(f"panels {stored.name} are no row of I8", stored.offset)
        if stored.offset % ALIGNMENT:
            raise self._damaged(f"panels {stored.name} are not aligned to {ALIGNMENT}", stored.offset)
        if type_id not in BLOCKS or columns % BLOCKS[GGMLType(type_id)][0] or columns < 1 or rows < 1:
            raise self._damaged(f"panels {stored.name} of type {type_id}, {columns} x {rows}", stored.offset)
        tensor = TensorInfo(stored.name, (columns, rows), GGMLType(type_id), stored.offset, stored.n_bytes)
        if panel_bytes(tensor) != stored.n_bytes:
            raise self._damaged(
                f"panels {name} of {tensor.type.name}, {columns} x {rows}, take {panel_bytes(tensor)} bytes, "
                f"not {stored.n_bytes}",
                stored.offset,
            )
        self.tensors[stored.name] = tensor

    def _damaged(self, message: str, offset: int = 0) -> CorruptGGUFError:
        return CorruptGGUFError(f"{self.path} is damaged: {message}; pack the model again", offset)
