"""Moves cartridges with their optimizer state between device, host memory and a store, as the schedule asks.

A cartridge is on the device, else in host memory if it fits there, else in the store alone. One that was trained and is
not in the store yet is *dirty*; when host memory is full, its least recently used entry is written to the store and
dropped. On a GPU a thread reads the cartridges of the next rotation and writes evicted ones while steps run.

*Trainees* are the cartridges of the pool; *guests* are frozen distractors, read-only copies of cartridges outside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from budget.ledger import Ledger


class BackingStore(Protocol):
    """Where cartridges are stored durably."""

    def read_tensors(self, name: str, parts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Fresh tensors of the newest written version: ``kv`` and, once trained, ``exp_avg``, ``exp_avg_sq``, perhaps
        ``pending``. The caller may change them."""
        ...

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a new version, which becomes valid with the next checkpoint."""
        ...


@dataclass
class Slot:
    """A trainee on the device, float32: its values, Adam's moments, and a gradient that is not applied yet."""

    kv: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    pending: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"kv": self.kv.detach(), "exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq}
        return tensors if self.pending is None else {**tensors, "pending": self.pending}


@dataclass
class _Host:
    tensors: dict[str, Tensor]
    dirty: bool


@dataclass
class Counters:
    """What the manager did since it was created."""

    rotations: int = 0
    device_loads: int = 0
    store_reads: int = 0
    read_ahead: int = 0  # of these, started before they were needed
    store_writes: int = 0


