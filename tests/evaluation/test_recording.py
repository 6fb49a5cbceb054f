"""A run is written, checked, tampered with and refused."""

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import cas.evaluation.check
import cas.evaluation.machine
import cas.evaluation.privacy
from cas.errors import ConfigError, RunError, UserError
from cas.evaluation.check import main
from cas.evaluation.metrics import interval, paired_difference
from cas.evaluation.privacy import refuse_private, relative
from cas.evaluation.recording import INTERVAL, is_estimate, read_run, table, write_run

METRICS = ["f1", "exact_match", "log_perplexity"]


@pytest.fixture(autouse=True)
def known_user(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cas.evaluation.privacy.getpass, "getuser", lambda: "jdoe")
    monkeypatch.setattr(cas.evaluation.privacy.socket, "gethostname", lambda: "gpubox7.example.org")
    monkeypatch.delenv("CAS_DATA", raising=False)


def predictions() -> list[dict[str, Any]]:
    """Two arms, two seeds, 12 questions about 4 documents."""
    rng = random.Random(0)
    return [
        {
            "arm": arm,
            "seed": seed,
            "question_id": f"q{question}",
            "document_id": f"d{question % 4}",
            "scores": {
                "f1": rng.random(),
                "exact_match": float(rng.random() < 0.5),
                "log_perplexity": 9 * rng.random(),
            },
            "answer": f"Ventil {question}\u2028\u0085zwei\nZeilen",
        }
        for arm in ("cartridges", "rag")
        for seed in (0, 1)
        for question in range(12)
    ]


def arguments(**changes: Any) -> dict[str, Any]:
    return {
        "name": "equal-budget",
        "command": "python -m cas.report.view --store $CAS_DATA/stores/one --out runs/one",
        "seeds": [0, 1],
        "model": "someone/tiny-llama",
        "collection": {"name": "records", "sha256": "0" * 64},
        "settings": {"k": 4, "ratio": 16.0, "url": "https://example.org/a/b", "rates": ["tokens/s", "1/2"], "x": None},
        "predictions": predictions(),
        "compare": [("cartridges", "rag")],
        "metric_names": METRICS,
        "keep_answers": False,
        **changes,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_run(tmp_path / "run", **arguments())
    return tmp_path / "run"


def edit(run: Path, change) -> None:
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))


def edit_prediction(run: Path, line: int, change) -> None:
    lines = [json.loads(text) for text in (run / "predictions.jsonl").read_text().splitlines()]
    change(lines[line])
    (run / "predictions.jsonl").write_text("".join(json.dumps(text) + "\n" for text in lines))


def test_metrics_follow_from_the_predictions(run: Path) -> None:
    metrics = json.loads((run / "results.json").read_text())["metrics"]
    assert set(metrics) == {f"{row}.{m}" for row in ("cartridges", "rag", "cartridges_minus_rag") for m in METRICS}
    arms = {arm: [p for p in predictions() if p["arm"] == arm] for arm in ("cartridges", "rag")}
    documents = [p["document_id"] for p in arms["rag"]]
    ours, theirs = ([p["scores"]["f1"] for p in arms[arm]] for arm in ("cartridges", "rag"))

    expected = interval(ours, documents)
    assert metrics["cartridges.f1"] == {
        "mean": pytest.approx(100 * sum(ours) / 24),
        "low": pytest.approx(100 * expected.low),
        "high": pytest.approx(100 * expected.high),
        "n": 24,
    }
    expected = paired_difference(ours, theirs, documents)
    assert metrics["cartridges_minus_rag.f1"]["mean"] == pytest.approx(100 * (sum(ours) - sum(theirs)) / 24)
    assert metrics["cartridges_minus_rag.f1"]["low"] == pytest.approx(100 * expected.low)
    nats = [p["scores"]["log_perplexity"] for p in arms["rag"]]
    assert metrics["rag.log_perplexity"]["mean"] == pytest.approx(sum(nats) / 24)


