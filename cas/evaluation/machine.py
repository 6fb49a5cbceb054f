"""The machine that a run was made on: hardware, versions, peak memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
import threading
from pathlib import Path
from typing import Any

import cas


def hardware() -> dict[str, Any]:
    """CPU, cores, memory (GiB) and accelerator, as results record them."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "accelerator": _accelerator(),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _accelerator() -> str | None:
    torch = sys.modules.get("torch")  # a run that used an accelerator has imported it
    if torch is None or not torch.accelerator.is_available():
        return None
    device = torch.accelerator.current_accelerator()
    name = torch.cuda.get_device_name() if device.type == "cuda" else device.type
    count = torch.accelerator.device_count()
    return name if count == 1 else f"{count} x {name}"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on."""
    packages: dict[str, str | None] = {"python": platform.python_version(), "cas": getattr(cas, "__version__", None)}
    for package in ("numpy", "torch", "transformers", "peft", "kvpress"):
        try:
            packages[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return packages


class PeakMemory:
    """Peak anonymous memory of this process inside the context, in bytes, sampled every so many ``seconds``; the peak
    resident size where the system does not report anonymous memory."""

    peak = 0

    def __init__(self, seconds: float = 0.5) -> None:
        self._seconds = seconds

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            if self._done.wait(self._seconds):
                return

    @staticmethod
    def now() -> int:
        """Anonymous memory of this process now, in bytes."""
        try:
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
        except (OSError, StopIteration):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024

    def __exit__(self, *exc: Any) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())
