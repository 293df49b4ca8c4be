"""How the next token is chosen: the parameters, and a sampler per sequence."""

from __future__ import annotations

import difflib
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from phi3c._kernels import SamplerChain
from phi3c.errors import InvalidParameterError, NumericalError

_OTHER_NAMES = {  # what other libraries call them
    "max_new_tokens": "max_tokens",
    "num_predict": "max_tokens",
    "n_predict": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "repetition_penalty": "repeat_penalty",
    "repeat_window": "repeat_last_n",
    "stop_strings": "stop",
    "top_logprobs": "logprobs",
}


class SamplingOptions(TypedDict, total=False):
    """The keyword arguments of `SamplingParams`, for signatures that pass them on."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repeat_penalty: float
    repeat_last_n: int
    seed: int | None
    stop: str | Sequence[str]
    logprobs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    In this order: repeat_penalty, top_k, top_p, min_p, temperature, draw. The probabilities that top_p and
    min_p look at are those at temperature 1. Temperature 0 takes the most likely token, of equals the lowest
    id, and heeds repeat_penalty alone.

    Attributes:
        max_tokens: at most this many; None: until the model stops or the context is full.
        temperature: 0 to 100; below 1 sharpens, above 1 flattens the distribution.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the most likely tokens until their probabilities sum to this; 1 keeps all.
        min_p: keep tokens at least this likely relative to the most likely one; 0 keeps all.
        repeat_penalty: divides positive and multiplies negative logits of recent tokens; 1 is none.
        repeat_last_n: how many tokens back, prompt included, are recent.
        seed: of the random numbers, 0 to 2^64 - 1; None draws one.
        stop: strings that end the text and are not part of it; one string is taken as a list of one.
        logprobs: report log-probabilities, with up to 20 alternatives for each token; None does not.

    Raises:
        InvalidParameterError: a value is out of its range.
    """

    max_tokens: int | None = None
    temperature: float = 0.7
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    stop: str | Sequence[str] = ()
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            self._normalise_int("max_tokens", 1, 2**31 - 1)
        self._normalise_float("temperature", 0.0, 100.0)
        self._normalise_int("top_k", 0, 2**31 - 1)
        self._normalise_float("top_p", 0.0, 1.0)
        self._normalise_float("min_p", 0.0, 1.0)
        self._normalise_float("repeat_penalty", 0.01, 100.0)
        self._normalise_int("repeat_last_n", 0, 2**20)
        if self.seed is not None:
            self._normalise_int("seed", 0, 2**64 - 1)
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
            raise InvalidParameterError(
                f"stop must be a string or strings, none of them empty, got {self.stop!r}"
            )
        object.__setattr__(self, "stop", tuple(stop))
        if self.logprobs is not None:
            self._normalise_int("logprobs", 0, 20)

    @classmethod
    def from_kwargs(cls, **kwargs: Unpack[SamplingOptions]) -> Self:
        """Parameters from a caller's keyword arguments.

        Raises:
            TypeError: a name is unknown; the message suggests the one that was probably meant.
            InvalidParameterError: a value is out of its range.
        """
        known = [field.name for field in fields(cls)]
        for name in kwargs:
            if name in known:
                continue
            close = difflib.get_close_matches(name, known, 1)
            meant = _OTHER_NAMES.get(name, close[0] if close else None)
            hint = f"did you mean {meant!r}?" if meant else f"known are {', '.join(known)}"
            raise TypeError(f"unknown sampling argument {name!r}: {hint}")
        return cls(**kwargs)

    def _normalise_int(self, name: str, low: int, high: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or not low <= value <= high:
            raise InvalidParameterError(f"{name} must be an integer from {low} to {high}, got {value!r}")
        object.__setattr__(self, name, int(value))

    def _normalise_float(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            raise InvalidParameterError(f"{name} must be a number from {low:g} to {high:g}, got {value!r}")
        object.__setattr__(self, name, float(value))


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms of probabilities as the model gave them, before penalties, filters and temperature.

    Attributes:
        token_id: the token chosen.
        logprob: its log-probability.
        top: (token id, log-probability) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Sampler:
    """Chooses the tokens of one sequence.

    The n-th token depends on its logits, the ids before it, the parameters, the seed and n alone; not on what
    other sequences do nor on threads.

    Attributes:
        seed: as given, or as drawn.
    """

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        self._logprobs = params.logprobs or 0
        self._chain = SamplerChain(
            params.temperature, params.top_k, params.top_p, params.min_p, params.repeat_penalty
        )
        self._drawn = 0
        recent = prompt_ids[-params.repeat_last_n :] if params.repeat_last_n else ()
        self._ring = np.empty(params.repeat_last_n, np.int32)
        self._ring[: len(recent)] = recent
        self._seen = len(recent)

    def sample(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token and remember it.

        Args:
            logits: (vocab,), contiguous; not changed.

        Raises:
            NumericalError: a logit is NaN or infinite.
        """
        token = self._chain.draw(logits, self._ring[: self._seen], self.seed, self._drawn)
        if token < 0:
            raise not_finite(logits)
        self._drawn += 1
        if self._ring.size:
            self._ring[self._seen % self._ring.size] = token
            self._seen += 1
        return token

    def logprob(self, logits: NDArray[np.float32], token_id: int) -> TokenLogprob:
        """Log-probabilities of a token and of `params.logprobs` alternatives, from logits (vocab,).

        Raises:
            NumericalError: a logit is NaN or infinite.
        """
        n_top = min(self._logprobs, logits.size)
        logprob, top = self._chain.top_logprobs(logits, token_id, n_top)
        if math.isnan(logprob):
            raise not_finite(logits)
        return TokenLogprob(token_id, logprob, tuple(top))


def not_finite(logits: NDArray[np.float32]) -> NumericalError:
    """What is wrong with logits (vocab,) that are not all finite."""
    bad = np.flatnonzero(~np.isfinite(logits))
    first = f", the first of them for token {bad[0]}" if bad.size else ""
    return NumericalError(
        f"{bad.size} of {logits.size} logits are NaN or infinite{first}: "
        "the model's weights are damaged or its activations overflowed; check the file"
    )