def test_pairs_are_matched_by_seed_and_question_and_not_by_place(tmp_path: Path, run: Path) -> None:
    shuffled = predictions()
    random.Random(1).shuffle(shuffled)
    again = write_run(tmp_path / "shuffled", **arguments(predictions=shuffled))["metrics"]
    for key, figure in json.loads((run / "results.json").read_text())["metrics"].items():
        assert again[key] == pytest.approx(figure)


def test_results_describe_the_run_and_not_its_owner(run: Path) -> None:
    text = (run / "results.json").read_text()
    results = json.loads(text)
    assert results["date"][10:11] == "T" and results["date"].endswith("+00:00")
    assert set(results["hardware"]) == {"cpu", "cores", "memory_gib", "accelerator"}
    assert results["hardware"]["cores"] >= 1 and results["hardware"]["memory_gib"] > 0.1
    assert results["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"cas", "torch", "transformers"} <= set(results["versions"])
    assert results["collection"] == {"name": "records", "sha256": "0" * 64}
    assert results["settings"]["k"] == 4 and results["seeds"] == [0, 1] and results["interval"] == INTERVAL
    assert "jdoe" not in text and "gpubox7" not in text
    assert sorted(p.name for p in run.iterdir()) == ["predictions.jsonl", "results.json"]


def test_accelerator_is_named_when_torch_sees_one(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, current_accelerator=lambda: SimpleNamespace(type="cuda")
    )
    cuda = SimpleNamespace(get_device_name=lambda: "NVIDIA H200")
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(accelerator=accelerator, cuda=cuda))
    assert cas.evaluation.machine.hardware()["accelerator"] == "2 x NVIDIA H200"
    accelerator.is_available = lambda: False
    assert cas.evaluation.machine.hardware()["accelerator"] is None


@pytest.mark.parametrize("keep", [True, False])
def test_answers_are_kept_only_when_asked(tmp_path: Path, keep: bool) -> None:
    given = predictions()
    write_run(tmp_path, **arguments(predictions=given, keep_answers=keep))
    _, written = read_run(tmp_path)
    assert [p.get("answer") for p in written] == [p["answer"] if keep else None for p in given]
    assert [{**p, "answer": None} for p in written] == [{**p, "answer": None} for p in given]
    assert given == predictions()
    assert main([str(tmp_path)]) == 0


def test_an_answer_that_is_no_valid_text_does_not_lose_the_run(tmp_path: Path) -> None:
    given = predictions()
    given[0]["answer"] = "half a \ud83d pair"
    write_run(tmp_path, **arguments(predictions=given, keep_answers=True))
    assert read_run(tmp_path)[1][0]["answer"] == "half a \ud83d pair"


def test_numpy_scores_are_read_back_to_the_same_bits(tmp_path: Path) -> None:
    given = predictions()
    for p in given:
        p["scores"] = {key: np.float32(value) for key, value in p["scores"].items()}
    results = write_run(tmp_path, **arguments(predictions=given))
    assert read_run(tmp_path)[1][0]["scores"]["f1"] == float(given[0]["scores"]["f1"])
    assert read_run(tmp_path)[0] == results
    assert main([str(tmp_path)]) == 0


def test_check_passes_an_honest_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(run)
    assert len(lines) == 1 + 9 and all(line.endswith("  ok") for line in lines[1:])


