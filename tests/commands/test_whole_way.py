"""From a folder to an answer: the README's Python, and the command lines, on a tiny model whose writer is replaced."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers_commands import TRAIN, call

from cas import __main__ as tool
from cas import console, query, train
from cas.model.frozen import FrozenModel
from cas.store.store import Store
from retrieval import HashEmbedder

ROOT = Path(__file__).parents[2]


def test_the_python_of_the_readme_runs(manuals: FrozenModel) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    out = io.StringIO()
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), names)
    store = names["store"]
    assert set(store.rows()) == {"lamp", "pump", "tide", "valve"} and all(r.steps for r in store.rows().values())
    spoken = names["model"].answer_text(names["answer"].tolist())
    assert len(names["answer"]) and spoken in out.getvalue() and store.verify() == []


def test_a_folder_in_and_answers_out(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    status, out, err = call(train.main, *TRAIN)
    assert status == 0, err
    assert "empty.txt" in err and "documents   4" in out and "trained     4 of 4 cartridges" in out
    lines = [json.loads(line) for line in Path("runs/manuals/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(12)) and lines[-1]["rotations"] == 3

    status, out, err = call(query.main, "Which valve?", "--retrieve-k", "2", "--json", "--max-new-tokens", "5")
    assert status == 0 and "newest under runs/" in err
    found = json.loads(out)
    assert set(found) == {"question", "answer", "cartridges", "tokens", "bytes", "timings"}
    assert len(found["cartridges"]) == 2 and set(found["cartridges"][0]) == {"id", "title", "score", "attention"}
    assert set(found["tokens"]) == {"cartridge", "prompt", "answer"} and found["tokens"]["cartridge"] == 32
    assert set(found["timings"]) == {"retrieve_s", "load_s", "prefill_s", "decode_s"}
    assert all(0 <= c["attention"] <= 1 for c in found["cartridges"])

    status, out, _ = call(query.main, "Which?", "--documents", "pump,tide", "--max-new-tokens", "5")
    assert status == 0 and "of the attention  pump  (The pump)" in out and "MiB of KV" in out
    assert call(query.main, "Which?", "--documents", "pumps")[0] == 2
    monkeypatch.setattr("sys.stdin", io.StringIO("First?\nSecond?\n\nThird?\n"))
    status, out, _ = call(query.main, "--documents", "pump", "--json", "--max-new-tokens", "3")
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["First?", "Second?", "Third?"]

    rows = json.loads(call(tool.main, "ls", "--json")[1])
    assert [row["id"] for row in rows] == ["lamp", "pump", "tide", "valve"]
    assert json.loads(call(tool.main, "show", "--json")[1])["step"] == 12
    assert call(tool.main, "verify")[0] == 0
    assert call(tool.main, "export", "pump", "pump.safetensors")[0] == 0 and Path("pump.safetensors").exists()
    assert call(tool.main, "export", "pump", "pump.bin")[0] == 2


def test_a_refused_run_changes_nothing(manuals: FrozenModel) -> None:
    """Another collection under the store's name, other settings, more self-study than it was begun with."""

    assert call(train.main, *TRAIN)[0] == 0
    folder = Path("runs/manuals")

    def state() -> tuple[object, ...]:
        store = Store.open(folder)
        found = store.rows(), store.run_state(), sorted(p.name for p in (folder / "conversations").iterdir())
        store.close()
        return found

    before = state()
    for words, told in (
        (["--span", "32"], "span 16 (now 32)"),
        (["--tokens", "32"], "tokens 16 (now 32)"),
        (["--positions", "offset"], "positions fixed (now offset)"),
        (["--lr", "0.5"], "lr 0.01 (now 0.5)"),
        (["--conversations", "4000"], "is trained on"),
        (["--kinds", "gossip"], "unknown kinds of seed prompt: gossip"),
        (["--questions-per-call", "0"], "--questions-per-call 0: at least 1"),
        (["--conversations", "-5"], "--conversations -5: at least 1"),
        (["--steps", "-3"], "--steps -3: at least 0"),
        (["--ratio", "8"], "either as --tokens or as --ratio"),
        (["--documents", "2"], "was trained with another --documents: 2 of its documents are missing"),
        (["--dry-run", "--span", "18"], "--span 18: a multiple of 4"),
        (["--dry-run", "--span", "32"], "span 16 (now 32)"),
        (["--dry-run", "--lr", "0.5"], "lr 0.01 (now 0.5)"),
    ):
        status, _, err = call(train.main, *TRAIN, *words)
        assert (status, err.count("cas: ")) == (2, 1) and told in err, (words, err)
        assert state() == before, words


def test_another_effort_than_the_store_was_trained_with_is_refused(manuals: FrozenModel) -> None:
    words = [w for w in TRAIN if w not in ("--steps", "12", "--conversations", "40")]
    assert call(train.main, *words, "--effort", "quick")[0] == 0
    saved = yaml.safe_load(Path("runs/manuals/config.yaml").read_text())
    assert (saved["effort"], saved["epochs"], saved["wordings"], saved["conversations"]) == ("quick", 1.0, 1, None)
    assert call(train.main, "--config", "runs/manuals/config.yaml")[0] == 0
    status, _, err = call(train.main, *words, "--effort", "thorough")
    assert status == 2 and err.count("cas: ") == 1 and "was begun with epochs 1.0 (now 8.0)" in err
    assert "go on with the same settings, --effort included, or give a new --store" in err


