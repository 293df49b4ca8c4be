"""The command `phi3c`: text to stdout, everything else to stderr, exit codes that scripts can rely on.

Each command is a module with `add_arguments(parser)` and `main(args) -> int`; what is slow to import is
imported inside `main`, so that `phi3c --help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import io
import logging
import os
import sys
from collections.abc import Sequence
from typing import Final

from phi3c.cli import bench, doctor, inspect, models, pack, perplexity, quantize, run, template, tokenize
from phi3c.errors import ContextLengthError, InvalidParameterError, ModelLoadError, Phi3cError

EXIT_RUNTIME: Final = 1
EXIT_USAGE: Final = 2
EXIT_MODEL: Final = 3
EXIT_CONTEXT: Final = 4
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT, as shells have it

EPILOG = """\
exit codes: 0 success, 1 runtime error, 2 usage, 3 model cannot be loaded, 4 context too short, 130 Ctrl-C

environment: PHI3C_MODEL (default model), PHI3C_NUM_THREADS, PHI3C_ISA, PHI3C_CACHE, PHI3C_LOG (debug,
info, ...); HF_HOME, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE as the Hugging Face Hub library has them
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments without the program's name; `sys.argv[1:]` when None.

    Returns:
        The exit code.
    """
    args = _parse(argv)
    _set_up_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows "?"
        if sys.platform == "win32" and not sys.stdout.isatty() and "PYTHONIOENCODING" not in os.environ:
            sys.stdout.reconfigure(encoding="utf-8")  # as prompts are read; else files get the code page
    try:
        code: int = args.main(args)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return EXIT_INTERRUPTED
    except Phi3cError as error:
        logging.getLogger("phi3c").debug("traceback of the error below", exc_info=True)
        print(f"phi3c: error: {error}", file=sys.stderr)
        return _exit_code(error)
    except OSError as error:
        if error.errno != errno.EPIPE and (sys.platform != "win32" or error.errno != errno.EINVAL):
            raise
        # The reader has had enough, as in `phi3c run ... | head`. Python flushes stdout once more on its way
        # out: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    # `MODEL --ids TEXT`: older argparse takes an optional TEXT for absent by then
    absent = [name for name in ("text", "messages") if getattr(args, name, "") is None]
    if absent and len(rest) == 1 and (rest == ["-"] or rest[0][:1] != "-"):
        setattr(args, absent[0], rest[0])
    elif rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return args


def _exit_code(error: Phi3cError) -> int:
    if isinstance(error, ModelLoadError):
        return EXIT_MODEL
    if isinstance(error, ContextLengthError):
        return EXIT_CONTEXT
    return EXIT_USAGE if isinstance(error, InvalidParameterError) else EXIT_RUNTIME


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="phi3c",
        description="Run Phi-3 family models (GGUF) on the CPU.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    modules = {
        "run": run, "tokenize": tokenize, "template": template, "bench": bench, "perplexity": perplexity,
        "inspect": inspect, "pack": pack, "quantize": quantize, "models": models, "doctor": doctor,
    }  # fmt: skip
    for name, module in modules.items():
        text = (module.__doc__ or "").partition(": ")[2].strip()
        command = commands.add_parser(name, help=text.rstrip("."), description=text[:1].upper() + text[1:])
        module.add_arguments(command)
        command.set_defaults(main=module.main, usage_error=command.error)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import phi3c

        print(f"phi3c {phi3c.__version__}")
        parser.exit()


def _set_up_logging() -> None:
    """Show warnings, what is about to be downloaded, and as much more as `PHI3C_LOG` asks for."""
    level = os.environ.get("PHI3C_LOG", "warning").upper()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("phi3c: %(message)s"))
    logger = logging.getLogger("phi3c")
    logger.handlers = [handler]
    logger.setLevel(level if level in logging.getLevelNamesMapping() else logging.WARNING)
    logging.getLogger("phi3c.hub").setLevel(min(logger.level, logging.INFO))
