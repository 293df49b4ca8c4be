"""Resident memory of a loaded model, against its weights and the KV pages in use.

usage: python benchmarks/memory.py MODEL.gguf [--prompt 512] [--tokens 32]

Prints one row of a Markdown table per moment; the table's head goes to stderr. Linux only: it reads
/proc/self/status.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import phi3c

HEAD = """\
| moment | weights | KV pages | resident | resident over weights and pages |
|---|---|---|---|---|"""


def resident() -> int:
    """Bytes of this process in physical memory."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise LookupError("VmRSS")


def main() -> None:
    parser = argparse.ArgumentParser(description="resident memory of a loaded model")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--prompt", type=int, default=512, metavar="N", help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=32, metavar="N", help="tokens to generate")
    args = parser.parse_args()

    print(HEAD, file=sys.stderr)
    with phi3c.Model(args.model) as model:
        info = model.info

        def row(moment: str, positions: int) -> None:
            pages = -(-positions // 64) * 64 * info.kv_bytes_per_token
            now = resident()
            sizes = " | ".join(f"{n / 1e9:.3f} GB" for n in (info.weight_bytes, pages, now))
            print(f"| {moment} | {sizes} | {now / (info.weight_bytes + pages):.3f} |")

        row("loaded", 0)
        prompt = [i % 256 for i in range(args.prompt)]
        model.generate(prompt, max_tokens=args.tokens, temperature=0)
        row(f"after {args.prompt} + {args.tokens} tokens", args.prompt + args.tokens)


if __name__ == "__main__":
    main()
