"""How much memory this process may use, and how much it has used."""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

from phi3c.cgroup import folders, read


def total_memory() -> int | None:
    """Bytes: the machine's, or what the process's cgroup grants where that is less; None: nobody tells."""
    physical = _physical_memory()
    return None if physical is None else min([physical, *_cgroup_limits(Path("/"))])


def _physical_memory() -> int | None:
    if sys.platform == "win32":
        status = (ctypes.c_uint64 * 8)(64)  # MEMORYSTATUSEX: dwLength, dwMemoryLoad; ullTotalPhys; ...
        return status[1] if ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)) else None
    if sys.platform == "darwin":
        value, size = ctypes.c_uint64(0), ctypes.c_size_t(8)
        sysctl = ctypes.CDLL(None).sysctlbyname
        failed = sysctl(b"hw.memsize", ctypes.byref(value), ctypes.byref(size), None, ctypes.c_size_t(0))
        return None if failed else value.value
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak_memory() -> int | None:
    """Largest resident size of this process so far in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        kernel32 = ctypes.windll.kernel32
        kernel32.GetCurrentProcess.restype = ctypes.c_void_p
        process = ctypes.c_void_p(kernel32.GetCurrentProcess())
        counters = (ctypes.c_uint64 * 9)(72)  # PROCESS_MEMORY_COUNTERS: cb, faults; PeakWorkingSetSize; ...
        known = kernel32.K32GetProcessMemoryInfo(process, ctypes.byref(counters), ctypes.c_uint32(72))
        return counters[1] if known else None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cgroup_limits(root: Path) -> list[int]:
    """Memory limits of the process's cgroup and its ancestors."""
    names = {2: "memory.max", 1: "memory.limit_in_bytes"}  # "max", or a huge number, where there is none
    limits = [read(folder / names[version]) for version, folder in folders(root, "memory")]
    return [int(limit) for limit in limits if limit.isdigit()]
