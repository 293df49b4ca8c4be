"""phi3c perplexity: how likely a model finds a text, and how far it lies from another."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from phi3c.cli.profile import print_profile
from phi3c.cli.progress import ProgressBar
from phi3c.cli.text import read_text

if TYPE_CHECKING:
    from phi3c.divergence import Divergence
    from phi3c.model import Model
    from phi3c.perplexity import Estimate, Perplexity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; chunks are llama-perplexity's."""
    parser.add_argument(
        "model", metavar="MODEL", help="a path, owner/repo[:QUANT or /file], an alias or 'demo'"
    )
    parser.add_argument(
        "-f", "--file", metavar="FILE", type=Path, help="the text; without it, standard input"
    )
    parser.add_argument("--ctx", type=int, default=512, metavar="N", help="tokens of a chunk (default: 512)")
    parser.add_argument(
        "--stride",
        type=int,
        default=0,
        metavar="N",
        help="let chunks overlap, each N tokens after the one before, and score every token once; 0: chunks "
        "side by side, of which the second half is scored (default: 0)",
    )
    parser.add_argument("--chunks", type=int, metavar="N", help="look at no more than so many chunks")
    parser.add_argument(
        "--save-logits", type=Path, metavar="FILE", help="keep all log-probabilities for --kl-base"
    )
    parser.add_argument(
        "--kl-base",
        type=Path,
        metavar="FILE",
        help="compare with the model whose log-probabilities are in FILE, on the text that is in it: written "
        "by --save-logits, or by llama-perplexity",
    )
    parser.add_argument(
        "--kv-type", choices=("f16", "q8_0"), default="f16", help="how keys and values are kept"
    )
    parser.add_argument("--threads", type=int, metavar="N", help="compute threads (see `phi3c doctor`)")
    parser.add_argument("-o", "--output", choices=("text", "json"), default="text", help="(default: text)")


def main(args: argparse.Namespace) -> int:
    """Print the figures when all is read; the running one is in the progress bar."""
    from phi3c import hub
    from phi3c.logits_file import LogitsFile
    from phi3c.model import Model

    if args.kl_base and (args.file or args.save_logits or args.stride):
        args.usage_error("--kl-base FILE holds text and chunks: no -f, --stride or --save-logits with it")
    if not args.kl_base and not args.file and sys.stdin.isatty():
        args.usage_error("give -f FILE, or pipe text in")
    n_ctx = LogitsFile(args.kl_base).n_ctx if args.kl_base else args.ctx
    text = "" if args.kl_base else read_text(args)
    with ProgressBar() as bar, ProgressBar(patience=0) as running:

        def progress(done: int, total: int, perplexity: float | None) -> None:
            running("perplexity", done, total, "" if perplexity is None else f", {perplexity:.4f} so far")

        path = hub.resolve(args.model, progress=bar)
        with Model(path, n_ctx=n_ctx, n_threads=args.threads, kv_type=args.kv_type, progress=bar) as model:
            started = perf_counter()
            result: Perplexity | Divergence
            if args.kl_base:
                result = model.divergence(args.kl_base, n_chunks=args.chunks, progress=progress)
            else:
                result = model.perplexity(
                    text,
                    n_ctx=n_ctx,
                    stride=args.stride,
                    n_chunks=args.chunks,
                    save_logits=args.save_logits,
                    progress=progress,
                )
            seconds = perf_counter() - started
    if args.output == "json":
        print(json.dumps({**_facts(model), "kv_type": args.kv_type, **_values(result), "seconds": seconds}))
    else:
        print("\n".join(_lines(result)))
    print_profile(model.profile)
    return 0


def _facts(model: Model) -> dict[str, object]:
    import phi3c

    info = model.info
    return {
        "phi3c": phi3c.__version__,
        "model_filename": str(info.path),
        "model_name": info.name,
        "weight_bytes": info.weight_bytes,
        "isa": info.isa,
        "n_threads": info.n_threads,
    }


def _values(result: Perplexity | Divergence) -> dict[str, object]:
    """The fields; an estimate x as x and x_error."""
    values: dict[str, object] = {}
    for name, value in asdict(result).items():
        if isinstance(value, tuple):
            values[name], values[f"{name}_error"] = value
        else:
            values[name] = value
    return values


def _lines(result: Perplexity | Divergence) -> list[str]:
    from phi3c.divergence import Divergence

    scored = f"{result.n_tokens} tokens scored in {result.n_chunks} chunks of {result.n_ctx}"
    if not isinstance(result, Divergence):
        stride = f", stride {result.stride}" if result.stride else ""
        value, error = result.perplexity
        return [f"perplexity {value:.4f} ± {error:.4f}: {scored}{stride}"]
    lines = [
        scored,
        "",
        f"{'PPL(Q)':26}{_estimate(result.perplexity)}",
        f"{'PPL(base)':26}{_estimate(result.base_perplexity)}",
        f"{'PPL(Q) / PPL(base)':26}{_estimate(result.ratio)}",
        f"{'ln(PPL(Q) / PPL(base))':26}{_estimate(result.log_ratio)}",
        f"{'PPL(Q) - PPL(base)':26}{_estimate(result.difference)}",
        f"{'correlation of ln p':26}{100 * result.correlation:10.3f} %",
        f"{'same top token':26}{_percent(result.same_top)}",
        "",
        f"{'':26}{'   KL(base || Q), nats':24}{'p(Q) - p(base)'}",
        f"{'mean':26}{_estimate(result.kl):24}{_percent(result.delta_p)}",
        f"{'root mean square':50}{_percent(result.delta_p_rms)}",
    ]
    for name, kl in result.kl_quantiles.items():
        lines.append(f"{name:26}{kl:12.6f}{'':12}{100 * result.delta_p_quantiles[name]:10.3f} %")
    return lines


def _estimate(estimate: Estimate) -> str:
    return f"{estimate.value:12.6f} ± {estimate.error:.6f}"


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:10.3f} ± {100 * estimate.error:.3f} %"
