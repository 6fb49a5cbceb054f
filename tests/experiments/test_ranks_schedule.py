"""The simulation of schedules of several ranks, on a few documents."""

from __future__ import annotations

import json
from pathlib import Path

from experiments.benchmarks import ranks_schedule
from experiments.benchmarks.ranks_schedule import Config, figures, simulate


def test_a_simulation_counts_every_conversation_once() -> None:
    config = Config(documents=60, ranks=3, conversations=32, exchange_every=10)
    found = simulate(config)
    steps = 60 * 32 // (3 * 4 * 8)
    assert found.deals == steps // 10 and sum(found.drawn.values()) == steps * 3 * 4 * 8
    assert min(found.drawn.values()) >= 16 and max(found.drawn.values()) <= 48
    assert all(1 <= len(ranks) <= found.deals for ranks in found.ranks.values())
    table = figures(found)
    assert table["conversations"]["mean"] == 32 and 0.2 < table["pairs_that_met"]["mean"] < 1 - (2 / 3) ** 3
    assert simulate(config) == found


def test_the_command_records_its_figures(tmp_path: Path) -> None:
    words = ["--documents", "24", "--ranks", "2", "--conversations", "8", "--exchange-every", "10"]
    assert ranks_schedule.main([*words, "--output", str(tmp_path / "run")]) == 0
    record = json.loads((tmp_path / "run" / "results.json").read_text())
    assert record["settings"]["documents"] == 24 and record["command"].endswith(" ".join(words) + " --output DIR")
    assert record["figures"]["conversations"]["mean"] == 8
