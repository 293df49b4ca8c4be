"""A progress bar for the terminal: one line on stderr that appears when something takes long."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TextIO

WIDTH = 24  # characters of the bar itself
PATIENCE = 0.3  # seconds before the line appears
INTERVAL = 0.1  # seconds between two drawings of it
LABELS = {
    "download": "downloading",
    "pack": "packing weights",
    "quantize": "quantising weights",
    "prompt": "reading prompt",
    "again": "reading it all again",
}
BYTES = ("download", "pack", "quantize")  # stages that count bytes; the others count tokens
AMID = ("again",)  # stages within an answer: the cursor is where its text goes on

# VT100's: scroll, if need be, to have a line below, and remember the cursor; back to it; one line down.
MAKE_ROOM, BACK, DOWN = "\x1bD\x1b[A\x1b7", "\x1b8", "\x1b[B"


class ProgressBar:
    """Draws `(stage, done, total)` reports; silent where stderr is not a terminal.

    It is its own callback: `Model(path, progress=bar)`. The line is wiped when a stage is complete and when
    the bar is closed. Amid an answer on the same terminal it is the line below the cursor.
    """

    def __init__(self, stream: TextIO | None = None, patience: float = PATIENCE) -> None:
        self._stream = stream or sys.stderr
        self._enabled = _is_terminal(self._stream)
        self._patience = patience
        self._stage = ""
        self._started = 0.0
        self._drawn = 0.0  # time of the last drawing; 0: nothing is on the line

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        """Report that `done` of `total` (bytes or tokens) of a stage are behind us; `note` ends the line."""
        if not self._enabled:
            return
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._started = stage, now
        if done >= total:
            self.close()
        elif now - self._started >= self._patience and now - self._drawn >= INTERVAL:
            if self._is_amid and not self._drawn:
                self._stream.write(MAKE_ROOM)
            self._drawn = now
            share = done / total
            bar = "#" * round(share * WIDTH)
            rate = _rate(stage, done / max(now - self._started, 1e-3))
            label = LABELS.get(stage, stage)
            self._stream.write(f"{self._line}{label} [{bar:<{WIDTH}}] {share:4.0%} {rate}{note}\x1b[K")
            self._stream.flush()

    def close(self) -> None:
        """Wipe the line."""
        if self._drawn:
            self._stream.write(f"{self._line}\x1b[K" + (BACK if self._is_amid else ""))
            self._stream.flush()
        self._stage, self._drawn = "", 0.0

    @property
    def _is_amid(self) -> bool:
        return self._stage in AMID and sys.stdout.isatty()

    @property
    def _line(self) -> str:
        """What moves the cursor to the beginning of the bar's line."""
        return f"{BACK}{DOWN}\r" if self._is_amid else "\r"

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _rate(stage: str, per_second: float) -> str:
    return f"{per_second / 1e6:.1f} MB/s" if stage in BYTES else f"{per_second:.0f} tok/s"


def _is_terminal(stream: TextIO) -> bool:
    """Whether escape sequences do on the stream what they should; a Windows console has to be asked."""
    if sys.platform != "win32" or not stream.isatty():
        return stream.isatty()
    import ctypes
    import msvcrt

    console, mode = ctypes.c_void_p(msvcrt.get_osfhandle(stream.fileno())), ctypes.c_uint32(0)
    kernel32, follow_escapes = ctypes.windll.kernel32, 4  # ENABLE_VIRTUAL_TERMINAL_PROCESSING
    known = kernel32.GetConsoleMode(console, ctypes.byref(mode))
    return bool(known and kernel32.SetConsoleMode(console, ctypes.c_uint32(mode.value | follow_escapes)))
