"""How long until the first token: model files against each other, from the page cache.

usage: python benchmarks/load.py MODEL.gguf PACKED.gguf ... [--rounds 9]

Each load is a process of its own, the files by turns; a round before the first brings them into the page
cache. Prints one row of a Markdown table per file, medians with ranges; the head goes to stderr. Linux
only: it reads /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

HEAD = """\
| file | process start to first token | load | first token after it | resident over weights |
|---|---|---|---|---|"""
CHILD = """
import json, sys
from time import perf_counter
sys.path.insert(0, sys.argv[2])
import phi3c
from memory import resident
started = perf_counter()
with phi3c.Model(sys.argv[1]) as model:
    loaded = perf_counter()
    model.generate("Hello", max_tokens=1, temperature=0)
    first = perf_counter()
    print(json.dumps([loaded - started, first - loaded, resident() / model.info.weight_bytes]), flush=True)
"""


def load(path: Path) -> tuple[float, ...]:
    """Seconds from process start to the first token, of loading and of the token; resident over weights."""
    started = perf_counter()
    command = [sys.executable, "-c", CHILD, str(path), str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        line = child.stdout.readline()
        seconds = perf_counter() - started
        if child.wait() or not line:
            raise SystemExit(f"loading {path} failed")
    return seconds, *json.loads(line)


def cell(values: list[float], unit: str) -> str:
    return f"{median(values):.2f}{unit} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="time to the first token")
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL.gguf")
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="loads of each file")
    args = parser.parse_args()

    rounds = [[load(path) for path in args.models] for _ in range(1 + args.rounds)][1:]
    print(HEAD, file=sys.stderr)
    for i, path in enumerate(args.models):
        columns = zip(*(files[i] for files in rounds), strict=True)
        cells = [
            cell(list(column), unit) for column, unit in zip(columns, (" s", " s", " s", ""), strict=True)
        ]
        print(f"| {path.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
