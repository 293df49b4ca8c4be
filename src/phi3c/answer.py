"""What the tokens of an answer say: text, and in a chat also reasoning and tool calls, as they come."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from .reasoning import CLOSE, OPEN, ReasoningSplitter
from .stopping import StopMatcher
from .tokenizer import TextStream, Tokenizer
from .tools import CALL, END_CALL, ToolCall, parse_calls


class Answer:
    """The text of a completion, as its tokens arrive.

    Attributes:
        token_ids: of the answer so far.
        stop: the stop string found, or None.
        tool_calls: those that are complete.
        malformed_call: a tool call could not be read, and went into the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], *, strip_space: bool) -> None:
        """Args: stop: strings that end the text; strip_space: as for TextStream."""
        self.token_ids: list[int] = []
        self.tool_calls: tuple[ToolCall, ...] = ()
        self.malformed_call = False
        self._stream = TextStream(tokenizer, strip_space=strip_space)
        self._stops = StopMatcher(stop)

    @property
    def stop(self) -> str | None:
        return self._stops.matched

    def push(self, id: int) -> tuple[str, str]:
        """Take the next token; return the reasoning and the text that have become certain."""
        self.token_ids.append(id)
        return "", self._stops.push(self._stream.push(id))

    def finish(self) -> tuple[str, str]:
        """No token follows: return the reasoning and the text that were withheld."""
        text = self._stops.push(self._stream.flush())
        return "", text + self._stops.flush()


class ChatAnswer(Answer):
    """An answer to messages: what is thought and what is called is told apart from what is said.

    Stop strings are looked for in what is said only. Tool calls are told by their special tokens, so that no
    text can pass for one; the tags of reasoning may be special tokens or spelled out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str],
        *,
        prompt: Sequence[int],
        thinking: bool,
        tools: bool,
    ) -> None:
        """Args: prompt: its ids; thinking: it ended with `<think>`; tools: it offered some."""
        super().__init__(tokenizer, stop, strip_space=True)
        self._tokenizer, self._prompt = tokenizer, prompt
        self._splitter = ReasoningSplitter(thinking=thinking)
        special = tokenizer.special_tokens
        self._tags = {special[tag]: tag for tag in (OPEN, CLOSE) if tag in special}
        self._call_ids = (special.get(CALL), special.get(END_CALL)) if tools else (None, None)
        self._call: list[int] | None = None  # ids of one that is being written

    def push(self, id: int) -> tuple[str, str]:
        self.token_ids.append(id)
        call, end_call = self._call_ids
        if id == call:
            text = self._finish_call()
            self._call = []
        elif self._call is None:
            text = self._decode(id)
        elif id == end_call:
            text = self._finish_call()
        else:
            self._call.append(id)
            text = ""
        reasoning, said = self._splitter.push(text)
        return reasoning, self._stops.push(said)

    def finish(self) -> tuple[str, str]:
        reasoning, said = self._splitter.push(self._finish_call() + self._stream.flush())
        more_reasoning, more_said = self._splitter.flush()
        text = self._stops.push(said + more_said) + self._stops.flush()
        return reasoning + more_reasoning, text

    def _decode(self, id: int) -> str:
        tag = self._tags.get(id)
        if tag is not None and tag == self._splitter.awaits:
            return self._stream.flush() + tag
        return self._stream.push(id)

    def _finish_call(self) -> str:
        """Read the call that was being written; returns it as text if that fails."""
        if self._call is None:
            return ""
        text, self._call = self._tokenizer.decode(self._call), None
        calls = parse_calls(text)
        if calls is None:
            self.malformed_call = True
            return text
        self.tool_calls += tuple(
            ToolCall(self._call_id(i), name, arguments) for i, (name, arguments) in enumerate(calls)
        )
        return ""

    def _call_id(self, i: int) -> str:
        """Of the i-th call that ends here: another one anywhere else, and the same one whenever repeated."""
        place = repr((list(self._prompt), self.token_ids, i)).encode()
        return f"call_{hashlib.blake2b(place, digest_size=12).hexdigest()}"
