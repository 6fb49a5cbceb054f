"""Cartridges as one cache for plain transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_cartridges
from helpers_store import make_store

import cas
from cas.answering.compose import Composed
from cas.data.collection import Collection
from cas.errors import CollectionError, ModelError, StoreMismatch
from cas.model.decoding import Prompt, generate
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout, Positions

POLICIES: tuple[Positions, ...] = ("fixed", "offset", "sequential")
SIZES = {"a": 16, "b": 48, "c": 32}
SPAN = 48


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("loaded", [("b",), ("b", "a"), ("c", "a", "b"), ()])
def test_plain_transformers_generates_the_same(
    kind: str, policy: Any, loaded: tuple[str, ...], tiny: Callable[..., FrozenModel]
) -> None:
    model = tiny(kind)
    cartridges, layout = tiny_cartridges(model, SIZES), Layout(policy, model.layout_header, SPAN)
    question = "Which valve is red, and why?"
    ours = generate(model, [Prompt(model.question_tokens(question), loaded)], cartridges, layout, max_new_tokens=24)[0]
    composed = Composed(model, layout, {name: cartridges[name] for name in loaded})
    for _ in range(2):  # a prompt can be made again and again
        inputs = composed.prompt(question)
        output = model.hf.generate(**inputs, do_sample=False, max_new_tokens=24)[
            0, inputs["input_ids"].shape[1] :
        ].tolist()
        assert output[: len(ours.ids)] == ours.ids
        assert len(output) == len(ours.ids) + ours.finished
    assert model.hf.config._attn_implementation == "sdpa"
    assert composed.ids == loaded and composed.kv.shape[3] == model.layout_header + sum(SIZES[name] for name in loaded)


@pytest.mark.parametrize("kind", ["mistral", "gemma3"])
def test_plain_transformers_is_refused_for_sliding_windows(kind: str, tiny: Callable[..., FrozenModel]) -> None:
    model = tiny(kind)
    composed = Composed(model, Layout("fixed", model.layout_header, SPAN), tiny_cartridges(model, {"a": 16}))
    with pytest.raises(ModelError, match="sliding windows"):
        composed.prompt("Which valve?")


def test_compose_reads_cartridges_from_a_store(
    tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection
) -> None:
    model = tiny("llama")
    with make_store(tmp_path / "s", model, collection) as store:
        composed = cas.compose(model, store, ["pump", "lamp"])
        header = model.layout_header
        assert composed.ids == ("pump", "lamp") and composed.kv.shape[3] == header + 32
        assert torch.equal(composed.kv[:, :, :, header : header + 16], store.cartridge("pump"))
        assert torch.equal(composed.kv[:, :, :, header + 16 :], store.cartridge("lamp"))
        with pytest.raises(StoreMismatch, match="not with tiny-qwen3"):
            cas.compose(tiny("qwen3"), store, ["pump"])
        with pytest.raises(CollectionError, match="has no cartridge 'pomp'"):
            cas.compose(model, store, ["pomp"])