def test_check_names_what_a_changed_score_moves(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_prediction(run, 30, lambda p: p["scores"].update(f1=1 - p["scores"]["f1"]))
    assert main([str(run)]) == 1
    differing = {line.split()[0] for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line}
    assert differing == {"rag.f1", "cartridges_minus_rag.f1"}


@pytest.mark.parametrize(("part", "by"), [("mean", 2e-6), ("low", -2e-6), ("high", 0.5), ("n", 1)])
def test_check_names_a_changed_metric(run: Path, capsys: pytest.CaptureFixture[str], part: str, by: float) -> None:
    def change(results: dict) -> None:
        results["metrics"]["rag.exact_match"][part] += by

    edit(run, change)
    assert main([str(run)]) == 1
    differing = [line for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line]
    assert len(differing) == 1 and differing[0].split()[:3] == ["rag.exact_match", "DIFFERS", part]


def test_rounding_below_the_tolerance_is_no_difference(run: Path) -> None:
    edit(run, lambda results: results["metrics"]["rag.f1"].update(mean=results["metrics"]["rag.f1"]["mean"] + 5e-7))
    assert main([str(run)]) == 0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda metrics: metrics.pop("rag.f1"), "rag.f1"),
        (lambda metrics: metrics.update({"full.f1": {"mean": 1, "low": 1, "high": 1, "n": 1}}), "full.f1"),
        (lambda metrics: metrics["rag.f1"].update(mean=math.nan), "rag.f1"),
        (lambda metrics: metrics["rag.f1"].update(low="1"), "rag.f1"),
        (lambda metrics: metrics["rag.f1"].pop("high"), "rag.f1"),
    ],
)
def test_check_names_missing_added_and_malformed_metrics(run: Path, capsys, change, named: str) -> None:
    edit(run, lambda results: change(results["metrics"]))
    assert main([str(run)]) == 1
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines() if "DIFFERS" in line] == [named]


