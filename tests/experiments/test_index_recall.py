"""The recall of the approximate index, measured on a few vectors."""

from __future__ import annotations

from pathlib import Path

from cas.evaluation.check import check_run
from cas.evaluation.recording import read_run
from experiments.benchmarks import index_recall


def test_recall_is_that_of_the_exact_search(tmp_path: Path) -> None:
    words = ["--rows", "3000", "--centers", "40", "--questions", "20", "--output", str(tmp_path)]
    assert index_recall.main(words) == 0
    assert not [complaint for _, complaint in check_run(tmp_path) if complaint]
    metrics = read_run(tmp_path)[0]["metrics"]
    for kind in ("near", "noise"):
        assert all(metrics[f"exact_{kind}.recall_{top}"]["mean"] == 1 for top in index_recall.TOPS)
        assert 0.5 < metrics[f"approximate_{kind}.recall_10"]["mean"] <= 1
    assert metrics["approximate_near.recall_1"]["mean"] > 0.95
