"""The log of training steps, one line of JSON each: ``metrics.jsonl`` in the store's folder."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cas.store.files import writing


@dataclass(frozen=True)
class Report:
    """One step, for the progress display and the log. Loss in nats per supervised token; ``skipped`` steps so far."""

    step: int
    steps: int
    loss: float
    lr: float
    tokens: int
    tokens_per_s: float
    pool: tuple[str, ...]
    rotations: int
    skipped: int = 0


class StepLog:
    """The log, open for appending after the last checkpoint's line."""

    def __init__(self, file: Path, step: int) -> None:
        """Drop lines from ``step`` on, which a killed run wrote after its last checkpoint, and an incomplete one."""
        self._file, self._log = file, file.open("a+b")
        self._log.seek(0)
        end = 0
        for line in self._log:
            if not line.endswith(b"}\n") or json.loads(line)["step"] >= step:
                break
            end += len(line)
        self._log.truncate(end)

    def write(self, report: Report, targets: Sequence[str]) -> None:
        """Add a step; a loss that is not finite is written as null."""
        loss = report.loss if math.isfinite(report.loss) else None
        line = {**asdict(report), "loss": loss, "pool": len(report.pool), "targets": targets}
        with writing(self._file):
            self._log.write(json.dumps(line).encode() + b"\n")
            self._log.flush()

    def sync(self) -> None:
        """Wait until it is on the disk."""
        with writing(self._file):
            self._log.flush()
            os.fsync(self._log.fileno())

    def close(self) -> None:
        self._log.close()
