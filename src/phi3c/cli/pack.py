"""phi3c pack: write a model in the layout of the kernels, for loading at once."""

from __future__ import annotations

import argparse
from pathlib import Path

from phi3c.cli.progress import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "model", metavar="MODEL", help="a path, owner/repo[:QUANT or /file], an alias or 'demo'"
    )
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="the packed file")
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that pack (see `phi3c doctor`)")


def main(args: argparse.Namespace) -> int:
    """Pack the model and print where to and how large it is."""
    from phi3c import hub
    from phi3c.weights import pack

    with ProgressBar() as bar:
        path = hub.resolve(args.model, progress=bar)
        pack(path, args.out, overwrite=args.force, n_threads=args.threads, progress=bar)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:,.1f} MB")
    return 0
