"""Drafts by prompt lookup: where the text repeats itself, the next tokens are guessed from the first time.

A guess costs time whether or not it is right, so guesses are paid for: PRICE a token, out of a purse to which
every right one adds the step it saved. A text that does not repeat itself soon has nothing left to bet.
"""

from __future__ import annotations

from collections.abc import Iterable

NGRAM = 3  # tokens that have to agree before a draft is made
PRICE = 0.55  # steps that one more row in a step takes, 0.3 to 0.55 on AVX2 (docs/performance.md)
START = 1.0  # steps in the purse at first: what an answer that never repeats may lose
ALLOWANCE = 0.01  # steps a token adds: the share of the time that a long one may lose
MOST = 12.0  # steps the purse holds, so that a text which ceases to repeat itself loses no more


class PromptLookup:
    """Follows one text, prompt and answer, and proposes how it goes on.

    Args:
        ids: the text so far.
    """

    def __init__(self, ids: Iterable[int]) -> None:
        self._ids: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # n-gram -> position behind its latest occurrence
        self._source = 0  # position that what comes next is expected to repeat, while _agreed > 0
        self._agreed = 0  # tokens before _source that agree with the end of the text
        self._purse = START
        for token in ids:
            self.append(token)

    def append(self, token: int) -> None:
        """The text goes on with `token`."""
        if self._agreed and self._ids[self._source] == token:
            self._source += 1
            self._agreed += 1
        else:
            self._agreed = 0
        self._ids.append(token)
        if len(self._ids) >= NGRAM:
            ngram = tuple(self._ids[-NGRAM:])
            if not self._agreed and ngram in self._ends:
                self._source, self._agreed = self._ends[ngram], NGRAM
            self._ends[ngram] = len(self._ids)

    def draft(self, most: int) -> list[int]:
        """Up to `most` tokens the text may go on with; half as many as have agreed, while the purse lasts."""
        n = min(most, self._agreed // 2, int(self._purse / PRICE))
        drafts: list[int] = []
        for position in range(self._source, self._source + n):
            beyond = position - len(self._ids)  # a loop shorter than the draft: on into the draft itself
            drafts.append(self._ids[position] if beyond < 0 else drafts[beyond])
        return drafts

    def settle(self, n_drafted: int, n_accepted: int) -> None:
        """A step with `n_drafted` drafts is over, of which the first `n_accepted` were right."""
        earned = n_accepted - PRICE * n_drafted + ALLOWANCE * (n_accepted + 1)
        self._purse = min(self._purse + earned, MOST)
