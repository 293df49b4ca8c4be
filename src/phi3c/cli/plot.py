"""Speed against depth, as a picture: needs the extra `plot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from phi3c.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from phi3c.bench import Result


def require_matplotlib() -> None:
    """Raise MissingDependencyError where it is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        raise MissingDependencyError(
            "--plot draws with matplotlib, which is not installed: pip install 'phi3c[plot]'"
        ) from None


def draw(results: Sequence[Result], title: str, subtitle: str) -> Figure:
    """A panel for each test; in it tok/s against depth, a line for each number of threads.

    Args:
        results: in any order. Points are means, bars reach one standard deviation up and down.
        title, subtitle: what was measured, and where.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    tests = list(dict.fromkeys(_test(result) for result in results))
    threads = sorted({result.n_threads for result in results})
    depths = sorted({result.workload.n_depth for result in results})
    columns = min(len(tests), 3)
    rows = -(-len(tests) // columns)
    figure = Figure(figsize=(2 + 3.8 * columns, 1.3 + 3.2 * rows), layout="constrained")
    figure.suptitle(f"{title}\n{subtitle}", fontsize=11)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).flat
    for panel, test in zip(panels, tests, strict=False):
        for i, n_threads in enumerate(threads):
            points = sorted(
                (result.workload.n_depth, result.tokens_per_second, result.tokens_per_second_stddev)
                for result in results
                if result.n_threads == n_threads and _test(result) == test
            )
            panel.errorbar(
                *zip(*points, strict=True),
                label=f"{n_threads} thread" if n_threads == 1 else f"{n_threads} threads",
                # dark to light: thread counts have an order
                color=colormaps["viridis"](0.75 * i / max(1, len(threads) - 1)),
                marker="o",
                markersize=4,
                linewidth=1.6,
                elinewidth=1,
                capsize=3,
            )
        panel.set_title(test, fontsize=11)
        panel.set_ylim(bottom=0)
        if len(depths) < 6:
            panel.set_xticks(depths)
        else:
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    for panel in list(panels)[len(tests) :]:
        panel.set_visible(False)
    figure.supxlabel("depth: tokens in the cache before the clock starts", fontsize=10)
    figure.supylabel("tokens per second", fontsize=10)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG."""
    figure.savefig(path, format="png", dpi=150)


def _test(result: Result) -> str:
    return str(replace(result.workload, n_depth=0))
