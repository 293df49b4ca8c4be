"""Time to choose one token, by filter and by how flat the logits are.

usage: python benchmarks/sampling.py [--vocab 32064] [--repeats 301]

Prints a Markdown table: medians over normally distributed logits of the given standard deviation, the filters
by turns. One thread, no model.
"""

from __future__ import annotations

import argparse
from statistics import median
from time import perf_counter

import numpy as np

from phi3c.sampling import Sampler, SamplingOptions, SamplingParams

CHAINS: dict[str, SamplingOptions] = {
    "temperature 0": {"temperature": 0},
    "defaults": {},
    "top_k 40, top_p 0.95": {"top_k": 40, "top_p": 0.95, "min_p": 0},
    "top_k 0, top_p 0.95": {"top_k": 0, "top_p": 0.95, "min_p": 0},
    "top_k 0, top_p 1": {"top_k": 0, "top_p": 1, "min_p": 0},
}
SPREADS = 4.0, 1.0, 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description="time to choose one token")
    parser.add_argument("--vocab", type=int, default=32064, metavar="N", help="logits")
    parser.add_argument("--repeats", type=int, default=301, metavar="N", help="rows of logits")
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    samplers = {name: Sampler(SamplingParams(seed=0, **options), ()) for name, options in CHAINS.items()}
    seconds: dict[tuple[str, float], list[float]] = {}
    for _ in range(args.repeats):
        normal = rng.standard_normal(args.vocab, np.float32)
        for spread in SPREADS:
            logits = normal * np.float32(spread)
            for name, sampler in samplers.items():
                started = perf_counter()
                sampler.sample(logits)
                seconds.setdefault((name, spread), []).append(perf_counter() - started)

    print("| filters | " + " | ".join(f"spread {spread:g}" for spread in SPREADS) + " |")
    print("|---" * (1 + len(SPREADS)) + "|")
    for name in CHAINS:
        cells = (f"{1000 * median(seconds[name, spread]):.3f} ms" for spread in SPREADS)
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
