"""Files of log-probabilities: what one model thinks of a text, kept for others to be compared with.

The format is llama-perplexity's, so that either program reads what the other wrote. Little-endian:

    8 bytes                        "_logits_"
    n_ctx, n_vocab, n_chunk        int32 each
    tokens                         int32 [n_chunk][n_ctx], as the text has them: no BOS put into a chunk
    per scored token of a chunk    scale, minimum float32; step uint16 [n_vocab], to a multiple of two

The tokens at n_ctx / 2 + 1 and after it are scored: n_ctx - n_ctx / 2 - 1 of a chunk. The log-probability of
a token is minimum + scale * step. The steps cover 16 nats below the likeliest one at most; what is less
likely has step 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from .atomic import replacing, require_space
from .errors import LogitsFileError, ModelWriteError

MAGIC: Final = b"_logits_"
HEADER: Final = np.dtype([("magic", "S8"), ("n_ctx", "<i4"), ("n_vocab", "<i4"), ("n_chunk", "<i4")])
STEPS: Final = 2**16 - 1
RANGE: Final = 16.0  # nats that the steps cover at most


def n_scored(n_ctx: int) -> int:
    """Tokens scored of a chunk: those behind its first half and one more."""
    return n_ctx - n_ctx // 2 - 1


@dataclass(frozen=True, slots=True)
class BaseChunk:
    """Log-probabilities mins + scales * steps of a chunk's scored tokens, n rows."""

    scales: NDArray[np.float32]  # (n,)
    mins: NDArray[np.float32]  # (n,)
    steps: NDArray[np.uint16]  # (n, n_vocab); rows may lie apart

    def logprobs(self, tokens: NDArray[np.int32]) -> NDArray[np.float64]:
        """Log-probability of one token (n,) in each row."""
        steps = np.take_along_axis(self.steps, tokens[:, None], axis=1)[:, 0]
        return np.asarray(self.mins + self.scales * steps.astype(np.float64))


class LogitsFile:
    """A file of log-probabilities, read a chunk at a time.

    Attributes:
        n_ctx: tokens of a chunk.
        n_vocab: tokens of the vocabulary.
        tokens: int32 (n_chunk, n_ctx).

    Raises:
        LogitsFileError: no such file, or it contradicts itself or the format.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            header = np.fromfile(self.path, HEADER, 1)
        except OSError as error:
            raise LogitsFileError(f"{self.path} cannot be read: {error.strerror}") from error
        if not header.size or header["magic"][0] != MAGIC:
            raise LogitsFileError(
                f"{self.path} is no file of log-probabilities: it does not begin with {MAGIC.decode()}; "
                "make one with `phi3c perplexity --save-logits`"
            )
        self.n_ctx, self.n_vocab, n_chunk = (int(header[name][0]) for name in ("n_ctx", "n_vocab", "n_chunk"))
        if self.n_ctx < 3 or not 0 < self.n_vocab < 2**30 or n_chunk < 1:  # a record is less than 2 GiB
            raise self._damaged(f"it says {n_chunk} chunks of {self.n_ctx} tokens out of {self.n_vocab}")
        self._record = _record(self.n_vocab)
        self._chunk_bytes = n_scored(self.n_ctx) * self._record.itemsize
        self._start = HEADER.itemsize + 4 * n_chunk * self.n_ctx
        expected = self._start + n_chunk * self._chunk_bytes
        if size != expected:
            raise self._damaged(
                f"{n_chunk} chunks of {self.n_ctx} tokens out of {self.n_vocab} take {expected} bytes, "
                f"it has {size}"
            )
        tokens = np.fromfile(self.path, "<i4", n_chunk * self.n_ctx, offset=HEADER.itemsize)
        if tokens.min() < 0 or tokens.max() >= self.n_vocab:
            raise self._damaged(f"it has a token outside the vocabulary of {self.n_vocab}")
        self.tokens: NDArray[np.int32] = tokens.reshape(n_chunk, self.n_ctx)

    def chunk(self, i: int) -> BaseChunk:
        """The log-probabilities of the scored tokens of tokens[i].

        Raises:
            LogitsFileError: numbers that are no log-probabilities.
        """
        offset = self._start + i * self._chunk_bytes
        records = np.fromfile(self.path, self._record, n_scored(self.n_ctx), offset=offset)
        scales, mins = (np.ascontiguousarray(records[name]) for name in ("scale", "minimum"))
        highest = mins + STEPS * scales.astype(np.float64)
        if not (np.isfinite(mins).all() and (scales >= 0).all() and (highest < 1e-3).all()):
            raise self._damaged(f"chunk {i} has numbers that are no log-probabilities")
        return BaseChunk(scales, mins, records["step"][:, : self.n_vocab])

    def _damaged(self, message: str) -> LogitsFileError:
        return LogitsFileError(f"{self.path} is damaged: {message}; make it again")


Append = Callable[[int, NDArray[np.float32], NDArray[np.float64]], None]


@contextmanager
def writing(path: Path, tokens: NDArray[np.int32], n_vocab: int) -> Iterator[Append]:
    """Write a file, whole or not at all.

    Args:
        path: where to; an existing file is replaced.
        tokens: int32 (n_chunk, n_ctx).

    Yields:
        append(i, logits, log_sums): adds rows of logits (rows, n_vocab), with the logarithms (rows,) of the
        sums of their exponentials; i, the first one's place in its chunk, follows from their order. In all
        come n_scored(n_ctx) rows of every chunk, chunk by chunk.

    Raises:
        ModelWriteError: it cannot be written; the disk may be full.
    """
    n_chunk, n_ctx = tokens.shape
    record = _record(n_vocab)
    try:
        require_space(
            path.parent, HEADER.itemsize + tokens.nbytes + n_chunk * n_scored(n_ctx) * record.itemsize
        )
        with replacing(path) as file:
            file.write(np.array([(MAGIC, n_ctx, n_vocab, n_chunk)], HEADER).tobytes())
            file.write(tokens.astype("<i4").tobytes())

            def append(_: int, logits: NDArray[np.float32], log_sums: NDArray[np.float64]) -> None:
                file.write(_quantise(logits, log_sums, record).data)

            yield append
    except OSError as error:
        raise ModelWriteError(f"{path} cannot be written: {error.strerror or error}") from error


def _record(n_vocab: int) -> np.dtype[np.void]:
    return np.dtype([("scale", "<f4"), ("minimum", "<f4"), ("step", "<u2", (n_vocab + n_vocab % 2,))])


def _quantise(
    logits: NDArray[np.float32], log_sums: NDArray[np.float64], record: np.dtype[np.void]
) -> NDArray[np.void]:
    """Records of rows of logits; row by row, so that a row stays in the processor's cache."""
    records = np.zeros(len(logits), record)
    n_vocab = logits.shape[1]
    for i, row in enumerate(logits):
        top = row.max()
        low = max(row.min(), top - np.float32(RANGE))
        scale = (top - low) / np.float32(STEPS)
        records["scale"][i], records["minimum"][i] = scale, low - log_sums[i]
        if scale > 0:
            steps = np.rint((np.maximum(row, low) - low) / scale)
            records["step"][i, :n_vocab] = np.minimum(steps, STEPS)
    return records
