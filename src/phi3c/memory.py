"""How much memory this machine has."""

from __future__ import annotations

import os
import sys


def total_memory() -> int | None:
    """Physical memory in bytes; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
