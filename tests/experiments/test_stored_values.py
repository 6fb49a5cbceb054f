"""What fewer bytes per number lose, measured on an untrained store of a random model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers_commands import call
from helpers_store import make_store

from cas.data.collection import Collection
from cas.model.frozen import FrozenModel
from cas.training.rounds import end_untrained
from experiments.benchmarks import stored_values


def test_both_kinds_of_values_are_compared_with_float32(
    tmp_path: Path, tiny: Callable[..., FrozenModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    monkeypatch.setattr(FrozenModel, "from_pretrained", classmethod(lambda cls, *_, **__: model))
    with make_store(tmp_path / "s", model, Collection.load("million_tokens").select(2)) as store:
        end_untrained(store)
    (tmp_path / "s" / "config.yaml").write_text("collection: million_tokens\ncollection_seed: 0\n")
    before = (tmp_path / "s" / "cartridges.lmdb").read_bytes()
    status, out, err = call(stored_values.main, "--store", str(tmp_path / "s"), "--questions", "2")
    assert status == 0, err
    lines = [line for line in out.splitlines() if "exact match" in line]
    kinds = [[values, arm] for values in ("float32", "bfloat16", "int8") for arm in ("oracle", "loaded2")]
    assert [line.split()[:2] for line in lines] == kinds
    rises = [abs(float(re.findall(r"log-perplexity ([+-][\d.]+)", line)[0])) for line in lines]
    assert rises[:2] == [0, 0] and all(0 < rise < 0.5 for rise in rises[2:])
    assert (tmp_path / "s" / "cartridges.lmdb").read_bytes() == before
