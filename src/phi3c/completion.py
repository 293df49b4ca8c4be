"""What generating returns: a finished completion, or the chunks of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .sampling import TokenLogprob

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens counted."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # of the prompt, found in the cache instead of computed

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Wall time, in milliseconds."""

    load_ms: float  # opening and packing the model
    prompt_ms: float  # up to the first logits
    generation_ms: float  # from there on
    prompt_tokens: int  # computed in prompt_ms
    generation_tokens: int  # computed in generation_ms
    draft_n: int = 0  # tokens guessed, with `speculate`
    draft_n_accepted: int = 0  # of them, those that were right
    reprefill_tokens: int = 0  # read again with long rotary factors: the original context was outgrown
    reprefill_ms: float = 0.0  # how much of generation_ms that took

    @property
    def time_to_first_token_ms(self) -> float:
        """From the call to the first token; loading not included."""
        return self.prompt_ms

    @property
    def prompt_tokens_per_second(self) -> float:
        """Speed of reading the prompt."""
        return 1000 * self.prompt_tokens / self.prompt_ms if self.prompt_ms else 0.0

    @property
    def generation_tokens_per_second(self) -> float:
        """Speed of the tokens after the first."""
        return 1000 * self.generation_tokens / self.generation_ms if self.generation_ms else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """One generated token, and the text that has become certain with it.

    `text` is empty while bytes of a character are missing or a stop string may be beginning.
    """

    text: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer; str() gives its text."""

    text: str
    token_ids: tuple[int, ...]  # generated, the stop token not included
    finish_reason: FinishReason
    stop_detail: str  # "max_tokens", "context", "eog:<|end|>", "stop:<string>", "cancelled"
    usage: Usage
    timings: Timings
    seed: int
    logprobs: tuple[TokenLogprob, ...] | None

    def __str__(self) -> str:
        return self.text
