"""phi3c run: answer one prompt."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from phi3c.cli.profile import print_profile
from phi3c.cli.progress import ProgressBar
from phi3c.cli.template import add_chat_template, read_chat_template
from phi3c.cli.text import read_argument
from phi3c.memory import peak_memory

if TYPE_CHECKING:
    from phi3c.completion import Completion
    from phi3c.model import Model, Stream
    from phi3c.sampling import SamplingParams

SAMPLING = {  # flag and field of SamplingParams -> type and help
    "max_tokens": (int, "stop after so many tokens (default: when the model ends or the context is full)"),
    "temperature": (float, "0 always takes the likeliest token"),
    "top_k": (int, "draw among the k likeliest tokens"),
    "top_p": (float, "draw among the likeliest tokens that together have this probability"),
    "min_p": (float, "drop tokens less likely than this share of the likeliest one"),
    "repeat_penalty": (float, "above 1 makes recent tokens less likely"),
    "repeat_last_n": (int, "how many tokens count as recent"),
    "seed": (int, "same seed, same text"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; the sampling ones have the names and the defaults of the Python API."""
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="the prompt; '-' or nothing: standard input"
    )
    parser.add_argument("-f", "--file", metavar="FILE", type=Path, help="read the prompt from FILE")
    parser.add_argument(
        "-m",
        "--model",
        metavar="MODEL",
        help="a path, owner/repo[:QUANT or /file], an alias or 'demo'; default: $PHI3C_MODEL, else phi3-mini",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without chat template"
    )
    for name, (kind, text) in SAMPLING.items():
        parser.add_argument(
            "--" + name.replace("_", "-"), type=kind, metavar="N" if kind is int else "X", help=text
        )
    parser.add_argument(
        "--stop", action="append", metavar="TEXT", help="end before TEXT; may be given repeatedly"
    )
    add_chat_template(parser)
    parser.add_argument("--n-ctx", type=int, metavar="N", help="context length in tokens")
    parser.add_argument(
        "--kv-type", choices=("f16", "q8_0"), default="f16", help="how keys and values are kept"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (see `phi3c doctor`)")
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="draft up to N tokens a step where the text repeats itself: the same text sooner (default: 0)",
    )
    parser.add_argument(
        "--rope-factors",
        choices=("auto", "short", "long"),
        default="auto",
        help="of models whose context was extended: by the text's length (auto), or one of the two sets",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of streaming text")
    parser.add_argument("--stats", action="store_true", help="print speed and memory to stderr")


def main(args: argparse.Namespace) -> int:
    """Stream the completion of a prompt to stdout."""
    from phi3c import hub
    from phi3c.sampling import SamplingParams

    for flag, value in (("--system", args.system), ("--chat-template", args.chat_template)):
        if args.raw and value is not None:
            args.usage_error(f"{flag} is for a chat, and --raw leaves the chat template out")
    chat_template = read_chat_template(args)
    prompt = read_argument(args, args.prompt, "PROMPT")
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    params = SamplingParams(
        **given, stop=tuple(args.stop or ())
    )  # refuses nonsense before anything is loaded
    name = args.model or os.environ.get("PHI3C_MODEL") or hub.DEFAULT_MODEL

    from phi3c.model import Model

    with ProgressBar() as bar:
        path = hub.resolve(name, progress=bar)
        with Model(
            path,
            n_ctx=args.n_ctx,
            n_threads=args.threads,
            kv_type=args.kv_type,
            speculate=args.speculate,
            rope_factors=args.rope_factors,
            chat_template=chat_template,
            progress=bar,
        ) as model:
            stream = _start(model, args, prompt, params, bar)
            if not args.json:
                _print_stream(stream)
            completion = stream.result()
    if args.json:
        print(json.dumps(_as_json(name, completion)))
    if args.stats:
        _print_stats(completion)
    print_profile(model.profile)
    return 0


def _start(
    model: Model, args: argparse.Namespace, prompt: str, params: SamplingParams, bar: ProgressBar
) -> Stream:
    if args.raw:
        return model.generate(prompt, stream=True, params=params, progress=bar)
    messages = [{"role": "user", "content": prompt}]
    return model.chat(messages, system=args.system, stream=True, params=params, progress=bar)


def _print_stream(stream: Stream) -> None:
    """The answer's text goes to stdout; what it thinks before, only to a terminal, and dimmed."""
    dim, undim = ("", "") if os.environ.get("NO_COLOR") else ("\x1b[2m", "\x1b[22m")
    shows_reasoning = sys.stderr.isatty()
    thinking, last = False, ""
    for chunk in stream:
        if chunk.reasoning and shows_reasoning:
            print(dim + chunk.reasoning + undim, end="", file=sys.stderr, flush=True)
            thinking = True
        if chunk.text and thinking:
            print("\n", file=sys.stderr, flush=True)
            thinking = False
        sys.stdout.write(chunk.text)
        sys.stdout.flush()
        last = chunk.text or last
    if not last.endswith("\n"):
        sys.stdout.write("\n")


def _as_json(model: str, completion: Completion) -> dict[str, object]:
    usage, timings = completion.usage, completion.timings
    return {
        "model": model,
        "text": completion.text,
        "reasoning": completion.reasoning,
        "token_ids": list(completion.token_ids),
        "finish_reason": completion.finish_reason,
        "stop_detail": completion.stop_detail,
        "seed": completion.seed,
        "usage": {**asdict(usage), "total_tokens": usage.total_tokens},
        "timings": {
            **asdict(timings),
            "prompt_tokens_per_second": timings.prompt_tokens_per_second,
            "generation_tokens_per_second": timings.generation_tokens_per_second,
            "time_to_first_token_ms": timings.time_to_first_token_ms,
        },
    }


def _print_stats(completion: Completion) -> None:
    usage, timings, peak = completion.usage, completion.timings, peak_memory()
    lines = {
        "load": f"{timings.load_ms:.0f} ms",
        "prompt": f"{usage.prompt_tokens} tokens, {timings.prompt_tokens_per_second:.1f} tok/s",
        "generation": f"{usage.completion_tokens} tokens, {timings.generation_tokens_per_second:.1f} tok/s",
        "drafts": f"{timings.draft_n} tokens, {timings.draft_n_accepted} accepted",
        "first token": f"{timings.time_to_first_token_ms:.0f} ms",
        "peak memory": "unknown" if peak is None else f"{peak / 1e6:.0f} MB",
        "finish reason": f"{completion.finish_reason} ({completion.stop_detail})",
        "seed": str(completion.seed),
    }
    if timings.reprefill_tokens:
        lines["read again"] = f"{timings.reprefill_tokens} tokens, {timings.reprefill_ms:.0f} ms"
    for name, value in lines.items():
        print(f"{name:14}{value}", file=sys.stderr)