def delete_line(run: Path, line: int) -> None:
    lines = (run / "predictions.jsonl").read_text().splitlines(keepends=True)
    (run / "predictions.jsonl").write_text("".join(lines[:line] + lines[line + 1 :]))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda run: (run / "results.json").unlink(), "results.json is missing"),
        (lambda run: (run / "predictions.jsonl").unlink(), "predictions.jsonl is missing"),
        (lambda run: (run / "predictions.jsonl").write_text(""), "predictions.jsonl line 1 is not JSON"),
        (lambda run: (run / "results.json").write_text("{"), "results.json is not JSON"),
        (lambda run: (run / "results.json").write_text("[]"), "results.json is not a JSON object"),
        (lambda run: (run / "results.json").write_bytes(b"\xff"), "results.json cannot be read"),
        (lambda run: edit(run, lambda r: r.pop("model")), "results.json: lacks model"),
        (lambda run: edit(run, lambda r: r.update(hardware="fast")), "hardware must be a dict"),
        (lambda run: edit(run, lambda r: r.update(metric_names=[{}])), "metric_names must be strings"),
        (lambda run: edit(run, lambda r: r.update(compare=[[{}, "rag"]])), "compare must be pairs"),
        (lambda run: edit(run, lambda r: r["collection"].update(sha256="abc")), "sha256 must be 64 hex digits"),
        (lambda run: edit(run, lambda r: r["interval"].update(level=0.5)), "interval must be"),
        (lambda run: edit(run, lambda r: r["measurements"].update(s=3)), "measurement s"),
        (lambda run: edit(run, lambda r: r.update(seeds=[0])), "seed 1 is not among"),
        (lambda run: edit_prediction(run, 3, lambda p: p.pop("document_id")), "prediction 4: document_id"),
        (lambda run: edit_prediction(run, 3, lambda p: p["scores"].pop("f1")), "has no score f1"),
        (lambda run: edit_prediction(run, 3, lambda p: p["scores"].update(f1="1")), "f1 must be a finite number"),
        (lambda run: edit_prediction(run, 3, lambda p: p.update(question_id="q2")), "is there twice"),
        (lambda run: delete_line(run, 3), "cartridges lacks seed 0, question q3"),
        (lambda run: delete_line(run, 47), "rag lacks seed 1, question q11"),
    ],
)
def test_a_broken_run_is_one_clear_line(run: Path, capsys: pytest.CaptureFixture[str], spoil, says: str) -> None:
    spoil(run)
    assert main([str(run)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert says in output.err and output.err.startswith(f"{run}: ") and output.err.count("\n") == 1


def test_all_runs_are_checked_and_one_bad_run_fails_them(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(cas.evaluation.check, "RESULTS", tmp_path)
    assert main([]) == 0
    assert "nothing to check" in capsys.readouterr().out
    for name in ("a", "b"):
        write_run(tmp_path / "claim" / name, **arguments())
    assert main([]) == 0
    (tmp_path / "claim" / "a" / "results.json").unlink()
    assert main([]) == 1
    output = capsys.readouterr()
    assert "a: results.json is missing" in output.err
    assert output.out.splitlines()[-10] == str(tmp_path / "claim" / "b")


def test_the_command_line_leaves_with_its_status(run: Path) -> None:
    def status(*args: str) -> int:
        command = [sys.executable, "-m", "cas.evaluation.check", *args]
        return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, check=False).returncode

    assert status(str(run)) == 0
    assert status(str(run), str(run / "elsewhere")) == 1
    assert status("--nonsense") == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"command": "python -m cas.report.view --out /data/runs"},
        {"command": "python -m cas.report.view --out=/data"},
        {"command": "/usr/bin/python x.py"},
        {"settings": {"store": {"paths": ["ok", "/srv/x"]}}},
        {"settings": {"/srv/x": 1}},
        {"settings": {"url": "file:///srv/x"}},
        {"settings": {"path": '"//srv/x"'}},
        {"settings": {"cache": "/.cache"}},
        {"model": "/models/llama"},
        {"settings": {"by": "jdoe's machine"}},
        {"settings": {"on": "gpubox7_fast"}},
        {"command": "ssh gpubox7.example.org python x.py"},
        {"extra_metrics": {"jdoe.seconds": {"mean": 1, "low": 1, "high": 1, "n": 1}}},
    ],
)
def test_paths_and_names_of_this_machine_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"absolute path|name of this user or machine"):
        write_run(tmp_path / "run", **arguments(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "text",
    [
        "--store $CAS_DATA/x/y --out=$CAS_DATA/x",
        "runs/x ./x ../x",
        "org/model",
        "3 tokens/s, 1/2, a / b",
        "see https://x.org/y/z",
        "jdoes",
        "xgpubox7",
        "root",
    ],
)
def test_harmless_strings_pass(text: str) -> None:
    refuse_private({"settings": [text]})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"predictions": []}, "at least one prediction"),
        ({"metric_names": []}, "at least one prediction and one metric"),
        ({"metric_names": ["contains"]}, "has no score contains"),
        ({"seeds": [0]}, "seed 1 is not among"),
        ({"compare": [("cartridges", "full")]}, "no predictions of full"),
        ({"collection": {"name": "records"}}, "collection must be"),
        ({"settings": {"x": Path("x")}}, "cannot be written as JSON"),
        ({"settings": {"x": math.nan}}, "cannot be written as JSON"),
        ({"extra_metrics": {"seconds": {"mean": 1.0}}}, "measurement seconds"),
        ({"extra_metrics": {"seconds": {"mean": math.inf, "low": 0, "high": 0, "n": 1}}}, "measurement seconds"),
    ],
)
def test_mistakes_write_nothing(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        write_run(tmp_path / "run", **arguments(**changes))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda p: p["scores"].update(f1=57.0), "f1 must be from 0 to 1"),
        (lambda p: p["scores"].update(log_perplexity=math.inf), "log_perplexity must be a finite number"),
        (lambda p: p.update(f1=0.5), "unknown field f1"),
        (lambda p: p.update(arm="rag.k4"), "arm 'rag.k4' must be"),
        (lambda p: p.update(arm="a_minus_b"), "without '_minus_'"),
        (lambda p: p.update(question_id=7), "question_id must be a str"),
        (lambda p: p.update(answer=["x"]), "answer must be a str"),
        (lambda p: p.update(document_id="d9"), "question q2 is about d9 and d2"),
        (lambda p: p.update(question_id="new"), "lacks seed 0, question"),
    ],
)
def test_bad_predictions_are_named(tmp_path: Path, change, says: str) -> None:
    given = predictions()
    change(given[2])
    with pytest.raises(UserError, match=says):
        write_run(tmp_path / "run", **arguments(predictions=given))
    assert not (tmp_path / "run").exists()


