"""Text that a command works on: an argument, a file, or standard input."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def read_exactly(args: argparse.Namespace, path: Path | None) -> str:
    """What the file holds; standard input where there is none."""
    source = path or "standard input"
    try:
        data = path.read_bytes() if path else sys.stdin.buffer.read()
        return data.decode()
    except OSError as error:
        args.usage_error(f"cannot read {source}: {error.strerror}")
    except UnicodeDecodeError as error:
        args.usage_error(
            f"{source} is not UTF-8 text: byte {error.start} is {error.object[error.start]:#04x}"
        )
    raise AssertionError("usage_error exits")


def read_text(args: argparse.Namespace) -> str:
    """What args.file holds, or else standard input; a newline at its end is the editor's, not the user's."""
    return read_exactly(args, args.file).removesuffix("\n").removesuffix("\r")


def read_argument(args: argparse.Namespace, text: str | None, name: str) -> str:
    """The argument, called `name` in the help; what `read_text` gives where it is "-" or not there."""
    if args.file is not None and text is not None:
        args.usage_error(f"give a {name} or -f FILE, not both")
    if text is not None and text != "-":
        return text
    if args.file is None and text is None and sys.stdin.isatty():
        args.usage_error(f"give a {name}, or -f FILE, or pipe text in")
    return read_text(args)
