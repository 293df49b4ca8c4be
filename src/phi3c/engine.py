"""Token ids in, token ids out: sequences that share one model, one step at a time.

A step holds the engine's lock, so any number of threads may generate at once; each step is one forward pass.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import takewhile
from time import perf_counter
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .cache import LONG, PAGE, SHORT, KVCache
from .cache import Sequence as CachedSequence
from .completion import FinishReason, Timings, Usage
from .config import Config
from .errors import InvalidParameterError, ModelClosedError, NumericalError
from .lookup import PromptLookup
from .phi3 import Phi3, Step
from .sampling import Sampler, SamplingParams, TokenLogprob
from .weights import Progress

T = TypeVar("T")

ROPE_FACTORS: Final = ("auto", "short", "long")
logger = logging.getLogger(__name__)


class Engine:
    """A model, its cache, and the lock that keeps their steps apart.

    Args:
        phi3: the network.
        n_ctx: longest sequence; the cache keeps as many positions of finished ones for their prefixes.
        speculate: most tokens a generation drafts per step; 0 for none.
        rope_factors: which sequences keys are rotated for: "auto" (by length, as the model was trained),
            "short" or "long".

    Raises:
        InvalidParameterError: rope_factors is none of them, or "long" where the model has one set only.
    """

    def __init__(self, phi3: Phi3, n_ctx: int, speculate: int = 0, rope_factors: str = "auto") -> None:
        config = phi3.config
        self.n_short = short_context(config, rope_factors)
        cache = KVCache(
            phi3.heads, config.block_count, window=config.sliding_window, spare_pages=-(-n_ctx // PAGE)
        )
        self.n_ctx = n_ctx
        self.speculate = min(speculate, phi3.n_batch - 1)
        self._parts: tuple[Phi3, KVCache] | None = phi3, cache
        # Reentrant: a Stream may be collected, and release its pages, within a step.
        self._lock = threading.RLock()

    def open(self, ids: Sequence[int], n_tokens: int) -> CachedSequence:
        """A sequence that holds what the cache knows of the beginning of `ids`.

        Its keys are rotated as is right for a sequence of `n_tokens`, the length that it will have.
        """
        with self._lock:
            _, cache = self._open_parts()
            return cache.open(ids, SHORT if n_tokens <= self.n_short else LONG)

    def release(self, sequence: CachedSequence) -> None:
        """The sequence is done with."""
        with self._lock:
            if self._parts:
                self._parts[1].close(sequence)

    def run(self, steps: Sequence[Step], use: Callable[[NDArray[np.float32]], T]) -> T:
        """One forward pass; returns what `use` makes of the wanted logits (rows, vocab), gone after it."""
        with self._lock:
            phi3, cache = self._open_parts()
            return use(phi3.forward(steps, cache))

    def accept(self, sequence: CachedSequence, drafts: Sequence[int]) -> None:
        """These drafts of the sequence's last step were right: it grows by them."""
        with self._lock:
            _, cache = self._open_parts()
            cache.append(sequence, drafts)

    def prefill(
        self,
        sequence: CachedSequence,
        ids: Sequence[int],
        use: Callable[[NDArray[np.float32]], T],
        progress: Progress | None,
        stage: str = "prompt",
    ) -> T:
        """Append the missing rest of `ids`, n_batch tokens a time; `use` gets the last logits (1, vocab).

        `progress` is told (stage, tokens done, tokens in all).
        """
        n_batch = self._open_parts()[0].n_batch
        if progress:
            progress(stage, len(sequence), len(ids))
        while len(ids) - len(sequence) > n_batch:
            chunk = ids[len(sequence) : len(sequence) + n_batch]
            self.run([Step(sequence, chunk, n_logits=0)], lambda logits: None)
            if progress:
                progress(stage, len(sequence), len(ids))
        if progress:
            progress(stage, len(ids), len(ids))  # a bar is gone before the first token is shown
        return self.run([Step(sequence, ids[len(sequence) :])], use)

    @property
    def vocab_size(self) -> int:
        """Logits behind a token."""
        return self._open_parts()[0].config.vocab_size

    @property
    def pool(self) -> _kernels.Pool:
        """Threads for work on logits; to be used within a step only."""
        return self._open_parts()[0].pool

    def read(self, ids: Sequence[int], first: int, use: Callable[[int, NDArray[np.float32]], None]) -> None:
        """Run through `ids`, n_batch a time, and show the logits behind ids[first] and each id after it.

        Keys and values of ids[:first] may come out of the cache.

        Args:
            use: called as use(i, logits) with the logits (rows, vocab) behind ids[i], ids[i + 1], ..., which
                are gone after it.
        """
        n_batch = self._open_parts()[0].n_batch
        sequence = self.open(ids[: first + 1], len(ids))
        try:
            while len(sequence) < len(ids):
                start = len(sequence)
                chunk = ids[start : start + n_batch]
                end = start + len(chunk)

                def show(logits: NDArray[np.float32], i: int = max(start, first)) -> None:
                    if len(logits):
                        use(i, logits)

                self.run([Step(sequence, chunk, n_logits=max(0, end - max(start, first)))], show)
        finally:
            self.release(sequence)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits (len(ids), vocab) behind every token of `ids`."""
        out = np.empty((len(ids), self.vocab_size), np.float32)

        def keep(i: int, logits: NDArray[np.float32]) -> None:
            out[i : i + len(logits)] = logits

        self.read(ids, 0, keep)
        return out

    def close(self) -> None:
        """Free weights and cache; steps from now on raise ModelClosedError."""
        with self._lock:
            self._parts = None

    def _open_parts(self) -> tuple[Phi3, KVCache]:
        if self._parts is None:
            raise ModelClosedError("the model has been closed; load it again")
        return self._parts


def short_context(config: Config, rope_factors: str) -> int:
    """Tokens of the longest sequence whose keys are rotated with the short factors.

    Raises:
        InvalidParameterError: rope_factors is none of ROPE_FACTORS, or "long" where there is but one set.
    """
    if rope_factors not in ROPE_FACTORS:
        choices = ", ".join(ROPE_FACTORS)
        raise InvalidParameterError(f"rope_factors is {rope_factors!r}; it must be one of {choices}")
    has_long = config.rope_factors_long is not None
    if rope_factors == "long" and not has_long:
        raise InvalidParameterError(
            "rope_factors is 'long', but this model has the same rotary factors for all lengths: use 'auto'"
        )
    if rope_factors == "auto" and has_long:
        return config.original_context_length
    return 0 if rope_factors == "long" else config.context_length


@dataclass(frozen=True, slots=True)
class Token:
    """A generated token; `finish_reason` is set on the last, and a stop token is not part of the answer."""

    id: int
    finish_reason: FinishReason | None
    logprob: TokenLogprob | None


class Generation:
    """The continuation of one prompt, token by token.

    Args:
        ids: the prompt; together with params.max_tokens it fits the context (the caller has checked).
        stop_ids: tokens that end the answer.
    """

    def __init__(
        self,
        engine: Engine,
        ids: Sequence[int],
        params: SamplingParams,
        stop_ids: Collection[int],
        progress: Progress | None,
    ) -> None:
        self.sampler = Sampler(params, ids)
        self._engine, self._ids, self._stop_ids, self._progress = engine, list(ids), stop_ids, progress
        self._wants_logprobs = params.logprobs is not None
        left = engine.n_ctx - len(ids)
        self.limit = left if params.max_tokens is None else min(params.max_tokens, left)
        self.n_generated = 0
        self.cached_tokens = 0
        self.draft_n = self.draft_n_accepted = 0
        self.reprefill_tokens, self.reprefill_seconds = 0, 0.0
        self._lookup = PromptLookup(ids) if engine.speculate else None
        self._sequence: CachedSequence | None = None
        self._ready: deque[tuple[int, TokenLogprob | None]] = deque()  # chosen, but not yet asked for
        self._last = 0
        self.finished = False
        self.prompt_seconds = self.generation_seconds = 0.0

    def next(self) -> Token:
        """Compute one more token. An exception (Ctrl-C is one) ends the generation and frees its pages."""
        started = perf_counter()
        first = self._sequence is None
        try:
            if self._sequence is None:
                self.cached_tokens = self._read(self._ids)
            elif not self._ready:
                if self._sequence.rope == SHORT and len(self._sequence) == self._engine.n_short:
                    self._read_again(self._sequence)
                else:
                    self._decode(self._sequence)
        except BaseException:
            self.close()
            raise
        if first:
            self.prompt_seconds = perf_counter() - started
        else:
            self.generation_seconds += perf_counter() - started
        token, logprob = self._ready.popleft()
        self._last = token
        finish_reason: FinishReason | None = None
        if token in self._stop_ids:
            finish_reason = "stop"
        else:
            self.n_generated += 1
            if self.n_generated >= self.limit:
                finish_reason = "length"
        if finish_reason:
            self.close()
        return Token(token, finish_reason, logprob)

    def close(self) -> None:
        """Free the sequence's pages; no further token can be computed."""
        self.finished = True
        if self._sequence is not None:
            self._engine.release(self._sequence)
            self._sequence = None

    def usage(self) -> Usage:
        """Tokens counted so far."""
        return Usage(len(self._ids), self.n_generated, self.cached_tokens)

    def timings(self, load_ms: float) -> Timings:
        """Times measured so far."""
        return Timings(
            load_ms,
            1000 * self.prompt_seconds,
            1000 * self.generation_seconds,
            len(self._ids) - self.cached_tokens,
            max(0, self.n_generated - 1),
            self.draft_n,
            self.draft_n_accepted,
            self.reprefill_tokens,
            1000 * self.reprefill_seconds,
        )

    def _decode(self, sequence: CachedSequence) -> None:
        """One step: the last token, and behind it what the text may go on with, verified in the same pass."""
        drafts: list[int] = []
        if self._lookup:
            most = min(self._engine.speculate, self.limit - self.n_generated - 1)
            if sequence.rope == SHORT:
                most = min(most, self._engine.n_short - len(sequence) - 1)
            drafts = list(takewhile(lambda token: token not in self._stop_ids, self._lookup.draft(most)))
        step = Step(sequence, (self._last, *drafts), n_logits=1 + len(drafts), n_drafts=len(drafts))
        accepted = self._engine.run([step], lambda logits: self._choose(logits, drafts))
        self._engine.accept(sequence, drafts[:accepted])
        self.draft_n += len(drafts)
        self.draft_n_accepted += accepted
        if self._lookup:
            self._lookup.settle(len(drafts), accepted)

    def _read(self, ids: Sequence[int], stage: str = "prompt") -> int:
        """Begin the sequence with `ids` and choose the token behind them; returns how many were cached."""
        self._sequence = self._engine.open(ids, len(ids))
        n_cached = len(self._sequence)
        self._engine.prefill(self._sequence, ids, self._choose, self._progress, stage)
        return n_cached

    def _read_again(self, sequence: CachedSequence) -> None:
        """One step of a sequence that outgrows the original context: all of it, with the long factors.

        They turn every key, and all layers but the first saw the old ones: nothing that was computed stays
        right.
        """
        started = perf_counter()
        ids = [*sequence.tokens, self._last]
        self._sequence = None
        self._engine.release(sequence)
        logger.info(
            "the text outgrew the %d tokens of the original context and is read again with the long rotary "
            "factors; rope_factors='long' takes them from the start",
            self._engine.n_short,
        )
        self.reprefill_tokens = len(ids) - self._read(ids, "again")
        self.reprefill_seconds = perf_counter() - started

    def _choose(self, logits: NDArray[np.float32], drafts: Sequence[int] = ()) -> int:
        """Make the tokens behind the last one and behind each right draft ready; returns how many were right.

        Logits (1 + drafts, vocab) behind a wrong draft answer a question that nobody asks.
        """
        for i, row in enumerate(logits):
            try:
                token = self.sampler.sample(row)
            except NumericalError:
                if i == 0:
                    raise
                break  # the tokens before it come first; the next step meets it again
            self._ready.append((token, self.sampler.logprob(row, token) if self._wants_logprobs else None))
            if self._lookup:
                self._lookup.append(token)
            if i == len(drafts) or token != drafts[i]:
                break
        return len(self._ready) - 1
