"""The comparison on technical pages, from end to end with a model without sense."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from cas.evaluation import check
from cas.model.frozen import FrozenModel
from experiments.demos import technical_docs
from experiments.demos.technical_docs import ARMS, DocsConfig, load_pages, main

FLAGS = ["--tokens", "16", "--conversations", "8", "--steps", "2", "--pool", "2", "--targets", "2", "--per-target", "2"]


def run(*words: str) -> int:
    return main(["--output", "runs/docs", "--pages", "2", "--questions", "4", *words, "--", *FLAGS])


def test_questions_are_spread_over_the_pages() -> None:
    pages = load_pages(DocsConfig(pages=2, questions=4))
    assert [q.id for q in pages.questions] == [
        "configuration/q1", "configuration/q6", "control_socket/q1", "control_socket/q6",
    ]  # fmt: skip
    assert len(load_pages(DocsConfig()).questions) == 100


def test_a_run_is_recorded_and_resumes(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two short pages, since a tiny model has no room for real ones."""
    asked: list[str] = []
    lines = [
        {"document_ids": [id], "question": f"{w} is it?", "answers": ["red"]} for id in ("lamp", "pump") for w in "ab"
    ]
    Path("asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr(technical_docs, "PAGES", Path("manuals"))
    monkeypatch.setattr(technical_docs, "QUESTIONS", Path("asked.jsonl"))
    monkeypatch.setattr("experiments.common.log_arm", asked.append)
    assert run() == 0
    assert asked == [str(arm) for arm in ARMS]
    folder = Path("runs/docs/results")
    record = json.loads((folder / "results.json").read_text())
    assert record["metrics"]["oracle.contains"]["n"] == 4 and record["measurements"]["training_steps"]["mean"] == 2
    conversations = record["measurements"]["kept_conversations"]["mean"]
    assert conversations >= 8 and record["measurements"]["self_study_min"]["mean"] >= 0
    assert record["command"].endswith("--output DIR -- " + " ".join(FLAGS)) and "commit" in record["settings"]
    assert check.main([str(folder)]) == 0
    capsys.readouterr()
    (folder / "results.json").unlink()
    assert run() == 0 and asked == [str(arm) for arm in ARMS]  # every arm is answered once
    again = json.loads((folder / "results.json").read_text())
    assert again["metrics"] == record["metrics"]
    assert run("--questions", "3") != 0 and "another questions" in capsys.readouterr().err


def test_what_the_experiment_chooses_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert technical_docs.main(["--", "--store", "x"]) != 0
    assert "--store is chosen by this experiment" in capsys.readouterr().err
    assert technical_docs.main(["--questions", "101"]) != 0
    assert "--questions 101: from 1 to 100" in capsys.readouterr().err
