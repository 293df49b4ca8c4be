"""phi3c template: show a model's chat template, or messages as it lays them out."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from phi3c.cli.inspect import printable
from phi3c.cli.text import read_exactly


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "model", metavar="MODEL", help="a path, owner/repo[:QUANT or /file], an alias or 'demo'"
    )
    parser.add_argument(
        "messages",
        nargs="?",
        metavar="MESSAGES",
        help="JSON: a list of messages, or an object with messages and tools; '-': standard input",
    )
    parser.add_argument("--no-generation-prompt", action="store_true", help="end after the last message")
    parser.add_argument("--ids", action="store_true", help="print the prompt's token ids, in one line")
    add_chat_template(parser)


def add_chat_template(parser: argparse.ArgumentParser) -> None:
    """Declare `--chat-template`."""
    parser.add_argument(
        "--chat-template", metavar="FILE", type=Path, help="use the chat template in FILE, not the model's"
    )


def read_chat_template(args: argparse.Namespace) -> str | None:
    """The text of the file that `--chat-template` names."""
    return None if args.chat_template is None else read_exactly(args, args.chat_template)


def main(args: argparse.Namespace) -> int:
    """Print the template, or what it makes of the messages; the weights are not loaded."""
    from phi3c import hub
    from phi3c.chat import ChatTemplate
    from phi3c.cli.progress import ProgressBar
    from phi3c.packed import ModelFile
    from phi3c.tokenizer import Tokenizer

    if args.messages is None and (args.ids or args.no_generation_prompt):
        args.usage_error("--ids and --no-generation-prompt need MESSAGES")
    override = read_chat_template(args)
    request = None if args.messages is None else _read_request(args)
    with ProgressBar() as bar:
        path = hub.resolve(args.model, progress=bar)
    with ModelFile(path) as file:
        tokenizer = Tokenizer.from_gguf(file.metadata)
        template = ChatTemplate.from_gguf(file.metadata, tokenizer, override)
        if override is None and not file.metadata.get("tokenizer.chat_template"):
            print("phi3c: the file has no chat template; this is one for its vocabulary", file=sys.stderr)
    if request is None:
        _write(template.source)
        return 0
    segments = template.segments(
        request["messages"],
        tools=request.get("tools"),
        add_generation_prompt=not args.no_generation_prompt,
    )
    if args.ids:
        print(*tokenizer.encode_segments(segments))
    else:
        _write("".join(text for text, _ in segments))
    return 0


def _read_request(args: argparse.Namespace) -> dict[str, Any]:
    source = "standard input" if args.messages == "-" else args.messages
    try:
        request = json.loads(read_exactly(args, None if args.messages == "-" else Path(args.messages)))
    except (ValueError, RecursionError) as error:
        args.usage_error(f"{source} is not JSON: {error}")
    if isinstance(request, list):
        request = {"messages": request}
    if not isinstance(request, dict) or not isinstance(request.get("messages"), list):
        args.usage_error(f"{source} holds neither a list of messages nor an object with such a list")
    if not isinstance(request.get("tools") or [], list):
        args.usage_error(f"{source}: the tools are no list")
    checked: dict[str, Any] = request
    return checked


def _write(text: str) -> None:
    """To a pipe exactly; to a terminal without what would steer it, and with a line's end."""
    if sys.stdout.isatty():
        text = printable(text).removesuffix("\n") + "\n"
    sys.stdout.write(text)