def test_measurements_stand_apart_and_are_not_recomputed(tmp_path: Path) -> None:
    seconds = {"mean": 12.5, "low": 12.0, "high": 13.0, "n": 3}
    results = write_run(tmp_path, **arguments(extra_metrics={"cartridges.seconds": seconds}))
    assert results["measurements"] == {"cartridges.seconds": seconds}
    assert "cartridges.seconds" not in results["metrics"]
    assert main([str(tmp_path)]) == 0


def test_a_run_that_dies_while_it_is_written_cannot_pass(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.replace

    def dies(source: str, target: Path) -> None:
        if target.name == "results.json":
            raise OSError("disk full")
        real(source, target)

    monkeypatch.setattr(cas.evaluation.recording.os, "replace", dies)
    with pytest.raises(OSError, match="disk full"):
        write_run(run, **arguments())
    assert [p.name for p in run.iterdir()] == ["predictions.jsonl"]
    with pytest.raises(RunError, match="missing"):
        read_run(run)


def test_relative_maps_data_and_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home, data = tmp_path / "home", tmp_path / "data"
    (data / "inner").mkdir(parents=True)
    home.mkdir()
    monkeypatch.chdir(home)
    assert relative("runs/one") == relative(home / "runs" / "one") == "runs/one"
    assert relative(home) == "."
    with pytest.raises(ConfigError, match="CAS_DATA"):
        relative(data / "x")
    monkeypatch.setenv("CAS_DATA", str(data))
    assert relative(data / "x" / "y") == relative("../data/x/y") == "$CAS_DATA/x/y"
    assert relative(data) == "$CAS_DATA"
    with pytest.raises(ConfigError, match="neither"):
        relative(tmp_path / "database")
    (home / "link").symlink_to(data)
    assert relative("link/x") == "link/x"
    (tmp_path / "other").symlink_to(data)
    assert relative(tmp_path / "other" / "x") == "$CAS_DATA/x"
    for path in (home / "runs", data / "x"):
        refuse_private(relative(path))


def test_table_by_hand() -> None:
    def figure(mean: float) -> dict[str, float]:
        return {"mean": mean, "low": mean - 1, "high": mean + 1, "n": 5}

    results = {
        "metrics": {"rag.f1": figure(50.04), "rag.log_perplexity": figure(2.0), "a_minus_rag.f1": figure(-3)},
        "measurements": {"rag.seconds": figure(7.0)},
    }
    assert table(results, ["rag", "a_minus_rag"], ["f1", "log_perplexity", "seconds"]) == (
        "| arm         | f1 (%)            | log_perplexity (nats) | seconds              |\n"
        "|-------------|-------------------|-----------------------|----------------------|\n"
        "| rag         | 50.0 [49.0, 51.0] | 2.000 [1.000, 3.000]  | 7.000 [6.000, 8.000] |\n"
        "| a_minus_rag | -3.0 [-4.0, -2.0] | -                     | -                    |\n"
    )
    with pytest.raises(UserError, match="no figures for bag"):
        table(results, ["rag", "bag"], ["f1"])
    with pytest.raises(UserError, match="no figures for f2"):
        table(results, ["rag"], ["f1", "f2"])


def test_is_estimate() -> None:
    good = {"mean": 1.0, "low": 0, "high": 2.5, "n": 3}
    assert is_estimate(good)
    for bad in ({**good, "n": 0}, {**good, "n": 1.5}, {**good, "low": math.nan}, {**good, "more": 1}, {}, None, [1]):
        assert not is_estimate(bad)
