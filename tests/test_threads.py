"""threads.py: the default thread count, on described machines and on made-up /proc and /sys trees."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from phi3c.errors import InvalidParameterError
from phi3c.threads import LogicalCPU, Machine, ThreadCount, _linux_machine, default_threads, describe_machine

LAPTOP = Machine(tuple(LogicalCPU((0, i // 2)) for i in range(8)))  # 4 cores, 8 hyper-threads
# 2 performance cores with hyper-threads and 4 efficiency cores
HYBRID = Machine(
    (
        *(LogicalCPU((0, i // 2), 5_000_000) for i in range(4)),
        *(LogicalCPU((0, 10 + i), 3_800_000) for i in range(4)),
    )
)


@pytest.mark.parametrize(
    ("machine", "n", "why"),
    [
        (LAPTOP, 4, "4 threads = min(affinity 8, cgroup quota none, physical cores 4)"),
        (HYBRID, 2, "2 threads = min(affinity 8, cgroup quota none, performance cores 2)"),
        (Machine(LAPTOP.cpus, 2.5), 2, "2 threads = min(affinity 8, cgroup quota 2.5, physical cores 4)"),
        (Machine(LAPTOP.cpus, 0.5), 1, "1 thread = min(affinity 8, cgroup quota 0.5, physical cores 4)"),
        (Machine(LAPTOP.cpus, 16), 4, "4 threads = min(affinity 8, cgroup quota 16, physical cores 4)"),
        (Machine(LAPTOP.cpus[:1]), 1, "1 thread = min(affinity 1, cgroup quota none, physical cores 1)"),
        # pinned to the efficiency cores: they are the fastest there are
        (Machine(HYBRID.cpus[4:]), 4, "4 threads = min(affinity 4, cgroup quota none, physical cores 4)"),
    ],
)
def test_default(machine: Machine, n: int, why: str) -> None:
    assert default_threads(machine=machine, environ={}) == ThreadCount(n, why)


def test_cores_of_slightly_different_speed_all_count() -> None:
    machine = Machine(tuple(LogicalCPU((0, i), 5_000_000 - 50_000 * i) for i in range(8)))
    assert default_threads(machine=machine, environ={}).count == 8


def test_argument_then_variables_in_order() -> None:
    both = {"PHI3C_NUM_THREADS": "3", "OMP_NUM_THREADS": "5,2"}
    assert default_threads(7, LAPTOP, both) == ThreadCount(7, "7 threads, as the caller asked")
    assert default_threads(None, LAPTOP, both) == ThreadCount(3, "3 threads from PHI3C_NUM_THREADS")
    both["PHI3C_NUM_THREADS"] = ""
    assert default_threads(None, LAPTOP, both) == ThreadCount(5, "5 threads from OMP_NUM_THREADS")


@pytest.mark.parametrize(
    ("n_threads", "environ", "name"),
    [
        (0, {}, "n_threads"),
        (-2, {}, "n_threads"),
        (None, {"PHI3C_NUM_THREADS": "many"}, "PHI3C_NUM_THREADS"),
        (None, {"OMP_NUM_THREADS": "0"}, "OMP_NUM_THREADS"),
    ],
)
def test_nonsense_is_refused(n_threads: int | None, environ: dict[str, str], name: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"{name} is .* at least 1"):
        default_threads(n_threads, LAPTOP, environ)


# --- Linux ------------------------------------------------------------------------------------------------


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def topology(cores: list[tuple[int, int]]) -> dict[str, str]:
    files = {}
    for cpu, (package, core) in enumerate(cores):
        folder = f"sys/devices/system/cpu/cpu{cpu}/topology"
        files |= {f"{folder}/physical_package_id": str(package), f"{folder}/core_id": str(core)}
    return files


def test_topology_within_the_affinity_set(tmp_path: Path) -> None:
    root = tree(tmp_path, topology([(0, 0), (0, 0), (0, 1), (0, 1), (1, 0), (1, 0)]))
    machine = _linux_machine(root, {0, 1, 3, 4})
    assert [cpu.core for cpu in machine.cpus] == [(0, 0), (0, 0), (0, 1), (1, 0)]
    assert default_threads(machine=machine, environ={}).count == 3


def test_intel_hybrid(tmp_path: Path) -> None:
    cores = [(0, 0), (0, 0), (0, 4), (0, 4), (0, 8), (0, 9), (0, 10)]
    root = tree(tmp_path, topology(cores) | {"sys/devices/cpu_core/cpus": "0-2,3"})
    assert default_threads(machine=_linux_machine(root, range(7)), environ={}).count == 2
    assert default_threads(machine=_linux_machine(root, {4, 5, 6}), environ={}).count == 3


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_big_and_little(tmp_path: Path, name: str) -> None:
    speeds = {f"sys/devices/system/cpu/cpu{i}/{name}": "1024" if i < 2 else "446" for i in range(6)}
    root = tree(tmp_path, topology([(0, i) for i in range(6)]) | speeds)
    assert default_threads(machine=_linux_machine(root, range(6)), environ={}).count == 2


def test_hidden_topology_counts_hardware_threads(tmp_path: Path) -> None:
    assert default_threads(machine=_linux_machine(tmp_path, {0, 1, 2}), environ={}).count == 3


CGROUPS = {
    "v2, the tightest ancestor": (
        {
            "proc/self/cgroup": "0::/user/app",
            "sys/fs/cgroup/user/app/cpu.max": "800000 100000",
            "sys/fs/cgroup/user/cpu.max": "350000 100000",
        },
        3.5,
    ),
    "v2, inside a container": ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
    "v2, no limit": ({"proc/self/cgroup": "0::/app", "sys/fs/cgroup/app/cpu.max": "max 100000"}, None),
    "v1": (
        {
            "proc/self/cgroup": "5:memory:/app\n4:cpu,cpuacct:/app\n0::/",
            "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/app/cpu.cfs_period_us": "100000",
        },
        2.5,
    ),
    "v1, the host's path in a container": (
        {
            "proc/self/cgroup": "4:cpu:/docker/0123",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        0.5,
    ),
    "v1, no limit": (
        {
            "proc/self/cgroup": "4:cpu:/",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
        },
        None,
    ),
    "cpuset is another controller": (
        {"proc/self/cgroup": "3:cpuset:/a", "sys/fs/cgroup/cpuset/cpu.max": "1 1"},
        None,
    ),
    "none": ({}, None),
}


@pytest.mark.parametrize(("files", "quota"), CGROUPS.values(), ids=CGROUPS.keys())
def test_cgroup_quota(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert _linux_machine(tree(tmp_path, files), {0}).quota == quota


def test_this_machine() -> None:
    machine = describe_machine()
    threads = default_threads(environ={})
    assert 1 <= threads.count <= len(machine.cpus) <= (os.cpu_count() or 1)
    assert threads.derivation.startswith(f"{threads.count} thread")