@dataclass
class Manager:
    """The cartridges on the device, and the host cache for evicted ones.

    Attributes:
        device_bytes: limit for trainees (with gradient and moments) and guests; None for no limit.
        host_bytes: limit for evicted cartridges in host memory; with 0 each is written to the store at once.
        ahead: read and write in a thread during the steps. This takes host memory for what is in transit, at most as
            much as two pools and the guests; results are the same.
    """

    store: BackingStore
    device: torch.device
    device_bytes: int | None = None
    host_bytes: int | None = 0
    guest_dtype: torch.dtype = torch.bfloat16
    ahead: bool = False
    trainees: dict[str, Slot] = field(default_factory=dict)
    guests: dict[str, Tensor] = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)

    def __post_init__(self) -> None:
        self.ledger = Ledger({"device": self.device_bytes, "host": self.host_bytes})
        self._host: dict[str, _Host] = {}
        self._dirty: set[str] = set()  # trainees whose newest values are only on the device
        # One worker, so that reads follow earlier writes.
        self._worker = ThreadPoolExecutor(1) if self.ahead else None
        self._reads: dict[tuple[str, bool], Future[dict[str, Tensor]]] = {}  # by name, and whether with Adam state
        self._writes: dict[str, Future[None]] = {}

    def rotate(self, pool: Sequence[str], guests: Sequence[str]) -> None:
        """Make exactly these trainees and guests resident. Others are evicted first, so the device never holds both."""
        assert not set(pool) & set(guests)
        self.counters.rotations += 1
        self.wait_for_writes()
        for name in [n for n in self.trainees if n not in set(pool)]:
            self._evict(name)
        for name in [n for n in self.guests if n not in set(guests)]:
            del self.guests[name]
            self.ledger.take("device", f"guest:{name}")
        for name in guests:
            if name not in self.guests:
                self._admit_guest(name)
        for name in pool:
            if name not in self.trainees:
                self._admit(name)
        self._reads.clear()
        trim_host_memory()

    def prefetch(self, pool: Sequence[str], guests: Sequence[str]) -> None:
        """Start reading from the store what the next rotation will load."""
        assert self._worker is not None
        wanted = [(name, True) for name in pool] + [(name, False) for name in guests if name not in self.guests]
        for name, whole in wanted:
            if name not in self.trainees and name not in self._host and (name, whole) not in self._reads:
                parts = None if whole else ["kv"]
                self._reads[name, whole] = self._worker.submit(self._read, name, parts)

    def close(self) -> None:
        """Wait for reads and writes in progress, and end the thread. What was not flushed is lost."""
        if self._worker is not None:
            self._worker.shutdown(cancel_futures=True)

    def touch(self, name: str) -> None:
        """Mark a trainee as changed."""
        assert name in self.trainees
        self._dirty.add(name)

    def reload(self, name: str) -> None:
        """Replace a trainee by what the store has; its values on the device are lost."""
        self.trainees.pop(name)
        self.ledger.take("device", name)
        self._dirty.discard(name)
        self._admit(name)

    def flush(self, before_write: Callable[[str], None] | None = None) -> list[str]:
        """Write everything dirty to the store, which a checkpoint then commits. Returns: the names."""
        written = []
        self.wait_for_writes()
        for name, tensors in [(n, self.trainees[n].tensors()) for n in sorted(self._dirty)] + [
            (n, h.tensors) for n, h in sorted(self._host.items()) if h.dirty
        ]:
            if before_write is not None:
                before_write(name)
            self._write(name, tensors, wait=True)
            written.append(name)
        self._dirty.clear()
        for entry in self._host.values():
            entry.dirty = False
        return written

    def _write(self, name: str, tensors: Mapping[str, Tensor], wait: bool = False) -> None:
        self.counters.store_writes += 1
        on_cpu = {k: t.to("cpu") for k, t in tensors.items()}
        if self._worker is None or wait:
            self.store.write_tensors(name, on_cpu)
        else:
            self._writes[name] = self._worker.submit(self.store.write_tensors, name, on_cpu)

    def wait_for_writes(self) -> None:
        """Wait until all evicted cartridges are written; raises what went wrong in the thread."""
        for name in list(self._writes):
            self._writes.pop(name).result()

    def _read(self, name: str, parts: Sequence[str] | None = None) -> dict[str, Tensor]:
        tensors = self.store.read_tensors(name, parts)
        return {k: t.pin_memory() for k, t in tensors.items()} if self.device.type == "cuda" else tensors

    def _tensors(self, name: str, parts: Sequence[str] | None) -> dict[str, Tensor]:
        if name in self._host:
            self.ledger.use("host", name)
            tensors = self._host[name].tensors
            return tensors if parts is None else {k: tensors[k] for k in parts}
        self.counters.store_reads += 1
        if name in self._writes:
            self._writes.pop(name).result()
        started = self._reads.pop((name, parts is None), None)
        if started is None:
            return self._read(name, parts)
        self.counters.read_ahead += 1
        return started.result()

    def _admit(self, name: str) -> None:
        tensors = self._tensors(name, None)
        kv = tensors["kv"]
        if name in self._host:
            if self._host.pop(name).dirty:
                self._dirty.add(name)
            self.ledger.take("host", name)
        self.ledger.put("device", name, trainee_bytes(kv.numel()))
        self.counters.device_loads += 1

        def own(key: str) -> Tensor:
            return (
                tensors[key].to(self.device, torch.float32, non_blocking=True)
                if key in tensors
                else torch.zeros_like(leaf)
            )

        # On a CPU no copy: the store's tensors are the caller's own.
        leaf = kv.to(self.device, torch.float32, non_blocking=True)
        slot = Slot(leaf, own("exp_avg"), own("exp_avg_sq"), own("pending") if "pending" in tensors else None)
        self.trainees[name] = slot

    def _admit_guest(self, name: str) -> None:
        kv = self._tensors(name, ["kv"])["kv"]
        self.ledger.put("device", f"guest:{name}", guest_bytes(kv.numel()))
        self.guests[name] = kv.to(self.device, self.guest_dtype, copy=True)

    def _evict(self, name: str) -> None:
        slot = self.trainees.pop(name)
        self.ledger.take("device", name)
        tensors = {k: t.to("cpu") for k, t in slot.tensors().items()}
        dirty = name in self._dirty
        self._dirty.discard(name)
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        while not self.ledger.fits("host", size) and self._host:
            self._spill(self.ledger.names("host")[0])
        if self.ledger.fits("host", size):
            self.ledger.put("host", name, size)
            self._host[name] = _Host(tensors, dirty)
        elif dirty:
            self._write(name, tensors)

    def _spill(self, name: str) -> None:
        entry = self._host.pop(name)
        self.ledger.take("host", name)
        if entry.dirty:
            self._write(name, entry.tensors)


def trim_host_memory() -> None:
    """Return freed host memory to the system; glibc would otherwise keep the peak of every phase."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def trainee_bytes(elements: int) -> int:
    """Device bytes of a cartridge in training: float32 values, gradient and two moments."""
    return 16 * elements


def guest_bytes(elements: int) -> int:
    """Device bytes of a read-only copy in a 16-bit dtype: an eighth of a trainee."""
    return 2 * elements
