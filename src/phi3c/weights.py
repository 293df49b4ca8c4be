"""Weights as the kernels take them: packed on loading, or borrowed from a packed file; `pack` writes one."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from threading import Thread

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .config import Config
from .errors import (
    InvalidParameterError,
    ModelWriteError,
    OutOfMemoryError,
    UnsupportedModelError,
    UnsupportedQuantError,
)
from .gguf import Data, GGMLType, TensorInfo, write_gguf
from .memory import total_memory
from .packed import ALIGNMENT, ModelFile, packed_metadata, panel_bytes
from .threads import default_threads
from .vocabulary import SPM_MERGES, spm_merges

Progress = Callable[[str, int, int], None]


class Weights:
    """The tensors of a file in the forms the kernels take; a matrix may be asked for once.

    Matrices of an ordinary file are packed into one arena, in the order they are asked for; the file is read
    ahead by one tensor, and its pages are given back once packed. Those of a packed file stay where they are.

    Args:
        progress: called with ("pack", bytes done, bytes in all) while weights are packed.

    Attributes:
        n_bytes: of all matrices, packed.

    Raises:
        UnsupportedQuantError: a tensor is of a type without kernels.
        OutOfMemoryError: the weights do not fit.
    """

    def __init__(
        self, file: ModelFile, config: Config, pool: _kernels.Pool, progress: Progress | None = None
    ) -> None:
        self._file, self._config, self._pool, self._progress = file, config, pool, progress
        tensors = matrices(file, config)
        self.n_bytes = packed_bytes(file, config)
        memory = total_memory()
        if memory is not None and self.n_bytes > memory:
            raise OutOfMemoryError(
                f"{file.path}: the weights take {self.n_bytes / 1e9:.1f} GB, this machine has "
                f"{memory / 1e9:.1f} GB; use a smaller model or one with fewer bits per weight"
            )
        self._done = 0
        self._following = dict(pairwise(tensor.name for tensor in tensors))
        self._arena: _kernels.Arena | None = None
        if not file.layout:
            try:
                self._arena = _kernels.Arena(self.n_bytes)
            except MemoryError as error:
                raise OutOfMemoryError(f"{file.path}: {error}") from None

    def vector(self, name: str) -> _kernels.Rows:
        """A norm's weights, (1, columns)."""
        tensor = self._file.tensors[name]
        rows = _kernels.Rows(1, tensor.columns)
        _kernels.embed(rows, self._file.data(name), tensor.type, np.zeros(1, np.int64))
        return rows

    def matrix(self, *names: str) -> _kernels.Matrix:
        """The tensors' rows below one another."""
        matrix = _kernels.Matrix(self._arena, self._file.tensors[names[0]].columns)
        for name in names:
            tensor, data = self._file.tensors[name], self._file.data(name)
            if self._arena is None:
                matrix.append_packed(data, tensor.type, tensor.rows)
                continue
            if name in self._following:
                self._file.prefetch(self._following[name])
            matrix.append(data, tensor.type, tensor.rows, row_order(self._config, tensor), self._pool)
            self._file.release(name)
            self._done += _kernels.packed_bytes(tensor.type, tensor.rows, tensor.columns)
            if self._progress:
                self._progress("pack", self._done, self.n_bytes)
        return matrix


class ReadAhead:
    """Maps a packed file's panels into this process, on a thread of its own, from now until `close()`.

    The first token needs all of them, and faults take longer than its arithmetic; while the tokenizer is
    built, nothing else runs. Ordinary files are read when they are packed.
    """

    def __init__(self, file: ModelFile) -> None:
        self._reader = _kernels.ReadAhead()
        self._thread = Thread(
            target=self._reader.run, args=(file.panels(),), name="phi3c read ahead", daemon=True
        )
        if file.packed:
            with suppress(RuntimeError):  # no thread to be had
                self._thread.start()

    def close(self) -> None:
        """Return when the thread has ended; before the file is closed."""
        self._reader.stop()
        if self._thread.ident is not None:
            self._thread.join()


def matrices(file: ModelFile, config: Config) -> list[TensorInfo]:
    """The tensors that are multiplied with, in the file's order; all others are read as they are.

    Raises:
        UnsupportedQuantError: one, or the embedding, is of a type without kernels.
        UnsupportedModelError: a packed file holds one that is not packed, or has packed another.
    """
    found = []
    for tensor in file.tensors.values():
        if len(tensor.shape) == 1:
            continue
        if not _kernels.has_kernels(tensor.type):
            raise UnsupportedQuantError(
                f"{file.path}: tensor {tensor.name} is stored as {tensor.type.name}, for which phi3c has no "
                "kernels; use the model in another quantisation, such as Q8_0, Q4_K_M, IQ4_XS or Q2_K",
                tensor.name,
                tensor.type.name,
            )
        if tensor.name != "token_embd.weight" or config.tied:
            found.append(tensor)
    if file.layout and file.packed != {tensor.name for tensor in found}:
        raise UnsupportedModelError(
            f"{file.path}: the packed tensors are not those that phi3c packs; pack the model again"
        )
    return found


