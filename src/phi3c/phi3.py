"""The network: its layers, and the forward pass over any mix of sequences."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .cache import PAGE, KVCache, kv_type_id
from .cache import Sequence as CachedSequence
from .config import Config
from .packed import ModelFile
from .weights import Progress, Weights


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
        file: stays open as long as the model: rows of an untied token_embd are read from it, and all weights
            where they are packed already.
        config: its hyper-parameters.
        pool: threads that compute; between steps another may be put in its place.
        n_batch: most rows of one forward pass.
        kv_type: how keys and values are kept: "f16" or "q8_0".
        progress: called with ("pack", bytes done, bytes in all) while weights are packed.

    Raises:
        UnsupportedQuantError: a tensor is of a type without kernels.
        OutOfMemoryError: the weights do not fit.
        InvalidParameterError: no such kv_type, or it does not fit the heads.
    """

    _operations: ModuleType = _kernels  # what forward() calls; profile.py puts its own here

    def __init__(
        self,
        file: ModelFile,
        config: Config,
        pool: _kernels.Pool,
        *,
        n_batch: int,
        kv_type: str = "f16",
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.heads = heads(config, kv_type)
        self.rope = _kernels.RopeTable(rope_frequencies(config), config.rope_attn_factor)
        self.pool = pool
        self._file = file
        self._token_embd = file.tensors["token_embd.weight"]
        weights = Weights(file, config, pool, progress)
        self.weight_bytes = weights.n_bytes
        self.layers = [_layer(weights, file, i) for i in range(config.block_count)]
        self.output_norm = weights.vector("output_norm.weight")
        self.output = weights.matrix("token_embd.weight" if config.tied else "output.weight")

        d, ffn = config.embedding_length, config.feed_forward_length
        self.n_batch = n_batch
        self._x = _kernels.Rows(n_batch, d)  # the residual stream
        self._normed = _kernels.Activation(n_batch, d)
        self._qkv = _kernels.Rows(n_batch, self.heads.qkv_columns)
        self._mixed = _kernels.Activation(n_batch, self.heads.columns)
        self._hidden = _kernels.Activation(n_batch, ffn)
        self._logits = _kernels.Rows(1, config.vocab_size)

    @property
    def matrices(self) -> list[_kernels.Matrix]:
        """All that a step multiplies with, in the order of the forward pass."""
        each = ((layer.attn_qkv, layer.attn_output, layer.ffn_up, layer.ffn_down) for layer in self.layers)
        return [*chain.from_iterable(each), self.output]

    def forward(self, steps: Sequence[Step], cache: KVCache) -> NDArray[np.float32]:
        """Compute the steps' tokens, append all but drafts to the cache, return the wanted logits.

        Args:
            steps: at most n_batch tokens in all; prefill chunks and single decode steps mix freely.

        Returns:
            (sum of n_logits, vocab_size) float32, in the order of the steps; valid until the next call.
        """
        k, pool, eps = self._operations, self.pool, self.config.layer_norm_rms_epsilon
        x, normed, qkv, mixed, hidden = self._x, self._normed, self._qkv, self._mixed, self._hidden
        for step in steps:
            cache.reserve(step.sequence, len(step.ids))
            self.rope.extend(step.sequence.rope, len(step.sequence) + len(step.ids))
        batch = self._batch(steps, cache)
        wanted = wanted_rows(steps)
        n = batch.n_rows

        self._embed(token_ids(steps))
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
            k.gate_up(hidden, layer.ffn_up, normed, n, pool)
            k.matmul(x, layer.ffn_down, hidden, n, True, pool)

        for step in steps:
            cache.append(step.sequence, step.ids[: len(step.ids) - step.n_drafts])
        if self._logits.rows < n:
            self._logits = k.Rows(n, self.config.vocab_size)
        if n:
            k.rms_norm(normed, x, self.output_norm, eps, n, pool)
            k.matmul(self._logits, self.output, normed, n, False, pool)
        return np.asarray(self._logits)[:n]

    def _embed(self, ids: NDArray[np.int64]) -> None:
        """Rows of the embedding into x; a tied one is there once, packed."""
        if self.config.tied:
            self._operations.embed_packed(self._x, self.output, ids)
        else:
            data = self._file.data(self._token_embd.name)
            self._operations.embed(self._x, data, self._token_embd.type, ids)

    def _batch(self, steps: Sequence[Step], cache: KVCache) -> _kernels.Batch:
        spans, row = np.empty((len(steps), 5), np.int32), 0
        for i, step in enumerate(steps):
            spans[i] = i, row, len(step.ids), len(step.sequence), step.sequence.rope
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


def heads(config: Config, kv_type: str) -> _kernels.Heads:
    """The attention of a model, whose keys and values are kept as `kv_type`.

    Raises:
        InvalidParameterError: no such kv_type, or it does not fit the heads.
    """
    return _kernels.Heads(
        config.head_count,
        config.head_count_kv,
        config.head_dim,
        config.rope_dimension_count,
        config.sliding_window or 0,
        kv_type_id(kv_type, config.head_dim),
    )


def kv_bytes_per_token(config: Config, kv_type: str) -> int:
    """Bytes that keys and values of one position take in all layers."""
    return heads(config, kv_type).page_bytes(config.block_count) // PAGE


def rope_frequencies(config: Config) -> NDArray[np.float64]:
    """(sets, rope_dimension_count / 2) float64: base^(-2 j / n) / factor[j], radians per position.

    Row SHORT is for sequences within the original context, row LONG, where there is one, for longer ones. By
    decimal arithmetic of 40 digits: a system's `pow` may differ from another's in the last bit.
    """
    from decimal import Decimal, localcontext

    with localcontext() as context:
        context.prec = 40
        base, n = Decimal(config.rope_freq_base), config.rope_dimension_count
        frequencies = [base ** (Decimal(-2 * j) / n) for j in range(n // 2)]
        sets = [config.rope_factors_short or (1.0,) * len(frequencies)]
        if config.rope_factors_long:
            sets.append(config.rope_factors_long)
        return np.array(
            [[float(f / Decimal(d)) for f, d in zip(frequencies, set, strict=True)] for set in sets]
        )


def _layer(weights: Weights, file: ModelFile, i: int) -> Layer:
    def part(*names: str) -> list[str]:
        return [f"blk.{i}.{name}.weight" for name in names]

    qkv, gate_up = part("attn_qkv"), part("ffn_gate", "ffn_up")
    if qkv[0] not in file.tensors:
        qkv = part("attn_q", "attn_k", "attn_v")
    if gate_up[0] not in file.tensors:
        gate_up = part("ffn_up")  # fused: gate above up
    return Layer(
        weights.vector(*part("attn_norm")),
        weights.matrix(*qkv),
        weights.matrix(*part("attn_output")),
        weights.vector(*part("ffn_norm")),
        weights.matrix(*gate_up),
        weights.matrix(*part("ffn_down")),
    )
