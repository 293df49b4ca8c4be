"""Stop strings: text is withheld until it can no longer be the beginning of one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first stop string in text that arrives in pieces.

    The stop string completed first counts; of several completed by the same character, the longest. The
    outcome does not depend on how the text is cut into pieces. Every character is looked at once (Knuth,
    Morris, Pratt: "Fast pattern matching in strings", 1977).

    Attributes:
        matched: the stop string found, or None.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        """Args: stops: non-empty strings."""
        self.matched: str | None = None
        self._stops = [(stop, _borders(stop)) for stop in stops]
        self._lengths = [0] * len(stops)  # of each stop string, how much of it the text seen so far ends with
        self._held = ""

    def push(self, text: str) -> str:
        """Take the next piece of text; return what may be shown. After a match nothing is."""
        if self.matched is not None:
            return ""
        pending = self._held + text
        for end, char in enumerate(text, start=len(self._held) + 1):
            for i, (stop, borders) in enumerate(self._stops):
                length = self._lengths[i]
                while length and stop[length] != char:
                    length = borders[length - 1]
                self._lengths[i] = length + (stop[length] == char)
                if self._lengths[i] == len(stop) and len(stop) > len(self.matched or ""):
                    self.matched = stop
            if self.matched is not None:
                self._held = ""
                return pending[: end - len(self.matched)]
        safe = len(pending) - max(self._lengths, default=0)
        self._held = pending[safe:]
        return pending[:safe]

    def flush(self) -> str:
        """The text has ended: return what was withheld."""
        held, self._held = self._held, ""
        return held


def _borders(pattern: str) -> list[int]:
    """For each prefix of the pattern, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[length] != pattern[i]:
            length = borders[length - 1]
        length += pattern[length] == pattern[i]
        borders[i] = length
    return borders