def test_matched_starts_from_the_command_line(manuals: FrozenModel) -> None:

    words = [*TRAIN, "--initialisation", "matched", "--store", "runs/matched", "--steps", "0"]
    status, _, err = call(train.main, *words)
    assert status == 0, err
    store = Store.open("runs/matched")
    assert {row.version for row in store.rows().values() if row.tokens > row.p} == {1}
    store.close()
    status, _, err = call(
        query.main, "Which?", "--documents", "pump", "--store", "runs/matched", "--max-new-tokens", "3"
    )
    assert status == 0 and "not trained yet" not in err  # no steps were asked for


def test_a_slip_of_the_pen_is_pointed_out(manuals: FrozenModel) -> None:
    status, _, err = call(train.main, "--collection", "milion_tokens")
    assert status == 2 and "did you mean million_tokens?" in err
    status, _, err = call(train.main, "--collection", "manuals", "--collection-seed", "3")
    assert status == 2 and "--collection-seed is for" in err


def test_mistakes_leave_no_half_made_store(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from retrieval import EmbedderUnavailable

    def missing(name: str) -> HashEmbedder:
        raise EmbedderUnavailable(f"{name}: no such embedder")

    assert call(train.main, *TRAIN, "--kinds", "gossip")[0] == 2
    monkeypatch.setattr("retrieval.SentenceEmbedder", missing)
    status, _, err = call(train.main, *TRAIN, "--embedder", "none/such")
    assert status == 2 and err.splitlines()[-1] == "cas: none/such: no such embedder"
    assert not Path("runs").exists()


def test_the_saved_configuration_can_be_given_again(manuals: FrozenModel) -> None:
    assert call(train.main, *TRAIN, "--positions", "offset", "--store", "runs/a")[0] == 0
    status, _, err = call(train.main, "--config", "runs/a/config.yaml")
    assert status == 0, err
    status, _, err = call(train.main, "--config", "runs/a/config.yaml", "--positions", "fixed")
    assert status == 2 and "positions offset (now fixed)" in err


def test_piped_questions(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("First?\n\n  \nSecond?\n"))
    status, out, _ = call(query.main, "--documents", "pump", "--max-new-tokens", "3")
    assert status == 0 and [line for line in out.splitlines() if line.endswith("?")] == ["First?", "Second?"]
    monkeypatch.setattr("sys.stdin", io.StringIO("First?\nSecond?\n"))
    status, out, err = call(query.main, "--retrieve-k", "0", "--json")
    assert (status, out, err) == (2, "", "cas: --retrieve-k 0: at least 1\n")
    assert call(query.main, "Which?", "--max-new-tokens", "0")[0] == 2


def test_a_dry_run_writes_nothing(manuals: FrozenModel) -> None:
    status, out, _ = call(train.main, *TRAIN, "--dry-run")
    assert status == 0 and "device" in out and "disk" in out and not Path("runs").exists()


def test_a_budget_too_small_is_refused_with_figures(manuals: FrozenModel) -> None:
    status, _, err = call(train.main, *TRAIN, "--budget", "10MiB")
    assert status == 2 and "10.0 MiB" in err and err.count("cas: ") == 1 and not Path("runs").exists()


def test_interrupted_training_goes_on_by_the_printed_command(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cas.training.trainer import Trainer

    whole = call(train.main, *TRAIN, "--store", "runs/whole")
    step, stopping = Trainer.train_step, console.Interrupt()
    monkeypatch.setattr(console, "Interrupt", lambda: stopping)

    def interrupted(self: Trainer, number: int, work: Any) -> Any:
        if number == 5:
            stopping.signal = 2
        return step(self, number, work)

    def stopped_at_once(self: Trainer, number: int, work: Any) -> Any:
        raise KeyboardInterrupt  # as a second Ctrl-C does

    monkeypatch.setattr(Trainer, "train_step", stopped_at_once)
    status, _, err = call(train.main, *TRAIN, "--store", "runs/cut")
    assert status == 130 and "interrupted at once; go on with:\n  python -m cas.train --collection manuals" in err
    monkeypatch.setattr(Trainer, "train_step", interrupted)
    status, _, err = call(train.main, *TRAIN, "--store", "runs/cut")
    assert status == 130 and "go on with:\n  python -m cas.train --collection manuals" in err and whole[0] == 0
    monkeypatch.setattr(Trainer, "train_step", step)
    stopping.signal = None
    assert call(train.main, *TRAIN, "--store", "runs/cut")[0] == 0

    stores = [Store.open(f"runs/{name}") for name in ("whole", "cut")]
    for name in stores[0].rows():
        assert torch.equal(*(s.cartridge(name) for s in stores))
    for store in stores:
        store.close()
    status, _, err = call(train.main, *TRAIN, "--store", "runs/cut", "--lr", "0.5")
    assert status == 2 and "lr 0.01 (now 0.5)" in err


def test_merging_makes_one_cartridge(manuals: FrozenModel) -> None:
    status, _, err = call(train.main, *TRAIN, "--merge", "--store", "runs/one")
    assert status == 0, err
    assert [row["id"] for row in json.loads(call(tool.main, "ls", "--json", "--store", "runs/one")[1])] == [
        "collection"
    ]
