"""memory.py: what the machine has, and what a control group leaves of it, on made-up /proc and /sys trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phi3c.memory import _cgroup_limits, peak_memory, total_memory

CGROUPS: dict[str, tuple[dict[str, str], list[int]]] = {
    "v2, also of the group around it": (
        {
            "proc/self/cgroup": "0::/user/app",
            "sys/fs/cgroup/user/app/memory.max": "max",
            "sys/fs/cgroup/user/memory.max": "2147483648",
        },
        [2147483648],
    ),
    "v2, inside a container": (
        {"proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "536870912"},
        [536870912],
    ),
    "v1, the host's path in a container": (
        {
            "proc/self/cgroup": "8:memory:/docker/0123\n4:cpu,cpuacct:/docker/0123",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "1073741824",
        },
        [1073741824],
    ),
    "v1, no limit": (
        {
            "proc/self/cgroup": "8:memory:/",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712",
        },
        [9223372036854771712],
    ),
    "none": ({}, []),
}


@pytest.mark.parametrize(("files", "limits"), CGROUPS.values(), ids=CGROUPS.keys())
def test_cgroup_limits(tmp_path: Path, files: dict[str, str], limits: list[int]) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert _cgroup_limits(tmp_path) == limits


def test_the_smaller_one_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phi3c.memory._cgroup_limits", lambda root: [])
    physical = total_memory()
    if physical is None:
        pytest.skip("this system does not tell how much memory it has")
    assert physical > 2**20
    monkeypatch.setattr("phi3c.memory._cgroup_limits", lambda root: [2**62, 2**20])
    assert total_memory() == 2**20


def test_peak_covers_what_was_touched() -> None:
    """Of 64 MB that were written once, the process had all in memory at once."""
    np.full(64 << 20, 1, np.uint8)
    peak = peak_memory()
    assert peak is not None
    assert peak > 64 << 20
