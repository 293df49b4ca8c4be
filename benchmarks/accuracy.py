"""Accuracy of phi3c on a model and a text, against the float32 forward pass on the same weights.

usage: python benchmarks/accuracy.py MODEL.gguf --text FILE [--ctx 512] [--kv-type f16]

Prints one row of a Markdown table; the table's head goes to stderr. The text is cut into chunks of `ctx`
tokens, and the tokens from the middle of a chunk to its end are scored. Memory: four bytes a weight.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from oracle import Oracle, compare

import phi3c

HEAD = """\
| model | scored | perplexity float32 | perplexity phi3c | mean KL | same top token | max dlogprob |
|---|---|---|---|---|---|---|"""


def main() -> None:
    parser = argparse.ArgumentParser(description="phi3c against the float32 oracle on the same weights")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="UTF-8 text to score")
    parser.add_argument("--ctx", type=int, default=512, metavar="TOKENS", help="tokens per chunk")
    parser.add_argument("--kv-type", default="f16", help="how keys and values are kept: f16 or q8_0")
    args = parser.parse_args()

    oracle = Oracle(args.model)
    with phi3c.Model(args.model, n_ctx=args.ctx, kv_type=args.kv_type) as model:
        ids = model.tokenize(args.text.read_text(encoding="utf-8"), add_bos=False)
        if len(ids) < args.ctx:
            parser.error(f"{args.text} has {len(ids)} tokens, fewer than one chunk of {args.ctx}")
        result = compare(oracle.logits, model.logits, ids, args.ctx)
    print(HEAD, file=sys.stderr)
    print(
        f"| {args.model.stem} | {result.n_scored} | {result.oracle_perplexity:.4f} | {result.perplexity:.4f} "
        f"| {result.mean_kl:.4f} | {result.same_top:.1%} | {result.max_delta:.3f} |"
    )


if __name__ == "__main__":
    main()
