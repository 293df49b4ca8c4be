"""threads.py: the default thread count, on described machines and on made-up /proc and /sys trees."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

from phi3c.errors import InvalidParameterError
from phi3c.threads import (
    LogicalCPU,
    Machine,
    ThreadCount,
    default_threads,
    describe_machine,
    linux_machine,
    macos_machine,
    windows_machine,
)

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
    machine = linux_machine(root, {0, 1, 3, 4})
    assert [cpu.core for cpu in machine.cpus] == [(0, 0), (0, 0), (0, 1), (1, 0)]
    assert default_threads(machine=machine, environ={}).count == 3


def test_intel_hybrid(tmp_path: Path) -> None:
    cores = [(0, 0), (0, 0), (0, 4), (0, 4), (0, 8), (0, 9), (0, 10)]
    root = tree(tmp_path, topology(cores) | {"sys/devices/cpu_core/cpus": "0-2,3"})
    assert default_threads(machine=linux_machine(root, range(7)), environ={}).count == 2
    assert default_threads(machine=linux_machine(root, {4, 5, 6}), environ={}).count == 3


@pytest.mark.parametrize("name", ["cpu_capacity", "cpufreq/cpuinfo_max_freq"])
def test_big_and_little(tmp_path: Path, name: str) -> None:
    speeds = {f"sys/devices/system/cpu/cpu{i}/{name}": "1024" if i < 2 else "446" for i in range(6)}
    root = tree(tmp_path, topology([(0, i) for i in range(6)]) | speeds)
    assert default_threads(machine=linux_machine(root, range(6)), environ={}).count == 2


def test_hidden_topology_counts_hardware_threads(tmp_path: Path) -> None:
    assert default_threads(machine=linux_machine(tmp_path, {0, 1, 2}), environ={}).count == 3


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
    assert linux_machine(tree(tmp_path, files), {0}).quota == quota


# --- real machines, as their systems describe them ----------------------------------------------------------


def smt(cores: int, threads: int = 2, package: int = 0) -> list[tuple[int, int]]:
    """Hardware threads of a core side by side, as Intel's boards usually number them."""
    return [(package, core) for core in range(cores) for _ in range(threads)]


def quota(cpus: float) -> dict[str, str]:
    return {"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": f"{int(cpus * 100_000)} 100000"}


def capacity(values: Iterable[int]) -> dict[str, str]:
    return {f"sys/devices/system/cpu/cpu{i}/cpu_capacity": str(value) for i, value in enumerate(values)}


