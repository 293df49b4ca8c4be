"""The forward pass in plain NumPy, on dequantised weights: what phi3c's results are measured against.

It shares nothing with phi3c but the reader of the file. Matrices multiply in float32; sums over a row (norms,
the normaliser of a softmax) and rotation angles are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path

import numpy as np
from blocks import dequantize
from numpy.typing import NDArray

from phi3c.gguf import GGUFFile

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Logits = Callable[[Sequence[int]], F32]

QUERY_TILE = 128  # scores in memory: heads x 128 x keys float32, 67 MB for 32 heads and 4096 keys


class Oracle:
    """A `phi3` or `llama` GGUF, dequantised whole.

    Args:
        path: the file.
        sliding_window: replaces the file's window (None: the file's, or its default; 0: none), for tests that
            ask what difference a window makes.
        rope_factors: "short" or "long" whatever the length of the text; "auto" as the model was trained.
    """

    def __init__(
        self, path: str | PathLike[str], *, sliding_window: int | None = None, rope_factors: str = "auto"
    ) -> None:
        with GGUFFile(path) as file:
            metadata = dict(file.metadata)
            self._weights = {
                name: dequantize(info.type.name, file.data(name), int(np.prod(info.shape))).reshape(
                    info.shape[::-1]
                )
                for name, info in file.tensors.items()
            }
        arch = metadata["general.architecture"]

        def key(name: str, default: float | None = None) -> float:
            value = metadata.get(f"{arch}.{name}", default)
            assert isinstance(value, int | float), name
            return value

        self.n_layers = int(key("block_count"))
        self.n_heads = int(key("attention.head_count"))
        self.n_kv_heads = int(key("attention.head_count_kv", self.n_heads))
        self.head_dim = int(key("attention.key_length", key("embedding_length") / self.n_heads))
        self.n_rot = int(key("rope.dimension_count", self.head_dim))
        self.rope_base = key("rope.freq_base", 10000.0)
        self.eps = key("attention.layer_norm_rms_epsilon")
        self.rope_factors = rope_factors
        context = key("context_length")
        self.original_context = key("rope.scaling.original_context_length", context) or context
        attn_factor = 1.0
        if "rope_factors_long.weight" in self._weights and self.original_context < context:
            scale = context / self.original_context
            attn_factor = float(np.sqrt(1 + np.log(scale) / np.log(self.original_context)))
        self.attn_factor = key("rope.scaling.attn_factor", attn_factor)
        self.interleaved_rope = arch == "llama"
        if sliding_window is None:
            # Phi-3-mini-4k and -medium-4k were trained with 2047; files of their first months do not say so.
            is_phi3_4k = arch == "phi3" and context == 4096 and self.n_layers in (32, 40)
            sliding_window = int(key("attention.sliding_window", 2047 if is_phi3_4k else 0))
        self.sliding_window = sliding_window

    def logits(self, ids: Sequence[int]) -> F32:
        """Logits after each of `ids`, shape (n, vocab)."""
        x = self._weights["token_embd.weight"][np.asarray(ids)]
        for layer in range(self.n_layers):
            x = x + self._attention(layer, self._norm(x, f"blk.{layer}.attn_norm"))
            x = x + self._feed_forward(layer, self._norm(x, f"blk.{layer}.ffn_norm"))
        tied = "output.weight" not in self._weights
        return self._linear(self._norm(x, "output_norm"), "token_embd" if tied else "output")

    def log_probs(self, ids: Sequence[int]) -> F64:
        """Natural log-probabilities of the token after each of `ids`, shape (n, vocab)."""
        return log_softmax(self.logits(ids))

    def _linear(self, x: F32, name: str) -> F32:
        return np.asarray(x @ self._weights[name + ".weight"].T)

    def _norm(self, x: F32, name: str) -> F32:
        mean_square = np.mean(x.astype(np.float64) ** 2, axis=-1, keepdims=True)
        normed: F32 = (x / np.sqrt(mean_square + self.eps)).astype(np.float32)
        return normed * self._weights[name + ".weight"]

    def _attention(self, layer: int, x: F32) -> F32:
        n, prefix = len(x), f"blk.{layer}.attn_"
        if prefix + "qkv.weight" in self._weights:
            splits = np.array([self.n_heads, self.n_heads + self.n_kv_heads]) * self.head_dim
            q, k, v = np.split(self._linear(x, prefix + "qkv"), splits, axis=1)
        else:
            q, k, v = (self._linear(x, prefix + name) for name in "qkv")
        q, k, v = (
            a.reshape(n, -1, self.head_dim).transpose(1, 0, 2) for a in (q, k, v)
        )  # (heads, n, head_dim)
        q, k = self._rope(q) / np.float32(np.sqrt(self.head_dim)), self._rope(k)
        k, v = (np.repeat(a, self.n_heads // self.n_kv_heads, axis=0) for a in (k, v))

        mixed = np.empty_like(q)
        positions = np.arange(n)
        for start in range(0, n, QUERY_TILE):
            rows = slice(start, min(start + QUERY_TILE, n))
            oldest = max(0, start - self.sliding_window + 1) if self.sliding_window else 0
            keys = slice(oldest, rows.stop)
            distance = positions[rows, None] - positions[None, keys]
            hidden = distance < 0
            if self.sliding_window:
                hidden |= distance >= self.sliding_window
            scores = q[:, rows] @ k[:, keys].transpose(0, 2, 1)
            np.copyto(scores, -np.inf, where=hidden)
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            total = weights.sum(axis=-1, keepdims=True, dtype=np.float64)
            mixed[:, rows] = (weights @ v[:, keys]) / total
        return self._linear(mixed.transpose(1, 0, 2).reshape(n, -1), prefix + "output")

    def _rope(self, x: F32) -> F32:
        """Rotate the first n_rot elements of each head; `x` is (heads, n, head_dim), row p at position p."""
        half = self.n_rot // 2
        frequencies = self.rope_base ** (-np.arange(half) / half) / self._divisors(x.shape[1])
        angles = np.arange(x.shape[1])[:, None] * frequencies
        cos, sin = self.attn_factor * np.cos(angles), self.attn_factor * np.sin(angles)
        if self.interleaved_rope:
            first, second = slice(0, self.n_rot, 2), slice(1, self.n_rot, 2)
        else:
            first, second = slice(0, half), slice(half, self.n_rot)
        a, b = x[..., first], x[..., second]
        rotated = x.copy()
        rotated[..., first] = a * cos - b * sin
        rotated[..., second] = b * cos + a * sin
        return rotated

    def _divisors(self, n: int) -> F64 | float:
        """What a text of `n` tokens divides the rotary frequencies by."""
        if "rope_freqs.weight" in self._weights:
            return self._weights["rope_freqs.weight"].astype(np.float64)
        if "rope_factors_long.weight" not in self._weights:
            return 1.0
        outgrown = "long" if n > self.original_context else "short"
        name = outgrown if self.rope_factors == "auto" else self.rope_factors
        return self._weights[f"rope_factors_{name}.weight"].astype(np.float64)

    def _feed_forward(self, layer: int, x: F32) -> F32:
        prefix = f"blk.{layer}.ffn_"
        if prefix + "gate.weight" in self._weights:
            gate, up = self._linear(x, prefix + "gate"), self._linear(x, prefix + "up")
        else:
            gate, up = np.split(self._linear(x, prefix + "up"), 2, axis=1)
        return self._linear(gate / (1 + np.exp(-gate)) * up, prefix + "down")


@cache
def load_oracle(path: Path) -> Oracle:
    """The oracle of a file that several tests use: dequantising 135M weights takes seconds."""
    return Oracle(path)


def log_softmax(logits: F32) -> F64:
    """Natural log-probabilities in float64 along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How far an engine's distributions lie from the oracle's, over every scored position of a text."""

    n_scored: int
    oracle_perplexity: float
    perplexity: float
    mean_kl: float
    """KL(oracle || engine) in nats, averaged over positions."""
    same_top: float
    """Share of positions where both find the same token most likely."""
    max_delta: float
    """Largest difference of log-probability of the text's own next token."""


