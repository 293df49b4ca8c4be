"""How much memory this process may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from phi3c.cgroup import folders, read


def total_memory() -> int | None:
    """Bytes: the machine's, or what the process's cgroup grants where that is less; None: nobody tells."""
    if sys.platform == "win32":
        return None
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([physical, *_cgroup_limits(Path("/"))])


def _cgroup_limits(root: Path) -> list[int]:
    """Memory limits of the process's cgroup and its ancestors."""
    names = {2: "memory.max", 1: "memory.limit_in_bytes"}  # "max", or a huge number, where there is none
    limits = [read(folder / names[version]) for version, folder in folders(root, "memory")]
    return [int(limit) for limit in limits if limit.isdigit()]
