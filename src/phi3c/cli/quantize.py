"""phi3c quantize: write a model with fewer bits a weight, or convert a checkpoint to GGUF."""

from __future__ import annotations

import argparse
from pathlib import Path

from phi3c.cli.progress import ProgressBar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="F32, F16 or BF16: a path, owner/repo/file, an alias, or the folder of a safetensors checkpoint",
    )
    parser.add_argument("out", metavar="OUT.gguf", type=Path, help="the new file")
    parser.add_argument("type", metavar="TYPE", help="Q4_K_M, Q8_0, F16 or another of llama-quantize's names")
    parser.add_argument(
        "--allow-requantize", action="store_true", help="take a model that is quantised already"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.gguf if it exists")
    parser.add_argument("--threads", type=int, metavar="N", help="threads that quantise (see `phi3c doctor`)")


def main(args: argparse.Namespace) -> int:
    """Quantise the model and print where to, how large it is, and how many bits a weight takes."""
    from phi3c import hub
    from phi3c.checkpoint import is_checkpoint
    from phi3c.gguf import GGUFFile
    from phi3c.quantizer import mix_named, quantize

    mix_named(args.type)  # before anything is downloaded
    with ProgressBar() as bar:
        path = args.model if is_checkpoint(args.model) else hub.resolve(args.model, progress=bar)
        quantize(
            path,
            args.out,
            args.type,
            allow_requantize=args.allow_requantize,
            overwrite=args.force,
            n_threads=args.threads,
            progress=bar,
        )
    with GGUFFile(args.out) as file:
        tensors = file.tensors.values()
        bits = 8 * sum(t.n_bytes for t in tensors) / sum(t.rows * t.columns for t in tensors)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:,.1f} MB, {bits:.2f} bits per weight")
    return 0
