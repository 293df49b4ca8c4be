"""How likely a model finds a text: log-probabilities of its tokens, and their perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _kernels, logits_file
from .engine import Engine
from .errors import InvalidParameterError
from .sampling import not_finite

Progress = Callable[[int, int, float | None], None]
"""Called as progress(tokens read, tokens in all, perplexity so far, None before the first)."""
F64 = NDArray[np.float64]
Rows = Callable[[int, NDArray[np.float32], F64], None]
"""What else is done with logits: rows(i, logits (n, vocab), log_sums (n,)), of scored tokens i, i + 1, ..."""


@dataclass(frozen=True, slots=True)
class Score:
    """How likely a model finds the tokens of a text, one after the other."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float | None, ...]
    """Natural logarithms, one of each token; None for a first token that has nothing before it."""

    @property
    def sum(self) -> float:
        """Log-probability of the text."""
        return math.fsum(self._known)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return _exp(-self.sum / len(self._known))

    @property
    def _known(self) -> list[float]:
        return [logprob for logprob in self.logprobs if logprob is not None]


class Estimate(NamedTuple):
    """A figure, and its standard error."""

    value: float
    error: float

    @classmethod
    def mean(cls, samples: NDArray[np.floating]) -> Estimate:
        """Of independent samples; the error of a single one is 0."""
        n = len(samples)
        value = math.fsum(samples) / n
        variance = math.fsum((samples - value) ** 2) / (n - 1) if n > 1 else 0.0
        return cls(value, math.sqrt(variance / n))

    def exp(self) -> Estimate:
        """exp of it, the error to first order."""
        return Estimate(_exp(self.value), _exp(self.value) * self.error)


@dataclass(frozen=True, slots=True)
class Perplexity:
    """Perplexity of a text, and how it was measured."""

    perplexity: Estimate
    n_tokens: int  # scored
    n_chunks: int
    n_ctx: int  # tokens of a chunk
    stride: int  # tokens from a chunk to the next, where they overlap; else 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a text that is computed by itself; the tokens from n_context >= 1 on are scored."""

    ids: Sequence[int]
    n_context: int


def chunks_of(ids: Sequence[int], n_ctx: int, bos_id: int | None) -> list[Chunk]:
    """A text in full chunks side by side, as llama-perplexity cuts it; what is left over is not looked at.

    The first half of a chunk and one token more are context. BOS, where there is one, takes the place of a
    chunk's first token.
    """
    starts = range(0, len(ids) - n_ctx + 1, n_ctx)
    parts = [list(ids[start : start + n_ctx]) for start in starts]
    if bos_id is not None:
        parts = [[bos_id, *part[1:]] for part in parts]
    return [Chunk(part, n_ctx - logits_file.n_scored(n_ctx)) for part in parts]


def strided_chunks_of(ids: Sequence[int], n_ctx: int, stride: int) -> list[Chunk]:
    """A text in chunks that overlap: each begins `stride` tokens after the one before and scores what is new.

    So every token but the first is scored once; from the second chunk on, behind n_ctx - stride others at
    least.
    """
    chunks = []
    seen = 1  # the first token has nothing before it
    for start in range(0, len(ids), stride):
        chunks.append(Chunk(ids[start : start + n_ctx], seen - start))
        seen = start + n_ctx
        if seen >= len(ids):
            break
    return chunks


def first_of(chunks: list[Chunk], n_chunks: int | None) -> list[Chunk]:
    """No more than n_chunks of them; all where that is None."""
    if n_chunks is not None and n_chunks < 1:
        raise InvalidParameterError(f"n_chunks is {n_chunks}; it must be at least 1")
    return chunks[:n_chunks]


def logprobs(engine: Engine, chunk: Chunk, rows: Rows | None = None) -> F64:
    """Log-probabilities of a chunk's scored tokens.

    Raises:
        NumericalError: the model produced NaN.
    """
    first = chunk.n_context
    tokens = np.asarray(chunk.ids[first:])
    out = np.empty(len(tokens))

    def use(i: int, logits: NDArray[np.float32]) -> None:
        at = i + 1 - first  # logits behind a token are about the next one
        log_sums = np.empty(len(logits))
        _kernels.log_sum_exp(log_sums, logits, engine.pool)
        if np.isnan(log_sums).any():
            raise not_finite(logits[np.isnan(log_sums)][0])
        own = np.take_along_axis(logits, tokens[at : at + len(logits), None], axis=1)[:, 0]
        out[at : at + len(logits)] = own - log_sums
        if rows:
            rows(at, logits, log_sums)

    engine.read(chunk.ids[:-1], first - 1, use)
    return out


def perplexity(
    engine: Engine,
    ids: Sequence[int],
    *,
    n_ctx: int,
    stride: int = 0,
    bos_id: int | None = None,
    n_chunks: int | None = None,
    save_logits: Path | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity of a text; see Model.perplexity.

    Args:
        bos_id: takes the place of a chunk's first token, where chunks do not overlap.
    """
    if not 3 <= n_ctx <= engine.n_ctx:
        raise InvalidParameterError(
            f"n_ctx is {n_ctx}; it must be at least 3 and at most the model's n_ctx, {engine.n_ctx}"
        )
    if not 0 <= stride < n_ctx:
        raise InvalidParameterError(f"stride is {stride}; it must be 0 or less than n_ctx, {n_ctx}")
    if stride and save_logits is not None:
        raise InvalidParameterError("save_logits holds chunks that do not overlap: stride must be 0")
    least = 2 if stride else n_ctx
    if len(ids) < least:
        raise InvalidParameterError(
            f"the text has {len(ids)} tokens, and {least} are needed at least: take a longer text, or a "
            "smaller n_ctx"
        )
    chunks = strided_chunks_of(ids, n_ctx, stride) if stride else chunks_of(ids, n_ctx, bos_id)
    chunks = first_of(chunks, n_chunks)
    if save_logits is None:
        scored = score_each(engine, chunks, lambda i: None, progress)
    else:
        tokens = np.array(ids[: len(chunks) * n_ctx], np.int32).reshape(-1, n_ctx)
        with logits_file.writing(save_logits, tokens, engine.vocab_size) as append:
            scored = score_each(engine, chunks, lambda i: append, progress)
    return Perplexity(Estimate.mean(-scored).exp(), len(scored), len(chunks), n_ctx, stride)


def score_each(
    engine: Engine,
    chunks: Sequence[Chunk],
    rows_of: Callable[[int], Rows | None],
    progress: Progress | None,
) -> F64:
    """Log-probabilities of all scored tokens; rows_of(i) gets the logits of chunk i."""
    total = sum(len(chunk.ids) for chunk in chunks)
    if progress:
        progress(0, total, None)
    scored: list[F64] = []
    done, nll, n = 0, 0.0, 0
    for i, chunk in enumerate(chunks):
        scored.append(logprobs(engine, chunk, rows_of(i)))
        if progress:
            done, nll, n = done + len(chunk.ids), nll - float(scored[-1].sum()), n + len(scored[-1])
            progress(done, total, _exp(nll / n))
    return np.concatenate(scored)


def _exp(x: float) -> float:
    return math.exp(x) if x < 709 else math.inf  # where math.exp would raise