def packed_bytes(file: ModelFile, config: Config) -> int:
    """Bytes of all matrices, packed. Raises as `matrices` does."""
    return sum(_kernels.packed_bytes(t.type, t.rows, t.columns) for t in matrices(file, config))


def row_order(config: Config, tensor: TensorInfo) -> NDArray[np.int64] | None:
    """Which row of a file's tensor becomes row i of the matrix; None: they stay as they are."""
    if config.architecture == "llama" and tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
        return neox_order(tensor.rows, config.head_dim, config.rope_dimension_count)
    return None


def neox_order(rows: int, head_dim: int, rope_dims: int) -> NDArray[np.int64]:
    """For each row of a NeoX-rotated q or k matrix, its row in a `llama` file.

    There the pairs that rotate together are adjacent rows, 2 j and 2 j + 1 of a head; here they are
    rope_dims / 2 apart.
    """
    head = np.arange(head_dim, dtype=np.int64)
    head[:rope_dims] = head[:rope_dims].reshape(-1, 2).T.ravel()
    return (np.arange(0, rows, head_dim, dtype=np.int64)[:, None] + head).ravel()


def pack(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model in the layout of the kernels: it loads without packing, and processes share its memory.

    The packed file is complete (vocabulary and chat template are in it), about as large as the original, and
    computes the same bits. It is there whole or not at all, whatever interrupts the writing.

    Args:
        src: a GGUF file that phi3c runs.
        dst: the packed file.
        overwrite: replace `dst` if it exists.
        n_threads: threads that pack; None derives it from the machine.
        progress: called as progress("pack", bytes done, bytes in all).

    Raises:
        ModelLoadError: src cannot be read, or phi3c does not run it; the subclass says which.
        InvalidParameterError: src is packed already, or dst exists.
        ModelWriteError: dst cannot be written; the disk may be full.
    """
    dst = Path(dst)
    with ModelFile(src) as file:
        if file.layout:
            raise InvalidParameterError(f"{file.path} is packed already, in layout {file.layout}")
        config = Config.from_gguf(file)
        tensors = matrices(file, config)
        if dst.exists() and (not overwrite or dst.is_dir() or dst.samefile(file.path)):
            raise InvalidParameterError(
                f"{dst} exists; choose another name, or have it replaced (overwrite=True, --force), which a "
                "folder and the file to be packed are not"
            )
        try:
            _write(dst, file, config, tensors, _kernels.Pool(default_threads(n_threads).count), progress)
        except OSError as error:
            raise ModelWriteError(f"{dst} cannot be written: {error.strerror or error}") from error


def _write(
    dst: Path,
    file: ModelFile,
    config: Config,
    tensors: list[TensorInfo],
    pool: _kernels.Pool,
    progress: Progress | None,
) -> None:
    to_pack = {tensor.name for tensor in tensors}
    total = sum(tensor.n_bytes for tensor in file.tensors.values())
    done = 0

    def data(tensor: TensorInfo) -> NDArray[np.uint8]:
        nonlocal done
        if progress:
            progress("pack", done, total)
        done += tensor.n_bytes
        if tensor.name not in to_pack:
            return file.data(tensor.name)
        panels = np.empty(panel_bytes(tensor), np.uint8)
        order = row_order(config, tensor)
        _kernels.pack(panels, file.data(tensor.name), tensor.type, tensor.rows, tensor.columns, order, pool)
        file.release(tensor.name)
        return panels

    def stored(tensor: TensorInfo) -> tuple[str, tuple[int, ...], GGMLType, Data]:
        if tensor.name in to_pack:
            return tensor.name, (panel_bytes(tensor),), GGMLType.I8, lambda: data(tensor)
        return tensor.name, tensor.shape, tensor.type, lambda: data(tensor)

    metadata, merges = packed_metadata(file, tensors), spm_merges(file.metadata)
    if merges is not None:
        metadata[SPM_MERGES] = merges
    write_gguf(dst, metadata, map(stored, file.tensors.values()), ALIGNMENT)
    if progress:
        progress("pack", total, total)
