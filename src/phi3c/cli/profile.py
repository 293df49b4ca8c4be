"""The tables that PHI3C_PROFILE=1 asks for, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from phi3c.profile import Phase, Profile

T = TypeVar("T")


def print_profile(profile: Profile | None) -> None:
    """Print what was measured, if anything was."""
    if profile is None:
        return
    for name, phase in (("prefill", profile.prefill), ("decode", profile.decode)):
        if phase.steps:
            print(table(name, phase), file=sys.stderr)


def table(name: str, phase: Phase) -> str:
    """Milliseconds a step by operation, then by layer and operation."""
    per_step = 1000 / phase.steps
    lines = [
        "",
        f"{name}: steps {phase.steps}, tokens a step {phase.tokens / phase.steps:.1f}, "
        f"ms a step {phase.seconds * per_step:.3f}",
        f"  {'operation':16}{'calls':>8}{'ms a step':>12}{'share':>8}",
    ]
    for operation in _unique(operation for operation, _ in phase.operations):
        timings = [timing for (other, _), timing in phase.operations.items() if other == operation]
        calls, seconds = sum(t.calls for t in timings), sum(t.seconds for t in timings)
        lines.append(_row(operation, str(calls), seconds * per_step, seconds / phase.seconds))
    for rest, seconds in (("Python", phase.python_seconds), ("measuring", phase.measuring_seconds)):
        lines.append(_row(rest, "", seconds * per_step, seconds / phase.seconds))

    layers = _unique(layer for _, layer in phase.operations if layer is not None)
    columns = _unique(operation for operation, layer in phase.operations if layer is not None)
    lines += ["", f"  {'layer':>5}" + "".join(f"{name:>13}" for name in [*columns, "all"])]
    for layer in layers:
        row = [phase.operations.get((operation, layer)) for operation in columns]
        times = [timing.seconds * per_step if timing else 0.0 for timing in row]
        lines.append(f"  {layer:>5}" + "".join(f"{time:>13.3f}" for time in [*times, sum(times)]))
    return "\n".join(lines)


def _row(name: str, calls: str, milliseconds: float, share: float) -> str:
    return f"  {name:16}{calls:>8}{milliseconds:>12.3f}{share:>8.1%}"


def _unique(items: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(items))
