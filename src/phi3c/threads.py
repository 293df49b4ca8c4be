"""How many threads to compute with: a pure rule, and the description of the machine it is applied to."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from phi3c.cgroup import folders, read
from phi3c.errors import InvalidParameterError

# A core slower than this share of the fastest one is an efficiency core: waiting for it at every barrier
# costs more than it computes.
PERFORMANCE_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class LogicalCPU:
    """A hardware thread: the (package, core) it belongs to and its speed in any unit the machine uses."""

    core: tuple[int, int]
    speed: int = 1


@dataclass(frozen=True, slots=True)
class Machine:
    """What the process may use: its affinity set, and the CPU seconds per second its cgroup grants."""

    cpus: tuple[LogicalCPU, ...]
    quota: float | None = None


@dataclass(frozen=True, slots=True)
class ThreadCount:
    """A number of threads, and a line that says how it came about."""

    count: int
    derivation: str


def default_threads(
    n_threads: int | None = None, machine: Machine | None = None, environ: Mapping[str, str] = os.environ
) -> ThreadCount:
    """Choose the number of compute threads.

    The first that is given counts: the argument, `PHI3C_NUM_THREADS`, `OMP_NUM_THREADS`. Otherwise it is one
    thread per physical performance core, but not more than the cgroup quota rounded down. Hyper-threads are
    left out: two of them share the multipliers and the caches that one already keeps busy.

    Args:
        n_threads: The caller's choice, at least 1.
        machine: The processors at hand; those of `describe_machine()` when None.
        environ: Environment variables.

    Raises:
        InvalidParameterError: The argument or a variable is not a whole number of at least 1.
    """
    if n_threads is not None:
        return ThreadCount(_checked(n_threads, "n_threads"), f"{_threads(n_threads)}, as the caller asked")
    for variable in ("PHI3C_NUM_THREADS", "OMP_NUM_THREADS"):
        if value := environ.get(variable, "").strip():
            n = _checked(value.split(",")[0], variable)  # OpenMP allows one number per nesting level
            return ThreadCount(n, f"{_threads(n)} from {variable}")

    machine = machine or describe_machine()
    fastest = max(cpu.speed for cpu in machine.cpus)
    cores = {cpu.core for cpu in machine.cpus}
    performance = {cpu.core for cpu in machine.cpus if cpu.speed >= PERFORMANCE_SHARE * fastest}
    kind = "physical" if performance == cores else "performance"
    n, quota = len(performance), "none"
    if machine.quota is not None:
        n = max(1, min(n, int(machine.quota)))
        quota = f"{machine.quota:g}"
    limits = f"affinity {len(machine.cpus)}, cgroup quota {quota}, {kind} cores {len(performance)}"
    return ThreadCount(n, f"{_threads(n)} = min({limits})")


def describe_machine() -> Machine:
    """Read from the operating system which processors this process may use."""
    if sys.platform == "linux":
        return _linux_machine(Path("/"), os.sched_getaffinity(0))
    n = _macos_cores() if sys.platform == "darwin" else None
    return Machine(tuple(LogicalCPU((0, i)) for i in range(n or os.cpu_count() or 1)))


def _checked(value: int | str, source: str) -> int:
    try:
        n = int(value)
    except ValueError:
        n = 0
    if n < 1:
        raise InvalidParameterError(f"{source} is {value!r}: the number of threads must be at least 1")
    return n


def _threads(n: int) -> str:
    return f"{n} thread" if n == 1 else f"{n} threads"


def _macos_cores() -> int | None:
    """Performance cores on Apple silicon, physical cores on Intel."""
    sysctl = ctypes.CDLL(None).sysctlbyname
    for name in (b"hw.perflevel0.physicalcpu", b"hw.physicalcpu"):
        value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        if sysctl(name, ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0)) == 0:
            return value.value
    return None


def _linux_machine(root: Path, affinity: Iterable[int]) -> Machine:
    """Describe the Linux machine whose /proc and /sys lie under `root`."""
    folder = root / "sys/devices/system/cpu"
    hybrid = _cpu_list(read(root / "sys/devices/cpu_core/cpus"))  # Intel: the performance cores, by name
    cpus = []
    for cpu in sorted(affinity):
        here = folder / f"cpu{cpu}"
        package = read(here / "topology/physical_package_id")
        core = read(here / "topology/core_id")
        speed = read(here / "cpu_capacity") or read(here / "cpufreq/cpuinfo_max_freq") or "1"
        cpus.append(
            LogicalCPU(
                # where the topology is hidden, every hardware thread counts as a core
                core=(int(package), int(core)) if package and core else (-1, cpu),
                speed=int(cpu in hybrid) if hybrid else int(speed),
            )
        )
    return Machine(tuple(cpus), _cgroup_quota(root))


def _cgroup_quota(root: Path) -> float | None:
    """The tightest CPU quota, in CPUs, of the process's cgroup and its ancestors."""
    quotas = []
    for version, folder in folders(root, "cpu"):
        if version == 2:
            limit, _, period = read(folder / "cpu.max").partition(" ")
        else:
            limit, period = read(folder / "cpu.cfs_quota_us"), read(folder / "cpu.cfs_period_us")
        if limit.isdigit() and period.isdigit() and int(period) > 0:  # else "max", "-1" or absent
            quotas.append(int(limit) / int(period))
    return min(quotas, default=None)


def _cpu_list(text: str) -> set[int]:
    """The numbers in a list such as `0-3,8`."""
    numbers: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers
