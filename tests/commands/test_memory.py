"""Memory is a promise: what self-study and training really take, against the plan, with a real model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

WATCHED = """
import sys
from cas import train
from cas.training import pipeline
from cas.options import TrainConfig, parse
from cas.model.frozen import FrozenModel
from cas.data.collection import Collection
from cas.evaluation.machine import PeakMemory

config = parse(TrainConfig, "train", sys.argv[1:])
plans = []
plan_memory = pipeline.plan_memory
pipeline.plan_memory = lambda *args: plans.append(plan_memory(*args)) or plans[-1]
with PeakMemory() as memory:
    assert train.train(config, "again") == 0
print("planned", plans[0].device, "peak", memory.peak)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--pool", "2", "--targets", "2", "--per-target", "2", "--tokens", "64"],
        [
            "--budget",
            "5GiB",
            "--targets",
            "3",
            "--per-target",
            "3",
            "--tokens",
            "256",
            "--guests",
            "4",
            "--isolation",
            "0",
        ],
    ],
    ids=["small", "budget"],
)
def test_training_stays_within_the_plan(words: list[str], tmp_path: Path) -> None:
    """SmolLM2 on the eight example documents: anonymous memory at its peak is at most what the plan said, and the plan
    is at most the budget; and the plan is no fantasy, at least a third of it is used."""
    short = ["--collection", "examples", "--conversations", "32", "--steps", "10", "--rotate-every", "4"]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, *short, *words, "--store", str(tmp_path / "store")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    planned, peak = (int(done.stdout.split(f"{word} ")[-1].split()[0]) for word in ("planned", "peak"))
    print(f"{words}: planned {planned / 2**30:.2f} GiB, peak {peak / 2**30:.2f} GiB")
    assert planned / 3 <= peak <= planned
    if "--budget" in words:
        assert planned <= 5 * 2**30
