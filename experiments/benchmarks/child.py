"""Measurements that need a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_child(benchmark: str, *words: str | Path) -> str:
    """What a benchmark of this folder prints in a process of its own. Raises: RuntimeError with its errors."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.benchmarks.{benchmark}", *map(str, words)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
