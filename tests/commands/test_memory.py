"""Memory is a promise: what self-study, initialization and training really take, against the plan."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cas.options import DEFAULT_MODEL, READER
from experiments.benchmarks.memory import PHASES, measure

GIB = 2**30
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads the resident set's peak from /proc")


def check(figures: dict[str, int]) -> None:
    """The plan is never exceeded, and not much more than needed: 1.3 times where it is more than twice the runtime."""
    peak = max(figures[phase] for phase in PHASES)
    print({name: f"{size / GIB:.2f} GiB" for name, size in figures.items()})
    assert peak <= figures["plan"]
    assert figures["plan"] <= (1.3 * peak if figures["plan"] > 1.5 * GIB else peak + 0.5 * GIB)


@linux
def test_two_sentences_with_the_reader(tmp_path: Path) -> None:
    check(measure(tmp_path, "two sentences", READER, "--steps", "3", "--keep-going"))


@linux
@pytest.mark.slow
def test_pages_with_the_reader(tmp_path: Path) -> None:
    check(measure(tmp_path, "six pages", READER, "--steps", "30", "--keep-going"))


@linux
@pytest.mark.slow
@pytest.mark.parametrize("case", ["two sentences", "six pages"])
def test_a_real_model(case: str, tmp_path: Path) -> None:
    check(measure(tmp_path, case, DEFAULT_MODEL, "--conversations", "16", "--steps", "3"))


@linux
@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["--pool", "2", "--targets", "2", "--per-target", "2", "--tokens", "64"],
        ["--budget", "2.4GiB", "--targets", "3", "--per-target", "3", "--tokens", "256", "--guests", "4", "--isolation", "0"],
    ],
    ids=["small", "budget"],
)  # fmt: skip
def test_a_real_model_stays_within_plan_and_budget(words: list[str], tmp_path: Path) -> None:
    options = ["--conversations", "16", "--steps", "10", "--rotate-every", "4", *words]
    figures = measure(tmp_path, "six pages", DEFAULT_MODEL, *options)
    assert max(figures[phase] for phase in PHASES) <= figures["plan"] <= 2.4 * GIB