ALDER_LAKE = topology([*smt(6), *((0, 24 + i) for i in range(8))]) | {
    "sys/devices/cpu_core/cpus": "0-11",
    "sys/devices/cpu_atom/cpus": "12-19",
}
TWO_SOCKETS = topology([(cpu % 2, cpu % 40 // 2) for cpu in range(80)])  # threads of a core are 40 apart

LINUX: dict[str, tuple[dict[str, str], Iterable[int], int]] = {
    "Core i7-12700H, 6 performance and 8 efficiency cores": (ALDER_LAKE, range(20), 6),
    "the same, taskset to four hardware threads": (ALDER_LAKE, range(4), 2),
    "the same, taskset to efficiency cores": (ALDER_LAKE, range(12, 20), 8),
    "Ryzen 7 5800X: threads of a core are 8 apart": (topology([(0, i % 8) for i in range(16)]), range(16), 8),
    "two Xeon Gold 6248 of 20 cores": (TWO_SOCKETS, range(80), 40),
    "the same, numactl to one socket": (TWO_SOCKETS, range(0, 80, 2), 20),
    "Graviton 2, 16 vCPUs: a core each, no frequencies": (topology(smt(16, 1)), range(16), 16),
    "Raspberry Pi 4": (topology(smt(4, 1)) | capacity([1024] * 4), range(4), 4),
    "RK3588, 4 Cortex-A55 and 4 Cortex-A76": (
        topology(smt(8, 1)) | capacity([530] * 4 + [1024] * 4),
        range(8),
        4,
    ),
    "Snapdragon 8 Gen 2 under Linux: 3 + 4 + 1": (
        topology(smt(8, 1)) | capacity([326] * 3 + [883] * 4 + [1024]),
        range(8),
        5,
    ),
    "virtual machine with the two threads of one core": (topology(smt(1)), range(2), 1),
    "CI runner: 4 vCPUs on 2 cores": (topology(smt(2)), range(4), 2),
    "Kubernetes, limit 500m on a node of 64 cores": (topology(smt(64)) | quota(0.5), range(128), 1),
    "Docker, --cpus 1.5": (topology(smt(8)) | quota(1.5), range(16), 1),
    "Docker, --cpus 6 --cpuset-cpus 0-7": (topology(smt(8)) | quota(6), range(8), 4),
    "Docker with cgroup v1, --cpus 2.5, on Alder Lake": (
        ALDER_LAKE
        | {
            "proc/self/cgroup": "4:cpu,cpuacct:/docker/8d1f",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        },
        range(20),
        2,
    ),
}


@pytest.mark.parametrize(("files", "affinity", "n"), LINUX.values(), ids=LINUX.keys())
def test_real_linux_machines(tmp_path: Path, files: dict[str, str], affinity: Iterable[int], n: int) -> None:
    assert default_threads(machine=linux_machine(tree(tmp_path, files), affinity), environ={}).count == n


def levels(*cores: int) -> dict[str, int]:
    return {"hw.nperflevels": len(cores)} | {
        f"hw.perflevel{level}.physicalcpu": n for level, n in enumerate(cores)
    }


MACS: dict[str, tuple[Mapping[str, int], int]] = {
    "M1: 4 + 4": (levels(4, 4), 4),
    "M1 Pro: 8 + 2": (levels(8, 2), 8),
    "M2 Ultra: 16 + 8": (levels(16, 8), 16),
    "M4 Max: 12 + 4": (levels(12, 4), 12),
    "virtual machine on an M1: one level": (levels(3), 3),
    "Core i7-9750H": ({"hw.physicalcpu": 6, "hw.logicalcpu": 12}, 6),
}


@pytest.mark.parametrize(("values", "n"), MACS.values(), ids=MACS.keys())
def test_real_macs(values: Mapping[str, int], n: int) -> None:
    machine = macos_machine(values.get)
    assert machine is not None
    assert default_threads(machine=machine, environ={}).count == n


def test_a_mac_that_says_nothing() -> None:
    assert macos_machine({}.get) is None


def cores(*masks: int, efficiency_class: int = 0, group: int = 0) -> bytes:
    """Records of SYSTEM_LOGICAL_PROCESSOR_INFORMATION_EX, a core each."""
    return b"".join(
        struct.pack("<IIBB20xHQH6x", 0, 48, 0, efficiency_class, 1, mask, group) for mask in masks
    )


def pairs(n: int, first: int = 0) -> list[int]:
    return [0b11 << (first + 2 * i) for i in range(n)]


WINDOWS: dict[str, tuple[bytes, int, tuple[int, ...], int]] = {
    "Core i7-12700H": (
        cores(*pairs(6), efficiency_class=1) + cores(*(1 << (12 + i) for i in range(8))),
        0xFFFFF,
        (0,),
        6,
    ),
    "the same, on efficiency cores only": (
        cores(*pairs(6), efficiency_class=1) + cores(*(1 << (12 + i) for i in range(8))),
        0xFF000,
        (0,),
        8,
    ),
    "Ryzen 7 5800X: all of one class": (cores(*pairs(8)), 0xFFFF, (0,), 8),
    "the same, four hardware threads": (cores(*pairs(8)), 0xF, (0,), 2),
    "Threadripper 3990X, process in one of two groups": (
        cores(*pairs(32)) + cores(*pairs(32), group=1),
        2**64 - 1,
        (1,),
        32,
    ),
    "the same, both groups": (cores(*pairs(32)) + cores(*pairs(32), group=1), 0, (0, 1), 64),
}


@pytest.mark.parametrize(("records", "affinity", "groups", "n"), WINDOWS.values(), ids=WINDOWS.keys())
def test_real_windows_machines(records: bytes, affinity: int, groups: tuple[int, ...], n: int) -> None:
    machine = windows_machine(records, affinity, groups)
    assert machine is not None
    assert default_threads(machine=machine, environ={}).count == n


def test_windows_that_says_nothing() -> None:
    assert windows_machine(b"", 1, (0,)) is None


def test_this_machine() -> None:
    machine = describe_machine()
    threads = default_threads(environ={})
    assert 1 <= threads.count <= len(machine.cpus) <= (os.cpu_count() or 1)
    assert threads.derivation.startswith(f"{threads.count} thread")
