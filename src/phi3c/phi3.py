"""The network: weights packed for the kernels, and the forward pass over any mix of sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .cache import KVCache
from .cache import Sequence as CachedSequence
from .config import Config
from .errors import OutOfMemoryError, UnsupportedQuantError
from .gguf import GGUFFile, TensorInfo
from .memory import total_memory

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one decoder layer; d = embedding_length, q = head_count * head_dim, kv likewise."""

    attn_norm: _kernels.Rows  # (1, d)
    attn_qkv: _kernels.Matrix  # (q + 2 kv, d)
    attn_output: _kernels.Matrix  # (d, q)
    ffn_norm: _kernels.Rows  # (1, d)
    ffn_up: _kernels.Matrix  # (2 ffn, d): gate, then up
    ffn_down: _kernels.Matrix  # (d, ffn)


@dataclass(frozen=True, slots=True)
class Step:
    """New tokens of one sequence, and how many of them, counted from the last, want logits.

    The last `n_drafts` ids are guesses: their keys and values are written, but the sequence does not grow by
    them until the caller appends those that were right. What is not appended is overwritten by later steps.
    """

    sequence: CachedSequence
    ids: Sequence[int]
    n_logits: int = 1
    n_drafts: int = 0


class Phi3:
    """The weights of a `phi3` or `llama` file and the computation they stand for.

    Args:
        file: stays open as long as the model: rows of token_embd are read from it.
        config: its hyper-parameters.
        pool: threads that compute.
        n_batch: most rows of one forward pass.
        progress: called with ("pack", bytes done, bytes in all) while weights are packed.

    Raises:
        UnsupportedQuantError: a tensor is of a type without kernels.
        OutOfMemoryError: the weights do not fit.
    """

    def __init__(
        self,
        file: GGUFFile,
        config: Config,
        pool: _kernels.Pool,
        *,
        n_batch: int,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.heads = _kernels.Heads(
            config.head_count,
            config.head_count_kv,
            config.head_dim,
            config.rope_dimension_count,
            config.sliding_window or 0,
        )
        self.rope = _kernels.RopeTable(rope_frequencies(config), 1.0)
        self._pool = pool
        self._file = file
        self._token_embd = file.tensors["token_embd.weight"]
        loader = _Loader(file, config, pool, progress)
        self.weight_bytes = loader.arena.n_bytes
        self.layers = [loader.layer(i) for i in range(config.block_count)]
        self.output_norm = loader.vector("output_norm.weight")
        self.output = loader.matrix("token_embd.weight" if config.tied else "output.weight")

        d, ffn = config.embedding_length, config.feed_forward_length
        self.n_batch = n_batch
        self._x = _kernels.Rows(n_batch, d)  # the residual stream
        self._normed = _kernels.Activation(n_batch, d)
        self._qkv = _kernels.Rows(n_batch, self.heads.qkv_columns)
        self._mixed = _kernels.Activation(n_batch, self.heads.columns)
        self._gate_up = _kernels.Rows(n_batch, 2 * ffn)
        self._hidden = _kernels.Activation(n_batch, ffn)
        self._logits = _kernels.Rows(1, config.vocab_size)

    def forward(self, steps: Sequence[Step], cache: KVCache) -> NDArray[np.float32]:
        """Compute the steps' tokens, append all but drafts to the cache, return the wanted logits.

        Args:
            steps: at most n_batch tokens in all; prefill chunks and single decode steps mix freely.

        Returns:
            (sum of n_logits, vocab_size) float32, in the order of the steps; valid until the next call.
        """
        k, pool, eps = _kernels, self._pool, self.config.layer_norm_rms_epsilon
        x, normed, qkv, mixed, gate_up, hidden = (
            self._x, self._normed, self._qkv, self._mixed, self._gate_up, self._hidden,
        )  # fmt: skip
        for step in steps:
            cache.reserve(step.sequence, len(step.ids))
        batch = self._batch(steps, cache)
        self.rope.extend(batch.n_positions)
        wanted = wanted_rows(steps)
        n = batch.n_rows

        k.embed(x, self._file.data(self._token_embd.name), self._token_embd.type, token_ids(steps))
        for i, layer in enumerate(self.layers):
            k.rms_norm(normed, x, layer.attn_norm, eps, n, pool)
            k.matmul(qkv, layer.attn_qkv, normed, n, False, pool)
            k.rope_append(self.heads, i, qkv, batch, cache.pages, self.rope, pool)
            k.attend(mixed, self.heads, i, qkv, batch, cache.pages, pool)
            if layer is self.layers[-1] and len(wanted) < n:  # nobody reads the other rows from here on
                n = len(wanted)
                k.keep_rows(x, wanted)
                k.keep_rows(mixed, wanted)
            if n == 0:
                break
            k.matmul(x, layer.attn_output, mixed, n, True, pool)

            k.rms_norm(normed, x, layer.ffn_norm, eps, n, pool)
            k.matmul(gate_up, layer.ffn_up, normed, n, False, pool)
            k.silu_mul(hidden, gate_up, n, pool)
            k.matmul(x, layer.ffn_down, hidden, n, True, pool)

        for step in steps:
            cache.append(step.sequence, step.ids[: len(step.ids) - step.n_drafts])
        if self._logits.rows < n:
            self._logits = k.Rows(n, self.config.vocab_size)
        if n:
            k.rms_norm(normed, x, self.output_norm, eps, n, pool)
            k.matmul(self._logits, self.output, normed, n, False, pool)
        return np.asarray(self._logits)[:n]

    def _batch(self, steps: Sequence[Step], cache: KVCache) -> _kernels.Batch:
        spans, row = np.empty((len(steps), 4), np.int32), 0
        for i, step in enumerate(steps):
            spans[i] = i, row, len(step.ids), len(step.sequence)
            row += len(step.ids)
        window = self.config.sliding_window or 0
        return _kernels.Batch(spans, cache.tables([step.sequence for step in steps]), cache.pages, window)


def token_ids(steps: Iterable[Step]) -> NDArray[np.int64]:
    """The ids of all steps, one row of the batch each."""
    return np.fromiter((token for step in steps for token in step.ids), np.int64)


def wanted_rows(steps: Iterable[Step]) -> NDArray[np.int64]:
    """Rows of the batch whose logits are wanted, ascending."""
    rows: list[int] = []
    end = 0
    for step in steps:
        end += len(step.ids)
        rows.extend(range(end - step.n_logits, end))
    return np.array(rows, np.int64)


def rope_frequencies(config: Config) -> NDArray[np.float64]:
    """(rope_dimension_count / 2,) float64: base^(-2 j / n), radians per position.

    By decimal arithmetic of 40 digits: a system's `pow` may differ from another's in the last bit.
    """
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 40
        base, n = Decimal(config.rope_freq_base), config.rope_dimension_count
        return np.array([float(base ** (Decimal(-2 * j) / n)) for j in range(n // 2)])


def neox_order(rows: int, head_dim: int, rope_dims: int) -> NDArray[np.int64]:
    """For each row of a NeoX-rotated q or k matrix, its row in a `llama` file.

    There the pairs that rotate together are adjacent rows, 2 j and 2 j + 1 of a head; here they are
    rope_dims / 2 apart.
    """
    head = np.arange(head_dim)
    head[:rope_dims] = head[:rope_dims].reshape(-1, 2).T.ravel()
    return (np.arange(0, rows, head_dim)[:, None] + head).ravel()


class _Loader:
    """Packs a file's tensors, in the order they are asked for, into one arena."""

    def __init__(
        self, file: GGUFFile, config: Config, pool: _kernels.Pool, progress: Progress | None
    ) -> None:
        self.file, self.config, self.pool, self.progress = file, config, pool, progress
        self.done = self.total = 0
        for tensor in file.tensors.values():
            if self._is_matrix(tensor):
                if not _kernels.has_kernels(tensor.type):
                    raise UnsupportedQuantError(
                        f"{file.path}: tensor {tensor.name} is stored as {tensor.type.name}, for which phi3c "
                        "has no kernels; use a file of type Q4_K_M, Q8_0 or another type README lists",
                        tensor.name,
                        tensor.type.name,
                    )
                self.total += _kernels.packed_bytes(tensor.type, tensor.rows, tensor.columns)
        memory = total_memory()
        if memory is not None and self.total > memory:
            raise OutOfMemoryError(
                f"{file.path}: the weights take {self.total / 1e9:.1f} GB, this machine has "
                f"{memory / 1e9:.1f} GB; use a smaller model or one with fewer bits per weight"
            )
        try:
            self.arena = _kernels.Arena(self.total)
        except MemoryError as error:
            raise OutOfMemoryError(f"{file.path}: {error}") from None

    def _is_matrix(self, tensor: TensorInfo) -> bool:
        packed = tensor.name != "token_embd.weight" or self.config.tied
        return packed and not tensor.name.endswith("norm.weight")

    def vector(self, name: str) -> _kernels.Rows:
        tensor = self.file.tensors[name]
        rows = _kernels.Rows(1, tensor.columns)
        _kernels.embed(rows, self.file.data(name), tensor.type, np.zeros(1, np.int64))
        return rows

    def matrix(self, *names: str) -> _kernels.Matrix:
        """The tensors' rows below one another."""
        matrix = _kernels.Matrix(self.arena, self.file.tensors[names[0]].columns)
        for name in names:
            tensor = self.file.tensors[name]
            permuted = self.config.architecture == "llama" and name.endswith(
                ("attn_q.weight", "attn_k.weight")
            )
            order = (
                neox_order(tensor.rows, self.config.head_dim, self.config.rope_dimension_count)
                if permuted
                else None
            )
            matrix.append(self.file.data(name), tensor.type, tensor.rows, order, self.pool)
            self.file.release(name)
            self.done += _kernels.packed_bytes(tensor.type, tensor.rows, tensor.columns)
            if self.progress:
                self.progress("pack", self.done, self.total)
        return matrix

    def layer(self, i: int) -> Layer:
        def part(*names: str) -> list[str]:
            return [f"blk.{i}.{name}.weight" for name in names]

        qkv, gate_up = part("attn_qkv"), part("ffn_up")
        if qkv[0] not in self.file.tensors:
            qkv = part("attn_q", "attn_k", "attn_v")
        if self.config.architecture == "llama":
            gate_up = part("ffn_gate", "ffn_up")
        return Layer(
            self.vector(*part("attn_norm")),
            self.matrix(*qkv),
            self.matrix(*part("attn_output")),
            self.vector(*part("ffn_norm")),
            self.matrix(*gate_up),
            self.matrix(*part("ffn_down")),
        )
