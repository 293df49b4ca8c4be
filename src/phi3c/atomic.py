"""Files that are there whole or not at all, whatever interrupts the writing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A temporary file beside `path`; at the end of the block it is synced and takes its name.

    Where the block fails, nothing is left and `path` is as it was.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def require_space(folder: Path, n_bytes: int) -> None:
    """Refuse what cannot end well.

    Raises:
        OSError: ENOSPC, the disk of this folder has less room than that.
    """
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"it takes {n_bytes / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB left; free some",
        )
