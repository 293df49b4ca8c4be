"""Print what a model computes on this machine: text, and a hash of all logits. The same everywhere.

python tests/fingerprint.py MODEL
"""

from __future__ import annotations

import hashlib
import sys

import phi3c


def main() -> None:
    with phi3c.Model(sys.argv[1], n_ctx=256, n_threads=2) as model:
        print(f"{phi3c.cpu_info().isa}: {' '.join(phi3c.cpu_info().features)}", file=sys.stderr)
        ids = model.tokenize("The sea is blue because water absorbs the red part of the light.")
        logits = model.logits(ids)
        print(f"logits of {len(ids)} tokens: {hashlib.sha256(logits.tobytes()).hexdigest()}")
        print(f"greedy: {model.generate(ids, max_tokens=12, temperature=0).text!r}")
        answer = model.chat([{"role": "user", "content": "Name the four seasons."}], max_tokens=24, seed=1)
        print(f"drawn: {answer.text!r}")


if __name__ == "__main__":
    main()
