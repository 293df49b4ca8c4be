"""Packed files: GGUFs whose matrices are P16 panels (docs/formats.md). `ModelFile` reads them and others.

A packed file has an architecture of its own, "phi3c", which other readers refuse by name. The panels of a
matrix are one row of I8; lists in the metadata tell what it stands for.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable
from typing import Final

import numpy as np
import numpy.typing as npt

from phi3c.errors import CorruptGGUFError, UnsupportedModelError
from phi3c.gguf import BLOCKS, GGMLType, GGUFFile, TensorInfo, Value, n_bytes

ARCHITECTURE: Final = "phi3c"
LAYOUT: Final = "p16"
LAYOUT_VERSION: Final = 1
ALIGNMENT: Final = 64  # bytes; a register of AVX-512, a line of the cache
_PANEL_ROWS: Final = 16
_PAGES: Final = 65536  # bytes; a whole number of any system's pages


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

    For a packed file, `metadata["general.architecture"]` and the names, shapes and types in `tensors` are
    those of the file it was packed from. `n_bytes`, `offset` and `data()` of a packed tensor are its panels'.

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
        architecture = self.metadata.get("general.architecture")
        if isinstance(architecture, str) and architecture == ARCHITECTURE:
            try:
                self._read_layout()
            except BaseException:
                self.close()
                raise

    def panels(self) -> npt.NDArray[np.uint8]:
        """The mapped file from its first panel to its last, from a whole page on; nothing if none is packed.

        Raises:
            ModelClosedError: the file was closed.
        """
        if not self.packed:
            return np.empty(0, np.uint8)
        tensors = [self.tensors[name] for name in self.packed]
        start = min(tensor.offset for tensor in tensors) // _PAGES * _PAGES
        end = max(tensor.offset + tensor.n_bytes for tensor in tensors)
        return self._bytes(start, end, "its panels")

    def _read_layout(self) -> None:
        get = self.metadata.get
        layout, version = get("phi3c.layout"), get("phi3c.layout_version")
        if not (
            isinstance(layout, str) and type(version) is int and (layout, version) == (LAYOUT, LAYOUT_VERSION)
        ):
            source = reprlib.repr(get("phi3c.source", "the original file"))
            raise UnsupportedModelError(
                f"{self.path} is packed in layout {layout!r:.20} version {version!r:.20}, this phi3c reads "
                f"{LAYOUT} version {LAYOUT_VERSION}; pack it again from {source}"
            )
        names = [name for name in _list(get("phi3c.packed.names")) if isinstance(name, str)]
        types, columns, rows = (_list(get(f"phi3c.packed.{what}")) for what in ("types", "columns", "rows"))
        if not len(set(names)) == len(types) == len(columns) == len(rows) == len(names):
            raise self._damaged(
                "the lists phi3c.packed.* are missing, of unequal lengths, or name a tensor twice"
            )
        for name, *numbers in zip(names, types, columns, rows, strict=True):
            self.tensors[name] = self._packed_tensor(name, *numbers)
        self.packed = frozenset(names)
        self.layout = f"{LAYOUT} version {LAYOUT_VERSION}"
        self.metadata["general.architecture"] = get("phi3c.architecture", "")

    def _packed_tensor(self, name: str, type_id: object, columns: object, rows: object) -> TensorInfo:
        """What the panels called `name` stand for, if they can."""
        stored = self.tensors.get(name)
        if stored is None:
            raise self._damaged(f"there is no tensor {reprlib.repr(name)}, of which it has panels")
        if stored.type is not GGMLType.I8 or len(stored.shape) != 1:
            raise self._damaged(f"panels {name} are no row of I8", stored.offset)
        if stored.offset % ALIGNMENT:
            raise self._damaged(f"panels {name} are not aligned to {ALIGNMENT}", stored.offset)
        if not (isinstance(type_id, int) and isinstance(columns, int) and isinstance(rows, int)):
            raise self._damaged(f"panels {name} have a type or size that is no whole number", stored.offset)
        if type_id not in BLOCKS or columns % BLOCKS[GGMLType(type_id)][0] or columns < 1 or rows < 1:
            raise self._damaged(
                f"panels {name} are said to be {columns} x {rows} of type {type_id}", stored.offset
            )
        tensor = TensorInfo(name, (columns, rows), GGMLType(type_id), stored.offset, stored.n_bytes)
        if panel_bytes(tensor) != stored.n_bytes:
            raise self._damaged(
                f"panels {name} of {tensor.type.name}, {columns} x {rows}, take {panel_bytes(tensor)} bytes, "
                f"not {stored.n_bytes}",
                stored.offset,
            )
        return tensor

    def _damaged(self, message: str, offset: int = 0) -> CorruptGGUFError:
        return CorruptGGUFError(f"{self.path} is damaged: {message}; pack the model again", offset)


def _list(value: object) -> list[object]:
    """The elements of a metadata array; of anything else, none."""
    elements = value.tolist() if isinstance(value, np.ndarray) else value
    return elements if isinstance(elements, list) else []
