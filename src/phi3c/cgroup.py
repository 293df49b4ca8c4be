"""Where Linux says what a process may use: its control group and the ones around it, versions 1 and 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def folders(root: Path, controller: str) -> Iterator[tuple[int, Path]]:
    """The version, 1 or 2, and the folder of each group whose limits on `controller` count for this process.

    Args:
        root: what /proc and /sys lie under.
        controller: for example "cpu".
    """
    for line in read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            version, mounts = 2, ["sys/fs/cgroup", "sys/fs/cgroup/unified"]
        elif controller in controllers.split(","):
            version, mounts = (
                1,
                [f"sys/fs/cgroup/{name}" for name in dict.fromkeys((controller, controllers))],
            )
        else:
            continue
        # inside a container the path may be the host's: the folders that are missing are passed over
        relative = Path(path.lstrip("/"))
        for mount in mounts:
            for group in (relative, *relative.parents):
                yield version, root / mount / group


def read(path: Path) -> str:
    """A file's text, stripped; nothing where it cannot be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
