"""bench.py and `phi3c bench`: names, figures by hand, what is computed and reused, output. No times."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from models import write_tiny_phi3

from phi3c import _kernels, cli
from phi3c.bench import Benchmark, Result, Workload, bytes_read, operations
from phi3c.cli import plot
from phi3c.cli.bench import workloads_of
from phi3c.errors import ContextLengthError, InvalidParameterError

# write_tiny_phi3: 2 layers, width 128, 4 heads and 2 kv heads of 32, ffn 256, vocabulary of 320
QKV, OUT, UP, DOWN = 256 * 128, 128 * 128, 512 * 128, 128 * 256
OUTPUT = 320 * 128
WEIGHTS = 2 * (QKV + OUT + UP + DOWN) + OUTPUT
KV_BYTES = 2 * 2 * 2 * 32 * 2  # of a position: layers, keys and values, kv heads, head_dim, f16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_phi3(tmp_path_factory.mktemp("bench") / "tiny.gguf")


@pytest.fixture
def profiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PHI3C_PROFILE", "1")


# --- names and options ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("workload", "name", "n_tokens", "n_positions"),
    [
        (Workload(n_prompt=512), "pp512", 512, 512),
        (Workload(n_gen=128), "tg128", 128, 128),
        (Workload(n_prompt=512, n_gen=128), "pp512+tg128", 640, 640),
        (Workload(n_gen=128, n_depth=1024), "tg128 @ d1024", 128, 1152),
        (Workload(n_gen=128, n_parallel=4), "tg128 npl4", 512, 128),
        (Workload(n_gen=16, n_depth=8, n_parallel=2), "tg16 npl2 @ d8", 32, 24),
    ],
)
def test_rows_are_named_as_llama_bench_names_them(
    workload: Workload, name: str, n_tokens: int, n_positions: int
) -> None:
    assert (str(workload), workload.n_tokens, workload.n_positions) == (name, n_tokens, n_positions)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("", ["pp512", "tg128"]),
        ("-p 16,32 -n 0", ["pp16", "pp32"]),
        ("-p 16 -p 32 -n 8", ["pp16", "pp32", "tg8"]),
        ("-p 0 -n 0 -pg 64,8 -pg 4,2", ["pp64+tg8", "pp4+tg2"]),
        ("-p 0 -n 8,4 -npl 1,2", ["tg8", "tg8 npl2", "tg4", "tg4 npl2"]),
        ("-p 4 -n 2 -pg 3,1 -d 0,64", ["pp4", "tg2", "pp3+tg1", "pp4 @ d64", "tg2 @ d64", "pp3+tg1 @ d64"]),
        ("--n-prompt 1 --n-gen 2 --n-depth 3", ["pp1 @ d3", "tg2 @ d3"]),
    ],
)
def test_lists_of_options_combine(flags: str, names: list[str]) -> None:
    args = cli._parser().parse_args(["bench", "MODEL", *flags.split()])
    assert [str(workload) for workload in workloads_of(args)] == names
    assert (args.repetitions, args.output) == (5, "md")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("-p many", "'many' is no list of whole numbers"),
        ("-n 1,,2", "'1,,2' is no list of whole numbers"),
        ("-d -1", "-1: at least 0"),
        ("-t 0", "0: at least 1"),
        ("-r 0", "0: at least 1"),
        ("-r 1,2", "1,2: one number"),
        ("-pg 512", "512: two numbers"),
        ("-o xml", "invalid choice"),
        ("-p 0 -n 0", "nothing to measure"),
    ],
)
def test_options_that_make_no_sense(tiny: Path, capsys: Any, flags: str, message: str) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", str(tiny), *flags.split()])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


# --- figures ----------------------------------------------------------------------------------------------


def test_statistics_by_hand() -> None:
    result = Result(
        Workload(n_gen=8),
        n_threads=2,
        seconds=(1.0, 2.0, 4.0),
        unit="GB/s",
        work=16e9,
        limits=(20e9, 44e9, 36e9, 44e9),
    )
    assert result.samples == (8.0, 4.0, 2.0)
    assert result.tokens_per_second == pytest.approx(14 / 3)
    # squares of 10/3, 2/3, 8/3 over n - 1
    assert result.tokens_per_second_stddev == pytest.approx(((100 + 4 + 64) / 9 / 2) ** 0.5)
    assert result.rate == pytest.approx((16 + 8 + 4) / 3)
    assert result.limit == pytest.approx(40)
    # 16 / mean(20, 44), 8 / mean(44, 36), 4 / mean(36, 44)
    assert result.share == pytest.approx(sorted([0.5, 0.2, 0.1])[1])


def test_one_repetition_and_no_limit() -> None:
    result = Result(Workload(4, 4), n_threads=1, seconds=(2.0,), unit=None, work=0.0, limits=())
    assert (result.tokens_per_second, result.tokens_per_second_stddev) == (4.0, 0.0)
    assert (result.rate, result.limit, result.share) == (None, None, None)


@pytest.mark.parametrize(
    ("model", "workload", "weight_bytes", "seen"),
    [
        ({}, Workload(n_gen=4), 4 * WEIGHTS, 1 + 2 + 3 + 4),
        ({}, Workload(n_gen=4, n_depth=100), 4 * WEIGHTS, 101 + 102 + 103 + 104),
        ({"window": 102}, Workload(n_gen=4, n_depth=100), 4 * WEIGHTS, 101 + 3 * 102),
        ({"window": 7}, Workload(n_gen=2, n_depth=100), 4 * WEIGHTS, 7 + 7),
        ({}, Workload(n_gen=2, n_depth=10, n_parallel=3), 4 * WEIGHTS, 3 * (11 + 12)),
        ({"tied": True}, Workload(n_gen=1), 4 * WEIGHTS, 1),
        ({"types": "Q8_0"}, Workload(n_gen=1), WEIGHTS // 32 * 34, 1),
    ],
)
def test_bytes_read_by_hand(
    tmp_path: Path, model: dict[str, Any], workload: Workload, weight_bytes: int, seen: int
) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", **model)
    with Benchmark(path, [workload], [1]) as benchmark:
        assert bytes_read(benchmark.phi3, workload) == workload.n_gen * weight_bytes + seen * KV_BYTES


def test_operations_by_hand(tiny: Path) -> None:
    with Benchmark(tiny, [Workload(n_prompt=10)], [1]) as benchmark:
        every_token = QKV + OUT + UP + DOWN + QKV
        last_token = OUT + UP + DOWN + OUTPUT
        assert operations(benchmark.phi3, 10) == 2 * (10 * every_token + last_token)


@pytest.mark.parametrize("n_prompt", [1, 10, 600])  # 600: two chunks
def test_operations_are_those_of_the_forward_pass(tmp_path: Path, n_prompt: int) -> None:
    multiply_adds = 0

    class Counting(ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(_kernels, name)

        def matmul(self, out: Any, weights: Any, x: Any, n: int, *rest: Any) -> None:
            self.count(weights, n)
            _kernels.matmul(out, weights, x, n, *rest)

        def gate_up(self, out: Any, weights: Any, x: Any, n: int, *rest: Any) -> None:
            self.count(weights, n)
            _kernels.gate_up(out, weights, x, n, *rest)

        def count(self, weights: Any, n: int) -> None:
            nonlocal multiply_adds
            multiply_adds += n * weights.rows * weights.columns

    workload = Workload(n_prompt=n_prompt)
    path = write_tiny_phi3(tmp_path / "tiny.gguf", ctx=1024)
    with Benchmark(path, [workload], [1]) as benchmark:
        benchmark.phi3._operations = Counting("counting")
        benchmark._time(workload)
        assert operations(benchmark.phi3, n_prompt) == 2 * multiply_adds


# --- what is computed -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("profiled")
@pytest.mark.parametrize("window", [None, 70])
def test_depth_is_computed_once(tmp_path: Path, window: int | None) -> None:
    path = write_tiny_phi3(tmp_path / "tiny.gguf", window=window)
    workload = Workload(n_gen=3, n_depth=130)
    with Benchmark(path, [workload], [1, 2]) as benchmark:
        result = benchmark.run(workload, 1, repetitions=2)
        assert benchmark.profile
        assert benchmark.profile.decode.tokens == 3 * 3  # one run is not counted
        # two pages are reused, and 130 = 2 * 64 + 2
        assert benchmark.profile.prefill.tokens == 130 + 3 * 2
        assert len(result.seconds) == 2
        benchmark.run(workload, 2, repetitions=1)  # nor again for another number of threads
        assert benchmark.profile.prefill.tokens == 130 + 3 * 2 + 3 * 2


@pytest.mark.usefixtures("profiled")
def test_what_is_timed_is_never_found_in_the_cache(tiny: Path) -> None:
    workloads = [Workload(n_prompt=130), Workload(n_prompt=130, n_depth=64), Workload(n_prompt=130)]
    with Benchmark(tiny, workloads, [1]) as benchmark:
        assert benchmark.profile
        for workload, computed in zip(workloads, (2 * 130, 2 * 130, 2 * 130), strict=True):
            before = benchmark.profile.prefill.tokens
            benchmark.run(workload, 1, repetitions=1)
            assert benchmark.profile.prefill.tokens - before == computed


@pytest.mark.usefixtures("profiled")
def test_parallel_sequences_share_steps_but_no_pages(tiny: Path) -> None:
    workload = Workload(n_gen=2, n_depth=64, n_parallel=3)
    with Benchmark(tiny, [workload], [1]) as benchmark:
        benchmark.run(workload, 1, repetitions=1)
        assert benchmark.profile
        assert (benchmark.profile.decode.steps, benchmark.profile.decode.tokens) == (2 * 2, 2 * 2 * 3)
        sequences = [benchmark._at_depth(i, workload) for i in range(3)]
        assert len({page for sequence in sequences for page in sequence.pages}) == 3


def test_units_limits_and_progress(tiny: Path) -> None:
    reports: list[tuple[str, int, int]] = []
    workloads = [Workload(n_prompt=4), Workload(n_gen=2), Workload(n_prompt=4, n_gen=2)]
    with Benchmark(tiny, workloads, [2]) as benchmark:
        results = [
            benchmark.run(workload, 2, 2, lambda *report: reports.append(report)) for workload in workloads
        ]
    assert [result.unit for result in results] == ["GOP/s", "GB/s", None]
    assert [len(result.seconds) for result in results] == [2, 2, 2]
    n_peaks = 0 if _kernels.isa() == "scalar" else 3
    assert [len(result.limits) for result in results] == [n_peaks, 3, 0]
    assert all(limit > 0 for result in results for limit in result.limits)
    assert [report for report in reports if report[0].startswith("pp4,")] == [
        ("pp4, 2 threads", 0, 12),
        ("pp4, 2 threads", 4, 12),
        ("pp4, 2 threads", 8, 12),
        ("pp4, 2 threads", 1, 1),
    ]


def test_scalar_has_no_multiply_limit(tiny: Path) -> None:
    before = _kernels.isa()
    _kernels.use_isa("scalar")
    try:
        with Benchmark(tiny, [Workload(n_prompt=2)], [1]) as benchmark:
            result = benchmark.run(Workload(n_prompt=2), 1, 1)
    finally:
        _kernels.use_isa(before)
    assert result.rate is not None
    assert (result.limit, result.share) == (None, None)


def test_what_does_not_fit_is_refused_before_it_is_loaded(tiny: Path, capsys: Any) -> None:
    with pytest.raises(ContextLengthError, match="tg128 @ d500 makes sequences of 628 tokens"):
        Benchmark(tiny, [Workload(n_gen=1), Workload(n_gen=128, n_depth=500)], [1])
    with pytest.raises(InvalidParameterError, match="513 sequences"):
        Benchmark(tiny, [Workload(n_gen=1, n_parallel=513)], [1])
    assert cli.main(["bench", str(tiny), "-d", "500"]) == 4
    assert cli.main(["bench", str(tiny.with_name("absent.gguf"))]) == 3


# --- output -----------------------------------------------------------------------------------------------

SMALL = ["-p", "4", "-n", "2", "-pg", "4,2", "-npl", "1,2", "-d", "0,3", "-t", "1,2", "-r", "2"]
NAMES = ["pp4", "tg2", "tg2 npl2", "pp4+tg2"]
TESTS = 2 * [name + depth for depth in ("", " @ d3") for name in NAMES]
FACTS = ["phi3c", "model_filename", "model_name", "weight_bytes", "isa", "cpu_features"]
FIELDS = ["test", "n_prompt", "n_gen", "n_depth", "n_parallel", "n_threads"]
FIELDS += ["tokens_per_second", "tokens_per_second_stddev", "unit", "rate", "limit", "share"]


def bench(capsys: Any, *argv: object) -> str:
    assert cli.main(["bench", *map(str, argv)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return str(out)


def test_json(tiny: Path, capsys: Any) -> None:
    import phi3c

    rows = json.loads(bench(capsys, tiny, *SMALL, "-o", "json"))
    assert [row["test"] for row in rows] == TESTS
    assert [row["n_threads"] for row in rows] == [1] * 8 + [2] * 8
    for row in rows:
        assert list(row) == [*FACTS, *FIELDS, "samples"]
        assert row["phi3c"] == phi3c.__version__
        assert row["model_filename"] == str(tiny)
        assert row["weight_bytes"] == 4 * WEIGHTS
        assert row["isa"] == _kernels.isa()
        assert row["cpu_features"] == _kernels.cpu_features()
        assert len(row["samples"]) == 2
        assert row["tokens_per_second"] == pytest.approx(np.mean(row["samples"]))
        assert row["tokens_per_second_stddev"] == pytest.approx(np.std(row["samples"], ddof=1))
        assert row["unit"] == (None if "+" in row["test"] else "GOP/s" if row["n_prompt"] else "GB/s")


def test_jsonl_and_csv_have_the_same_rows(tiny: Path, capsys: Any) -> None:
    rows = [json.loads(line) for line in bench(capsys, tiny, *SMALL, "-o", "jsonl").splitlines()]
    assert [row["test"] for row in rows] == TESTS
    assert list(rows[0]) == [*FACTS, *FIELDS, "samples"]
    table = list(csv.DictReader(io.StringIO(bench(capsys, tiny, *SMALL, "-o", "csv"))))
    assert [row["test"] for row in table] == TESTS
    assert list(table[0]) == FACTS + FIELDS
    assert float(table[0]["tokens_per_second"]) > 0


def test_markdown(tiny: Path, capsys: Any) -> None:
    facts, model, blank, *table = bench(capsys, tiny, *SMALL).splitlines()
    for known in ("phi3c ", _kernels.isa(), _kernels.cpu_features()):
        assert known in facts
    assert model.startswith(f"{tiny}: tiny random phi3, {4 * WEIGHTS / 1e6:.1f} MB")
    assert blank == ""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert cells[0] == ["test", "threads", "tok/s", "rate", "limit", "share"]
    assert [set(cell) <= {"-", ":"} for cell in cells[1]] == [True] * 6
    assert [row[0] for row in cells[2:]] == TESTS
    for line in table[1:]:  # every cell is as wide as its column's title, if what is in it fits
        for title, cell in zip(table[0].split("|"), line.split("|"), strict=True):
            assert len(cell) == max(len(title), len(cell.strip()) + 2) or not cell
    for row in cells[2:]:
        assert " ± " in row[2]
        assert [bool(cell) for cell in row[3:]] == [("+" not in row[0])] * 3 or _kernels.isa() == "scalar"


def test_a_pipe_gets_the_table_and_nothing_else(tiny: Path) -> None:
    command = [sys.executable, "-m", "phi3c", "bench", str(tiny), "-p", "4", "-n", "0", "-r", "1"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", check=True)
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 6
    assert "\r" not in done.stdout


# --- picture ----------------------------------------------------------------------------------------------


def results() -> Iterator[Result]:
    for n_threads in (2, 1):
        for depth in (64, 0):
            for workload in (Workload(n_prompt=8, n_depth=depth), Workload(n_gen=8, n_depth=depth)):
                seconds = (1.0 / n_threads, 2.0 / n_threads)
                yield Result(workload, n_threads, seconds, None, 0.0, ())


def test_the_picture_shows_the_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = plot.draw(list(results()), "title", "subtitle")
    assert [axes.get_title() for axes in figure.axes] == ["pp8", "tg8"]
    for axes in figure.axes:
        lines, labels = axes.get_legend_handles_labels()
        assert labels == ["1 thread", "2 threads"]
        for n_threads, container in zip((1, 2), lines, strict=True):
            line, _, (bars,) = container
            assert list(line.get_xdata()) == [0, 64]
            assert list(line.get_ydata()) == pytest.approx([6 * n_threads] * 2)  # mean of 8 and 4
            low, high = bars.get_segments()[0][:, 1]
            assert (high - low) / 2 == pytest.approx(8**0.5 * n_threads)  # of 8 and 4, n - 1
    plot.save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_plot_option(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "speed.png"
    bench(capsys, tiny, "-p", "4", "-n", "0", "-r", "1", "-d", "0,8", "--plot", picture)
    assert picture.read_bytes().startswith(b"\x89PNG\r\n")
    with pytest.raises(SystemExit):
        cli.main(["bench", str(tiny), "--plot", str(tmp_path / "absent" / "speed.png")])
    assert "no such folder" in capsys.readouterr().err


def test_without_matplotlib_the_error_says_how_to_get_it(
    tiny: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert cli.main(["bench", str(tiny), "--plot", str(tmp_path / "speed.png")]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "pip install 'phi3c[plot]'" in err
