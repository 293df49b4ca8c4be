"""The part of an answer that a reasoning model thinks in, between `<think>` and `</think>`."""

from __future__ import annotations

from enum import Enum, auto

OPEN, CLOSE = "<think>", "</think>"


class _State(Enum):
    START = auto()  # nothing but white space so far
    THINKING = auto()
    CLOSED = auto()  # behind the closing tag, before the answer's first word
    ANSWER = auto()


class ReasoningSplitter:
    """Tells reasoning and answer apart in text that arrives in pieces.

    Reasoning is what begins with `<think>`, with nothing but white space before it, and ends with the first
    `</think>` or with the text. The tags and the white space on their inner sides and behind are part of
    neither. Text that does not begin so is all answer. The outcome does not depend on how the text is cut
    into pieces, and no more is withheld than what may turn out to be a tag, or white space before one.

    Args:
        thinking: the prompt ended with `<think>`, so the text begins inside.
    """

    def __init__(self, *, thinking: bool) -> None:
        self._state = _State.THINKING if thinking else _State.START
        self._held = ""
        self._begun = False  # some reasoning has been given out

    @property
    def awaits(self) -> str | None:
        """The tag that would count if it came next."""
        if self._state is _State.START and not self._held:
            return OPEN
        return CLOSE if self._state is _State.THINKING else None

    def push(self, text: str) -> tuple[str, str]:
        """Take the next piece; return the reasoning and the answer text that have become certain."""
        reasoning = answer = ""
        held = self._held + text
        if self._state is _State.START:
            blank = len(held) - len(held.lstrip())
            answer, held = held[:blank], held[blank:]
            if held.startswith(OPEN):
                self._state, held = _State.THINKING, held[len(OPEN) :]
            elif held and not OPEN.startswith(held):
                self._state = _State.ANSWER
        if self._state is _State.THINKING:
            if not self._begun:
                held = held.lstrip()
            thought, close, rest = held.partition(CLOSE)
            if close:
                reasoning, held, self._state = thought.rstrip(), rest, _State.CLOSED
            else:
                reasoning = held[: _certain(held)]
                held = held[len(reasoning) :]
            self._begun = self._begun or reasoning != ""
        if self._state is _State.CLOSED:
            held = held.lstrip()
            if held:
                self._state = _State.ANSWER
        if self._state is _State.ANSWER:
            answer, held = answer + held, ""
        self._held = held
        return reasoning, answer

    def flush(self) -> tuple[str, str]:
        """The text has ended: return what was withheld."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._state is _State.THINKING else ("", held)


def without_reasoning(text: str) -> str:
    """The answer in a text that may begin with reasoning."""
    splitter = ReasoningSplitter(thinking=False)
    return splitter.push(text)[1] + splitter.flush()[1]


def _certain(text: str) -> int:
    """Characters of `text` that neither begin the closing tag nor are white space before it."""
    for n in range(min(len(CLOSE) - 1, len(text)), -1, -1):
        if text.endswith(CLOSE[:n]):
            return len(text[: len(text) - n].rstrip())
    raise AssertionError("every text ends with the empty one")
