"""What the commands say and do about models: moved ones, revisions, sliding windows."""

from __future__ import annotations

from typing import Any

import pytest
from conftest import tiny_model
from helpers_commands import TRAIN, call

from cas import query, train
from cas.model.frozen import FrozenModel
from cas.store.store import Store


def recorded_calls(monkeypatch: pytest.MonkeyPatch, model: FrozenModel) -> list[tuple[str, str | None]]:
    """Names and revisions that models are loaded by, from now on."""
    calls: list[tuple[str, str | None]] = []

    def load(cls: type, name: str, *, revision: str | None = None, **_: Any) -> FrozenModel:
        calls.append((name, revision))
        return model

    monkeypatch.setattr(FrozenModel, "from_pretrained", classmethod(load))
    return calls


def test_query_takes_a_model_that_has_moved(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(train.main, *TRAIN)[0] == 0
    calls = recorded_calls(monkeypatch, manuals)
    question = ("--store", "runs/manuals", "--documents", "pump", "--max-new-tokens", "2", "Which valve?")
    assert call(query.main, *question)[0] == 0
    assert call(query.main, "--model", "elsewhere/tiny", "--revision", "r2", *question)[0] == 0
    assert calls == [("tiny-llama", None), ("elsewhere/tiny", "r2")]
    recorded_calls(monkeypatch, tiny_model("llama", seed=1))
    status, _, error = call(query.main, "--model", "elsewhere/other", *question)
    assert status == 2 and "open it with the model it was made with" in error


def test_the_revision_stays(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manuals, "source", type(manuals.source)("hub", "a/b", "r1"))
    assert call(train.main, *TRAIN)[0] == 0
    calls = recorded_calls(monkeypatch, manuals)
    for more in ((), ("--model", "a/b"), ("--model", "a/b", "--revision", "r2"), ("--model", "c/d")):
        assert call(train.main, *TRAIN, *more)[0] == 0
    assert calls == [("a/b", "r1"), ("a/b", "r1"), ("a/b", "r2"), ("c/d", None)]


def test_training_goes_on_from_a_store_of_an_earlier_version(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as before:
        before.setattr(FrozenModel, "fingerprint", property(lambda model: model.legacy_fingerprint))
        assert call(train.main, *TRAIN)[0] == 0
    with Store.open("runs/manuals") as store:
        assert store.meta["model"]["fingerprint"] == manuals.legacy_fingerprint != manuals.fingerprint
    assert call(train.main, *TRAIN)[0] == 0
    assert call(query.main, "--store", "runs/manuals", "--documents", "pump", "--max-new-tokens", "2", "Why?")[0] == 0


def test_the_plan_names_layers_that_never_see_a_cartridge(
    manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--collection", "manuals", "--store", "runs/other", "--dry-run")
    recorded_calls(monkeypatch, tiny_model("gemma3"))
    near = call(train.main, *options, "--tokens", "8")
    far = call(train.main, *options, "--tokens", "8", "--span", "64")
    assert near[0] == far[0] == 0
    assert "sliding windows" not in near[2] + near[1]
    assert "cartridges are out of sight of layers 0, 2, whose sliding windows have 24 positions" in far[2] + far[1]