def compare(oracle: Logits, engine: Logits, ids: Sequence[int], n_ctx: int) -> Accuracy:
    """Run both over each full chunk of `n_ctx` tokens and score its tokens from n_ctx / 2 on."""
    n_scored, same_top, kl = 0, 0, 0.0
    oracle_next: list[F64] = []
    engine_next: list[F64] = []
    for start in range(0, len(ids) - n_ctx + 1, n_ctx):
        chunk = tuple(ids[start : start + n_ctx])
        rows, targets = slice(n_ctx // 2 - 1, n_ctx - 1), np.array(chunk[n_ctx // 2 :])[:, None]
        p, q = (log_softmax(logits(chunk)[rows]) for logits in (oracle, engine))
        n_scored += len(targets)
        same_top += int((p.argmax(axis=1) == q.argmax(axis=1)).sum())
        kl += float((np.exp(p) * (p - q)).sum())
        oracle_next.append(np.take_along_axis(p, targets, axis=1))
        engine_next.append(np.take_along_axis(q, targets, axis=1))
    p_next, q_next = np.concatenate(oracle_next), np.concatenate(engine_next)
    return Accuracy(
        n_scored=n_scored,
        oracle_perplexity=float(np.exp(-p_next.mean())),
        perplexity=float(np.exp(-q_next.mean())),
        mean_kl=kl / n_scored,
        same_top=same_top / n_scored,
        max_delta=float(np.abs(p_next - q_next).max()),
    )
