"""What generating returns: a finished completion, or the chunks of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .sampling import TokenLogprob
from .tools import ToolCall

FinishReason = Literal["stop", "length", "tool_calls", "cancelled"]


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

    `text` and `reasoning` are empty while bytes of a character are missing, a stop string or a tag may be
    beginning, or a tool call is being written. The last chunk has all `tool_calls`.
    """

    text: str
    token_id: int
    finish_reason: FinishReason | None = None
    logprob: TokenLogprob | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer; str() gives its text.

    Of a chat, `text` is without the reasoning between `<think>` and `</think>`, which `reasoning` holds, and
    without `tool_calls`. Calls that are malformed or broken off stay in `text`, as the model wrote them; if
    it then ended by itself, `stop_detail` is "malformed_tool_call".
    """

    text: str
    token_ids: tuple[int, ...]  # generated, the stop token not included
    finish_reason: FinishReason
    # "max_tokens", "context", "eog:<|end|>", "malformed_tool_call", "stop:<string>", "cancelled"
    stop_detail: str
    usage: Usage
    timings: Timings
    seed: int
    logprobs: tuple[TokenLogprob, ...] | None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()

    @property
    def message(self) -> dict[str, object]:
        """The answer as a message to go on with; without reasoning, which no model is shown again."""
        message: dict[str, object] = {"role": "assistant", "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [call.as_message_part() for call in self.tool_calls]
        return message

    def __str__(self) -> str:
        return self.text
