"""How far a model lies from another whose log-probabilities of a text were saved."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .engine import Engine
from .errors import ContextLengthError, LogitsFileError
from .logits_file import LogitsFile
from .perplexity import F64, Estimate, Progress, Rows, chunks_of, first_of, score_each

QUANTILES: Final = {
    "maximum": 1.0, "99.9 %": 0.999, "99 %": 0.99, "95 %": 0.95, "90 %": 0.9, "75 %": 0.75, "median": 0.5,
    "25 %": 0.25, "10 %": 0.1, "5 %": 0.05, "1 %": 0.01, "0.1 %": 0.001, "minimum": 0.0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Divergence:
    """A model Q beside a base, over the scored tokens of a text, whose own probabilities are p."""

    n_tokens: int
    n_chunks: int
    n_ctx: int
    perplexity: Estimate  # PPL(Q)
    base_perplexity: Estimate  # PPL(base)
    log_ratio: Estimate  # ln(PPL(Q) / PPL(base))
    ratio: Estimate  # PPL(Q) / PPL(base)
    difference: Estimate  # PPL(Q) - PPL(base)
    correlation: float  # of the log-probabilities
    kl: Estimate  # mean KL(base || Q) of a position, nats
    kl_quantiles: Mapping[str, float]
    delta_p: Estimate  # mean of p(Q) - p(base)
    delta_p_rms: Estimate
    delta_p_quantiles: Mapping[str, float]
    same_top: Estimate  # share of positions where both find the same token likeliest

    @classmethod
    def of(
        cls, own: F64, base: F64, kl: F64, same_top: NDArray[np.bool_], n_chunks: int, n_ctx: int
    ) -> Divergence:
        """From log-probabilities of the text's tokens, and KL and agreement at their positions, all (n,)."""
        n = len(own)
        perplexity, base_perplexity = Estimate.mean(-own).exp(), Estimate.mean(-base).exp()
        log_ratio = Estimate.mean(base - own)
        # of it only the error is meant: that of the two means together, to first order
        difference = Estimate.mean(perplexity.value * -own - base_perplexity.value * -base)
        delta_p = np.exp(own) - np.exp(base)
        square = Estimate.mean(delta_p**2)
        rms = math.sqrt(square.value)
        share = float(same_top.mean())
        return cls(
            n_tokens=n,
            n_chunks=n_chunks,
            n_ctx=n_ctx,
            perplexity=perplexity,
            base_perplexity=base_perplexity,
            log_ratio=log_ratio,
            ratio=log_ratio.exp(),
            difference=Estimate(perplexity.value - base_perplexity.value, difference.error),
            correlation=_correlation(own, base),
            kl=Estimate.mean(kl),
            kl_quantiles=_quantiles(kl),
            delta_p=Estimate.mean(delta_p),
            delta_p_rms=Estimate(rms, square.error / (2 * rms) if rms else 0.0),
            delta_p_quantiles=_quantiles(delta_p),
            same_top=Estimate(share, math.sqrt(share * (1 - share) / max(1, n - 1))),
        )


def _correlation(a: F64, b: F64) -> float:
    """Pearson's; 0 where one of them does not vary."""
    spread = float(a.std() * b.std())
    return float(np.mean((a - a.mean()) * (b - b.mean()))) / spread if spread else 0.0


def _quantiles(samples: F64) -> dict[str, float]:
    values = np.quantile(samples, list(QUANTILES.values()))
    return dict(zip(QUANTILES, values.tolist(), strict=True))


def divergence(
    engine: Engine,
    path: str | os.PathLike[str],
    *,
    bos_id: int | None = None,
    n_chunks: int | None = None,
    progress: Progress | None = None,
) -> Divergence:
    """The model beside a saved base, on the base's tokens; see Model.divergence."""
    file = LogitsFile(path)
    if file.n_vocab != engine.vocab_size:
        raise LogitsFileError(
            f"{file.path} has log-probabilities of {file.n_vocab} tokens, the model {engine.vocab_size}: "
            "only models of one vocabulary can be compared"
        )
    if file.n_ctx > engine.n_ctx:
        raise ContextLengthError(
            f"{file.path} has chunks of {file.n_ctx} tokens; the model's context is {engine.n_ctx}: load "
            "it with a larger n_ctx",
            file.n_ctx,
            None,
            engine.n_ctx,
        )
    chunks = first_of(chunks_of(file.tokens.reshape(-1).tolist(), file.n_ctx, bos_id), n_chunks)
    base: list[F64] = []
    kl: list[F64] = []
    same_top: list[NDArray[np.bool_]] = []

    def beside(i: int) -> Rows:
        theirs, chunk = file.chunk(i), chunks[i]
        base.append(theirs.logprobs(file.tokens[i, chunk.n_context :]))

        def rows(at: int, logits: NDArray[np.float32], log_sums: F64) -> None:
            here = slice(at, at + len(logits))
            out = np.empty(len(logits))
            steps = theirs.steps[here]
            scales, mins = theirs.scales[here], theirs.mins[here]
            _kernels.kl_divergence(out, steps, scales, mins, logits, log_sums, engine.pool)
            kl.append(out)
            same_top.append(logits.argmax(axis=1) == steps.argmax(axis=1))

        return rows

    own = score_each(engine, chunks, beside, progress)
    joined = np.concatenate(base), np.concatenate(kl), np.concatenate(same_top)
    return Divergence.of(own, *joined, len(chunks), file.n_ctx)
