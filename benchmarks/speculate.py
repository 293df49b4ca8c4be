"""Speed with speculation against without, on an answer that copies from its prompt and on one that does not.

usage: python benchmarks/speculate.py MODEL.gguf [--speculate 17] [--repeats 15] [--threads N]

Both answers are computed with drafts and without by turns, and must be the same. Then, what a step with more
rows costs, in steps with one. Prints Markdown tables: medians of the ratios, and quartiles in brackets.

The copy is forced: the continuation takes the tokens of a passage of its prompt in place of those sampled, as
a model that copies well would. The other answer is the model's own, drawn at temperature 1.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from time import perf_counter

import numpy as np
from numpy.typing import NDArray

import phi3c
from phi3c.completion import Completion
from phi3c.phi3 import Step

PASSAGE = """\
The harbour lay quiet in the early morning. Two fishing boats, the Alma and the Grey Heron, rocked against
the pier while Tomas counted his nets. He had forty-one of them, nine more than last spring, and each one
had been mended by hand during the long winter. His daughter Ines came down the steps with a basket of bread
and a letter from the city.
"""
QUESTION = "Write a letter about a walk in the mountains."
ROWS = 1, 2, 3, 4, 6, 9, 12, 18


class Script:
    """Stands in for a sampler's choice: computes it, then gives the next token of a text."""

    def __init__(self, generation: object, ids: Iterable[int]) -> None:
        self._sample = generation.sampler.sample  # type: ignore[attr-defined]
        self._ids: Iterator[int] = iter(ids)
        generation.sampler.sample = self  # type: ignore[attr-defined]

    def __call__(self, logits: NDArray[np.float32]) -> int:
        self._sample(logits)
        return next(self._ids)


def copy(model: phi3c.Model, text: str) -> Completion:
    """A few tokens of an introduction, then the text as it stands in the prompt."""
    passage, before = model.tokenize(text), model.tokenize("Sure, here is the text that you wanted:\n\n")
    answer = [*before, *passage]
    prompt = [*model.tokenize("Repeat this text.\n\n"), *passage, *model.tokenize("\n\n")]
    stream = model.generate(prompt, max_tokens=len(answer), temperature=0, stream=True)
    Script(stream._generation, answer)
    return stream.result()


def copy_paragraph(model: phi3c.Model) -> Completion:
    return copy(model, PASSAGE)


def copy_page(model: phi3c.Model) -> Completion:
    return copy(model, Path(__file__).read_text(encoding="utf-8")[:1200])


def free(model: phi3c.Model) -> Completion:
    """What the model makes of a question, with a seed that does not matter."""
    return model.generate(QUESTION, max_tokens=128, temperature=1, seed=1)


def step_costs(model: phi3c.Model, repeats: int) -> dict[int, list[float]]:
    """Seconds of steps with so many rows, behind 256 tokens."""
    parts = model._engine._parts
    assert parts is not None
    phi3, cache = parts
    ids = [i % 200 for i in range(256)]
    sequence = cache.open(())
    phi3.forward([Step(sequence, ids)], cache)
    seconds: dict[int, list[float]] = {n: [] for n in ROWS}
    for _ in range(repeats):
        for n in ROWS:
            started = perf_counter()
            # n_drafts keeps all but the first out of the cache: the text grows by a token a step
            phi3.forward([Step(sequence, ids[:n], n_logits=n, n_drafts=n - 1)], cache)
            seconds[n].append(perf_counter() - started)
    cache.close(sequence)
    return seconds


def quartiles(ratios: Iterable[float]) -> str:
    low, middle, high = np.quantile(list(ratios), [0.25, 0.5, 0.75])
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="speed with speculation against without")
    parser.add_argument("model", type=Path, metavar="MODEL.gguf")
    parser.add_argument("--speculate", type=int, default=17, metavar="N", help="most drafts per step")
    parser.add_argument("--repeats", type=int, default=15, metavar="N")
    parser.add_argument("--threads", type=int, metavar="N")
    args = parser.parse_args()

    n_ctx, n_threads = 1024, args.threads
    with (
        phi3c.Model(args.model, n_ctx=n_ctx, n_threads=n_threads) as without,
        phi3c.Model(args.model, n_ctx=n_ctx, n_threads=n_threads, speculate=args.speculate) as with_drafts,
    ):
        print("| answer | tokens | drafted | accepted | speed with drafts over without |")
        print("|---|---|---|---|---|")
        for answer in (copy_paragraph, copy_page, free):
            ratios = []
            for i in range(args.repeats):
                models = (without, with_drafts) if i % 2 else (with_drafts, without)
                first, second = (answer(model) for model in models)
                a, b = (first, second) if i % 2 else (second, first)
                assert a.token_ids == b.token_ids
                ratios.append(a.timings.generation_ms / b.timings.generation_ms)
            tokens, timings = b.usage.completion_tokens, b.timings
            counts = f"{tokens} | {timings.draft_n} | {timings.draft_n_accepted}"
            print(f"| {answer.__name__} | {counts} | {quartiles(ratios)} |", flush=True)
        seconds = step_costs(without, args.repeats)
    print("\n| rows in a step | " + " | ".join(map(str, ROWS)) + " |")
    print("|---" * (1 + len(ROWS)) + "|")
    one = seconds[1]
    costs = (quartiles(b / a for a, b in zip(one, seconds[n], strict=True)) for n in ROWS)
    print("| time | " + " | ".join(costs) + " |")


if __name__ == "__main__":
    main()
