"""Text that a command works on: an argument, a file, or standard input."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn


def read_text(
    text: str | None, file: Path | None, *, name: str, usage_error: Callable[[str], NoReturn]
) -> str:
    """Take the text from where the arguments say; a newline at its end is the editor's, not the user's.

    Args:
        text: The argument; standard input when it is "-" or, without a file, None.
        file: The file of `-f`.
        name: What the argument is called in the help.
        usage_error: Ends the program with a message.
    """
    if file is not None and text is not None:
        usage_error(f"give a {name} or -f FILE, not both")
    if text not in (None, "-"):
        return text
    if file is None and text is None and sys.stdin.isatty():
        usage_error(f"give a {name}, or -f FILE, or pipe text in")
    source = file or "standard input"
    try:
        data = file.read_bytes() if file else sys.stdin.buffer.read()
        return data.decode().removesuffix("\n").removesuffix("\r")
    except OSError as error:
        usage_error(f"cannot read {source}: {error.strerror}")
    except UnicodeDecodeError as error:
        usage_error(f"{source} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}")
