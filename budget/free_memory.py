"""Memory that this process may still take: of the host, within its cgroups, and of a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch


def host_free(root: Path = Path("/")) -> int | None:
    """Bytes of host memory that this process may have in all, what it has already included; None where the system does
    not tell. The least of what the kernel calls available and what the limits of cgroups (version 1 and 2) leave.

    Args: root: where ``proc`` and ``sys`` are.
    """
    try:
        available = _field(root / "proc/meminfo", "MemAvailable") * 1024
        own = _field(root / "proc/self/status", "VmRSS") * 1024
    except (OSError, ValueError, StopIteration):
        return None
    return own + max(0, min([available, *_cgroups(root)]))


def device_free(device: torch.device) -> int | None:
    """Bytes of a GPU that this process may have in all; None for another kind of device."""
    if device.type != "cuda":
        return None
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def _cgroups(root: Path) -> Iterator[int]:
    """Bytes left within every cgroup that this process is in; file pages that the kernel can drop count as free."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        top = root / "sys/fs/cgroup" / ("memory" if controllers else "")
        folder = top / path.lstrip("/")
        for place in (
            folder,
            *folder.parents,
        ):  # inside a container, the path may be the host's: then only the top exists
            if top not in (place, *place.parents):
                break
            try:
                limit, used = ((place / name).read_text().strip() for name in names)
                idle = _field(place / "memory.stat", "total_inactive_file" if controllers else "inactive_file")
                if limit != "max":
                    yield int(limit) - int(used) + idle
            except (OSError, ValueError, StopIteration):
                continue


def _field(file: Path, name: str) -> int:
    """The number behind a name in lines such as ``name: 12 kB`` or ``name 12``."""
    lines = (line.replace(":", " ").split() for line in file.read_text().splitlines())
    return next(int(words[1]) for words in lines if words and words[0] == name)
