"""phi3c bench: measure speed, and what share of the machine's limit it is."""

from __future__ import annotations

import argparse
import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from phi3c.bench import Benchmark, Result, Workload

COLUMNS = {"test": 24, "threads": 7, "tok/s": 21, "rate": 12, "limit": 12, "share": 6}  # of the table: width


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags; names, defaults and lists are those of llama-bench and llama-batched-bench."""
    parser.add_argument(
        "model", metavar="MODEL", help="a path, owner/repo[:QUANT or /file], an alias or 'demo'"
    )

    def numbers(*flags: str, least: int, default: str, text: str) -> None:
        parser.add_argument(
            *flags,
            type=lambda value: _numbers(value, least),
            action="extend",
            metavar="N,N,...",
            help=f"{text} (default: {default})",
        )

    numbers("-p", "--n-prompt", least=0, default="512", text="prompts of so many tokens; 0: none")
    numbers("-n", "--n-gen", least=0, default="128", text="so many tokens one by one; 0: none")
    parser.add_argument(
        "-pg",
        type=_pair,
        action="append",
        default=[],
        metavar="P,N",
        help="a prompt of P tokens, then N one by one, timed as one; may be given repeatedly",
    )
    numbers("-npl", least=1, default="1", text="how many sequences generate together")
    numbers("-d", "--n-depth", least=0, default="0", text="tokens in the cache before the clock starts")
    numbers("-t", "--threads", least=1, default="see `phi3c doctor`", text="compute threads")
    parser.add_argument(
        "-r", "--repetitions", type=_positive, default=5, metavar="N", help="timed runs of each (default: 5)"
    )
    parser.add_argument(
        "-o", "--output", choices=("md", "csv", "json", "jsonl"), default="md", help="format (default: md)"
    )
    parser.add_argument(
        "--plot", metavar="FILE.png", type=Path, help="draw tok/s against depth (pip install 'phi3c[plot]')"
    )


def main(args: argparse.Namespace) -> int:
    """Measure row by row; a row is printed when it is there, but JSON at the end."""
    from phi3c import hub
    from phi3c.bench import Benchmark
    from phi3c.cli import plot
    from phi3c.cli.profile import print_profile
    from phi3c.cli.progress import ProgressBar
    from phi3c.threads import default_threads

    workloads = workloads_of(args)
    if not workloads:
        args.usage_error("nothing to measure: -p 0 and -n 0 without -pg")
    if args.plot:  # better now than after an hour
        plot.require_matplotlib()
        if not args.plot.parent.is_dir():
            args.usage_error(f"--plot {args.plot}: there is no such folder")
    threads = [default_threads(n).count for n in args.threads or [None]]
    write, end = _writer(args.output)
    results: list[Result] = []
    with ProgressBar() as bar:
        path = hub.resolve(args.model, progress=bar)
        with Benchmark(path, workloads, threads, progress=bar) as benchmark, ProgressBar(patience=0) as rows:
            facts = describe(benchmark, path)
            for n_threads in threads:
                for workload in workloads:
                    results.append(benchmark.run(workload, n_threads, args.repetitions, rows))
                    write(facts, results)
    end(facts, results)
    if args.plot:
        title = f"{facts['model_name']} ({path.name})"
        figure = plot.draw(results, title, f"phi3c {facts['phi3c']}, {facts['isa']}")
        try:
            plot.save(figure, args.plot)
        except OSError as error:
            args.usage_error(f"--plot {args.plot}: {error.strerror}")
    print_profile(benchmark.profile)
    return 0


def workloads_of(args: argparse.Namespace) -> list[Workload]:
    """All combinations that were asked for, in the order of their rows."""
    from phi3c.bench import Workload

    prompts = [512] if args.n_prompt is None else args.n_prompt
    gens = [128] if args.n_gen is None else args.n_gen
    workloads = []
    for depth in args.n_depth or [0]:
        workloads += [Workload(n_prompt=n, n_depth=depth) for n in prompts if n]
        workloads += [
            Workload(n_gen=n, n_depth=depth, n_parallel=n_parallel)
            for n in gens
            if n
            for n_parallel in args.npl or [1]
        ]
        workloads += [Workload(n_prompt=p, n_gen=n, n_depth=depth) for p, n in args.pg]
    return workloads


def describe(benchmark: Benchmark, path: Path) -> dict[str, object]:
    """What all rows have in common, as plain JSON values."""
    import phi3c
    from phi3c.cpu import cpu_info

    cpu = cpu_info()
    return {
        "phi3c": phi3c.__version__,
        "model_filename": str(path),
        "model_name": benchmark.config.name,
        "weight_bytes": benchmark.phi3.weight_bytes,
        "isa": cpu.isa,
        "cpu_features": " ".join(cpu.features),
    }


def as_row(result: Result) -> dict[str, object]:
    """A row as plain JSON values; rate and limit are in `unit`."""
    workload = result.workload
    return {
        "test": str(workload),
        "n_prompt": workload.n_prompt,
        "n_gen": workload.n_gen,
        "n_depth": workload.n_depth,
        "n_parallel": workload.n_parallel,
        "n_threads": result.n_threads,
        "tokens_per_second": result.tokens_per_second,
        "tokens_per_second_stddev": result.tokens_per_second_stddev,
        "unit": result.unit,
        "rate": result.rate,
        "limit": result.limit,
        "share": result.share,
    }


def _as_object(facts: Mapping[str, object], result: Result) -> dict[str, object]:
    return {**facts, **as_row(result), "samples": list(result.samples)}


Writer = Callable[[Mapping[str, object], list["Result"]], None]


def _writer(output: str) -> tuple[Writer, Writer]:
    """What is printed after each row, given all results so far, and at the end."""

    def nothing(facts: Mapping[str, object], results: list[Result]) -> None: ...

    def json_(facts: Mapping[str, object], results: list[Result]) -> None:
        print(json.dumps([_as_object(facts, result) for result in results], indent=2))

    def jsonl(facts: Mapping[str, object], results: list[Result]) -> None:
        print(json.dumps(_as_object(facts, results[-1])), flush=True)

    def csv_(facts: Mapping[str, object], results: list[Result]) -> None:
        row = {**facts, **as_row(results[-1])}
        text = io.StringIO()
        writer = csv.DictWriter(text, row, lineterminator="\n")
        if len(results) == 1:
            writer.writeheader()
        writer.writerow(row)
        print(text.getvalue(), end="", flush=True)

    def md(facts: Mapping[str, object], results: list[Result]) -> None:
        if len(results) == 1:
            print(_head(facts))
        print(_line(_cells(results[-1])), flush=True)

    return {"md": (md, nothing), "csv": (csv_, nothing), "json": (nothing, json_), "jsonl": (jsonl, nothing)}[
        output
    ]


def _head(facts: Mapping[str, object]) -> str:
    weights = facts["weight_bytes"]
    assert isinstance(weights, int)
    rules = [("-" * (width - 1) + ":") if name != "test" else "-" * width for name, width in COLUMNS.items()]
    return "\n".join(
        [
            f"phi3c {facts['phi3c']}, {facts['isa']} (CPU: {facts['cpu_features']})",
            f"{facts['model_filename']}: {facts['model_name']}, {weights / 1e6:,.1f} MB of packed weights",
            "",
            _line(list(COLUMNS)),
            _line(rules),
        ]
    )


def _cells(result: Result) -> list[str]:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.1f} {result.unit}"

    return [
        str(result.workload),
        str(result.n_threads),
        f"{result.tokens_per_second:.2f} ± {result.tokens_per_second_stddev:.2f}",
        number(result.rate),
        number(result.limit),
        "" if result.share is None else f"{result.share:.0%}",
    ]


def _line(cells: list[str]) -> str:
    test, *others = zip(cells, COLUMNS.values(), strict=True)
    return " | ".join([f"| {test[0]:<{test[1]}}", *(f"{cell:>{width}}" for cell, width in others)]) + " |"


def _numbers(text: str, least: int) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no list of whole numbers, such as 128 or 128,512"
        ) from None
    if min(numbers) < least:
        raise argparse.ArgumentTypeError(f"{text}: at least {least}")
    return numbers


def _positive(text: str) -> int:
    numbers = _numbers(text, 1)
    if len(numbers) != 1:
        raise argparse.ArgumentTypeError(f"{text}: one number")
    return numbers[0]


def _pair(text: str) -> tuple[int, int]:
    numbers = _numbers(text, 1)
    if len(numbers) != 2:
        raise argparse.ArgumentTypeError(f"{text}: two numbers, such as 512,128")
    return numbers[0], numbers[1]
