"""phi3c tokenize: show how a model's vocabulary cuts a text, or put ids together again."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from phi3c.cli.progress import ProgressBar
from phi3c.cli.text import read_argument

if TYPE_CHECKING:
    from phi3c.tokenizer import Tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "model", metavar="MODEL", help="a path, owner/repo[:QUANT or /file], an alias or 'demo'"
    )
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the text; '-' or nothing: standard input")
    parser.add_argument("-f", "--file", metavar="FILE", type=Path, help="read the text from FILE")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--ids", action="store_true", help="print only the ids, in one line")
    form.add_argument("--pieces", action="store_true", help="print only the pieces of text, one a line")
    form.add_argument(
        "--decode", action="store_true", help="the other way: TEXT holds ids, and their text is printed"
    )
    bos = parser.add_mutually_exclusive_group()
    bos.add_argument(
        "--add-bos",
        action="store_true",
        default=None,
        help="put the begin token first (default: as the file says)",
    )
    bos.add_argument("--no-bos", action="store_false", dest="add_bos", default=None, help="do not")
    parser.add_argument(
        "--special",
        action="store_true",
        help="read <|end|> and such as special tokens, or print them with --decode",
    )


def main(args: argparse.Namespace) -> int:
    """Print tokens, or the text of ids; only the file's metadata is read."""
    from phi3c import hub
    from phi3c.packed import ModelFile
    from phi3c.tokenizer import Tokenizer

    text = read_argument(args, args.text, "TEXT")
    ids = _ids(args, text) if args.decode else []
    with ProgressBar() as bar:
        path = hub.resolve(args.model, progress=bar)
    with ModelFile(path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
    if args.decode:
        text = tokenizer.decode(ids, skip_special=not args.special)
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        return 0
    ids = tokenizer.encode(text, add_bos=args.add_bos, parse_special=args.special)
    if args.ids:
        print(*ids)
    else:
        for id in ids:
            print(_piece(tokenizer, id) if args.pieces else f"{id:6}  {_piece(tokenizer, id)}")
    return 0


def _ids(args: argparse.Namespace, text: str) -> list[int]:
    """Ids from text such as "1 15043" or "[1, 15043]"."""
    ids = []
    for word in text.strip().removeprefix("[").removesuffix("]").replace(",", " ").split():
        if not (word.isascii() and word.isdigit()):
            args.usage_error(f"{word!r} is no token id; --decode takes ids such as 1 15043")
        ids.append(int(word))
    return ids


def _piece(tokenizer: Tokenizer, id: int) -> str:
    """What a token adds to text, quoted; as bytes where it is a part of a character; else its bare name."""
    data = tokenizer.token_bytes(id)
    if not data:
        return repr(tokenizer.token_text(id))[1:-1]
    try:
        return repr(data.decode())
    except UnicodeDecodeError:
        return repr(data)
