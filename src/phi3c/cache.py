"""Keys and values: pages of 64 positions, sequences that hold them, and prefixes found again.

A page holds all layers' keys and values of 64 consecutive positions. What a full page contains follows from
the tokens up to its end and the set of rotary factors alone, so it is filed under their hash, and a new
sequence that begins alike takes it instead of computing it: the bits are the same either way.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence as SequenceOf

import numpy as np
from numpy.typing import NDArray

from . import _kernels
from .errors import InvalidParameterError, OutOfMemoryError
from .gguf import GGMLType

PAGE = _kernels.TILE
KV_TYPES = {"f16": GGMLType.F16, "q8_0": GGMLType.Q8_0}
RELEASED = -1
SHORT, LONG = 0, 1  # sets of rotary factors: for sequences within the original context, and for longer ones


class Sequence:
    """Tokens whose keys and values lie in the cache; made by `KVCache.open`.

    Args:
        rope: the set of rotary factors, SHORT or LONG, that all of its keys are turned with.
    """

    def __init__(self, rope: int) -> None:
        self.rope = rope
        self.tokens: list[int] = []
        self.pages: list[int] = []  # by position / 64; RELEASED once out of every window
        self.digest = bytes([rope])  # of the factors and the tokens in full pages

    def __len__(self) -> int:
        return len(self.tokens)


class KVCache:
    """All pages of a model, counted by the sequences that hold them.

    Args:
        heads: attention geometry.
        block_count: layers.
        window: a query sees at most this many keys, itself included; None sees all.
        spare_pages: while there are no more pages than this, full ones that nobody holds are kept for their
            prefix; the least recently used go first.
    """

    def __init__(
        self, heads: _kernels.Heads, block_count: int, *, window: int | None, spare_pages: int
    ) -> None:
        self.pages = _kernels.Pages(heads.page_bytes(block_count))
        self.window = window
        self.spare_pages = spare_pages
        self._holders: dict[int, int] = {}  # page -> sequences that hold it
        self._filed: dict[bytes, int] = {}  # digest of the factors and the tokens up to its end -> page
        self._digests: dict[int, bytes] = {}  # the same, by page
        self._spare: OrderedDict[int, None] = OrderedDict()  # filed and held by nobody, oldest first

    def open(self, ids: SequenceOf[int], rope: int = SHORT) -> Sequence:
        """A sequence that already holds the longest filed prefix of `ids`, their last token excepted."""
        sequence = Sequence(rope)
        for end in range(PAGE, len(ids), PAGE):
            tokens = ids[end - PAGE : end]
            digest = _extend(sequence.digest, tokens)
            page = self._filed.get(digest)
            if page is None:
                break
            self._hold(page)
            sequence.pages.append(page)
            sequence.tokens.extend(tokens)
            sequence.digest = digest
        self._release_unseen(sequence)
        return sequence

    def reserve(self, sequence: Sequence, n: int) -> None:
        """Give the sequence pages for `n` more tokens."""
        while len(sequence.pages) * PAGE < len(sequence) + n:
            if self._spare and self.pages.in_use >= self.spare_pages:
                self._forget(next(iter(self._spare)))
            try:
                page = self.pages.take()
            except MemoryError as error:
                raise OutOfMemoryError(f"{error}; use a smaller n_ctx or fewer sequences") from None
            self._holders[page] = 1
            sequence.pages.append(page)

    def append(self, sequence: Sequence, ids: SequenceOf[int]) -> None:
        """Record that keys and values of `ids` have been written behind the sequence."""
        full = len(sequence) // PAGE
        sequence.tokens.extend(ids)
        for index in range(full, len(sequence) // PAGE):
            sequence.digest = _extend(sequence.digest, sequence.tokens[index * PAGE : (index + 1) * PAGE])
            page = sequence.pages[index]
            if sequence.digest not in self._filed:
                self._filed[sequence.digest] = page
                self._digests[page] = sequence.digest
        self._release_unseen(sequence)

    def close(self, sequence: Sequence) -> None:
        """Let go of the sequence's pages."""
        for page in sequence.pages:
            if page != RELEASED:
                self._let_go(page)
        sequence.pages.clear()
        sequence.tokens.clear()

    def tables(self, sequences: SequenceOf[Sequence]) -> NDArray[np.int32]:
        """(n_sequences, most pages) int32: page ids by position / 64."""
        width = max(len(sequence.pages) for sequence in sequences)
        tables = np.full((len(sequences), width), RELEASED, np.int32)
        for row, sequence in zip(tables, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        return tables

    def _hold(self, page: int) -> None:
        self._spare.pop(page, None)
        self._holders[page] = self._holders.get(page, 0) + 1

    def _let_go(self, page: int) -> None:
        self._holders[page] -= 1
        if self._holders[page]:
            return
        del self._holders[page]
        if page in self._digests:
            self._spare[page] = None
            if len(self._spare) > self.spare_pages:
                self._forget(next(iter(self._spare)))
        else:
            self.pages.give_back(page)

    def _forget(self, page: int) -> None:
        del self._spare[page]
        del self._filed[self._digests.pop(page)]
        self.pages.give_back(page)

    def _release_unseen(self, sequence: Sequence) -> None:
        """Let go of pages that no later position can see."""
        if self.window is None:
            return
        for index in range((len(sequence) - self.window + 1) // PAGE):
            if sequence.pages[index] != RELEASED:
                self._let_go(sequence.pages[index])
                sequence.pages[index] = RELEASED


def kv_types(head_dim: int) -> list[str]:
    """The cache types that heads of `head_dim` can be kept in."""
    return [kv_type for kv_type in KV_TYPES if kv_type != "q8_0" or head_dim % 32 == 0]


def kv_type_id(kv_type: str, head_dim: int) -> GGMLType:
    """ggml's id of a cache type, by its name.

    Raises:
        InvalidParameterError: no such type, or heads of `head_dim` cannot be kept in it.
    """
    if kv_type not in KV_TYPES:
        raise InvalidParameterError(f"kv_type is {kv_type!r}; it must be one of {', '.join(KV_TYPES)}")
    if kv_type not in kv_types(head_dim):
        raise InvalidParameterError(
            f"kv_type q8_0 keeps 32 values to a scale, and this model's heads have {head_dim}: use f16"
        )
    return KV_TYPES[kv_type]


def _extend(digest: bytes, tokens: SequenceOf[int]) -> bytes:
    return hashlib.blake2b(digest + np.asarray(tokens, np.int64).tobytes(), digest_size=16).digest()
