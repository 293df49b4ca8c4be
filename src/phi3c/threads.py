"""How many threads to compute with: a pure rule, and the description of the machine it is applied to."""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
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
    machine = None
    if sys.platform == "linux":
        machine = linux_machine(Path("/"), os.sched_getaffinity(0))
    elif sys.platform == "darwin":
        machine = macos_machine(_sysctl)
    elif sys.platform == "win32":
        machine = windows_machine(_processor_cores(), *_process_affinity())
    if machine is None or not machine.cpus:  # the system would not say: every hardware thread is a core
        machine = Machine(tuple(LogicalCPU((0, i)) for i in range(os.cpu_count() or 1)))
    return machine


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


def macos_machine(sysctl: Callable[[str], int | None]) -> Machine | None:
    """Describe a Mac by its sysctl values: performance levels on Apple silicon, level 0 the fastest.

    macOS has no affinity sets and no quotas.
    """
    cpus: list[LogicalCPU] = []
    levels = sysctl("hw.nperflevels") or 0
    for level in range(levels):
        for core in range(sysctl(f"hw.perflevel{level}.physicalcpu") or 0):
            cpus.append(LogicalCPU((level, core), speed=int(level == 0)))
    if not cpus:  # Intel
        cores, threads = sysctl("hw.physicalcpu") or 0, sysctl("hw.logicalcpu") or 0
        cpus = [LogicalCPU((0, i % cores)) for i in range(threads if cores else 0)]
    return Machine(tuple(cpus)) if cpus else None


def _sysctl(name: str) -> int | None:
    value, size = ctypes.c_int(0), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
    call = ctypes.CDLL(None).sysctlbyname
    failed = call(name.encode(), ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
    return None if failed else value.value


def windows_machine(cores: bytes, affinity: int, groups: Collection[int]) -> Machine | None:
    """Describe a Windows machine.

    Args:
        cores: what GetLogicalProcessorInformationEx returns for RelationProcessorCore: records of
            (Relationship, Size: u32; Flags, EfficiencyClass: u8; 20 bytes; GroupCount: u16) and, for each
            group, (Mask: u64; Group: u16; 6 bytes), on 64-bit Windows. A greater EfficiencyClass is faster.
        affinity: the process's mask within its group; 0 where its threads are in several groups.
        groups: processor groups (of at most 64) the process may use.
    """
    cpus, offset, core = [], 0, 0
    while offset + 32 <= len(cores):
        _, size, _, efficiency_class, n_groups = struct.unpack_from("<IIBB20xH", cores, offset)
        for i in range(n_groups):
            mask, group = struct.unpack_from("<QH", cores, offset + 32 + 16 * i)
            if group in groups:
                usable = mask & affinity if affinity else mask
                cpus += [LogicalCPU((group, core), efficiency_class)] * usable.bit_count()
        core += 1
        offset += size
    return Machine(tuple(cpus)) if cpus else None


def _processor_cores() -> bytes:
    kernel32 = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    size, relation_processor_core = ctypes.c_uint32(0), 0
    kernel32.GetLogicalProcessorInformationEx(relation_processor_core, None, ctypes.byref(size))
    buffer = ctypes.create_string_buffer(size.value)
    if not kernel32.GetLogicalProcessorInformationEx(relation_processor_core, buffer, ctypes.byref(size)):
        return b""
    return buffer.raw[: size.value]


def _process_affinity() -> tuple[int, tuple[int, ...]]:
    """The process's affinity mask, and the processor groups it may use."""
    kernel32 = ctypes.WinDLL("kernel32")  # type: ignore[attr-defined,unused-ignore]
    process = ctypes.c_void_p(kernel32.GetCurrentProcess())
    mask, system = ctypes.c_size_t(0), ctypes.c_size_t(0)
    kernel32.GetProcessAffinityMask(process, ctypes.byref(mask), ctypes.byref(system))
    groups, n = (ctypes.c_uint16 * 64)(), ctypes.c_uint16(64)
    if not kernel32.GetProcessGroupAffinity(process, ctypes.byref(n), groups):
        n.value = 1  # group 0, as it stands
    return mask.value if n.value == 1 else 0, tuple(groups[: n.value])


def linux_machine(root: Path, affinity: Iterable[int]) -> Machine:
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
