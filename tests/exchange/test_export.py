"""Cartridges in the formats of other libraries, read back with these libraries and compared with our own attention."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import tiny_cartridges, tiny_hf
from helpers_commands import call
from helpers_exchange import QUESTION, SIZES, sized_store
from safetensors import safe_open
from safetensors.torch import load_file

from cas import __main__ as tool
from cas.exchange.formats import export
from cas.model.decoding import Prompt, generate
from cas.model.frozen import FrozenModel
from cas.store.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """``make(model, positions)``: a store with three cartridges, under ``s-<positions>``."""
    stores: list[Store] = []

    def made(model: FrozenModel, positions: str = "fixed") -> Store:
        stores.append(sized_store(tmp_path / f"s-{positions}", model, positions))
        return stores[-1]

    yield made
    for store in stores:
        store.close()


def hf_logits(model: FrozenModel, store: Store, ids: tuple[str, ...]) -> torch.Tensor:
    """Logits [T, V] of the question's tokens behind our composed cache, at our positions, by plain transformers."""
    from cas.answering.compose import compose

    inputs = compose(model, store, ids).prompt(QUESTION)
    n = inputs["past_key_values"].get_seq_length()
    with torch.no_grad():
        return model.hf(
            input_ids=inputs["input_ids"][:, n:], attention_mask=inputs["attention_mask"],
            position_ids=inputs["position_ids"][:, n:], past_key_values=inputs["past_key_values"],
        ).logits[0]  # fmt: skip


LOADED = [("lamp",), ("crane",), ("crane", "lamp", "ferry")]


@pytest.mark.parametrize("positions", ["fixed", "offset", "sequential"])
@pytest.mark.parametrize("ids", LOADED, ids="+".join)
def test_peft_answers_as_we_do(
    positions: str, ids: tuple[str, ...], model: FrozenModel, make: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    store = make(model, positions)
    lines = export(store, ids, tmp_path / "adapter", "peft", lambda _: model)
    gap = positions == "fixed" and ids != ("lamp",)
    assert len(lines) == 1 + gap and (not gap or "all keys are shifted by" in lines[1])
    adapted = peft.PeftModel.from_pretrained(tiny_hf("llama"), str(tmp_path / "adapter"))
    config = adapted.peft_config["default"]
    assert config.peft_type == "CARTRIDGE" and config.base_model_name_or_path == "tiny-llama"
    assert config.num_frozen_tokens == model.layout_header
    assert config.num_virtual_tokens == model.layout_header + sum(SIZES[i] for i in ids)
    tokens = torch.tensor([model.question_tokens(QUESTION)])
    with torch.no_grad():
        theirs = adapted(input_ids=tokens).logits[0]
    ours = hf_logits(model, store, ids)
    assert torch.allclose(theirs, ours, atol=2e-5 * float(ours.abs().max()))
    with torch.no_grad():  # or the comparison would show nothing
        assert not torch.allclose(tiny_hf("llama")(input_ids=tokens).logits[0], ours, atol=0.1)


def test_an_adapter_is_the_stored_values_bit_for_bit(model: FrozenModel, make: Any, tmp_path: Path) -> None:
    store = make(model, "offset")
    export(store, ["ferry", "crane"], tmp_path / "adapter", "peft", lambda _: model)
    rows = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"]
    layers, heads, dimension = (getattr(model.geometry, n) for n in ("layers", "kv_heads", "head_dim"))
    assert rows.dtype == torch.float32 and rows.shape == (model.layout_header + 20, 2 * layers * heads * dimension)
    view = rows.view(-1, 2 * layers, heads, dimension)
    for layer in range(layers):
        for part in range(2):
            at = view[model.layout_header :, 2 * layer + part].transpose(0, 1)
            assert torch.equal(at[:, :12], store.cartridge("ferry")[layer, part])
            assert torch.equal(at[:, 12:], store.cartridge("crane")[layer, part])
            assert torch.equal(
                view[: model.layout_header, 2 * layer + part], model.header_kv[layer, part].transpose(0, 1)
            )


def page_snippet(heading: str) -> str:
    """The first Python block below a heading of docs/exchange.md."""
    page = (ROOT / "docs" / "exchange.md").read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    return block[1]


@pytest.mark.parametrize("positions", ["fixed", "sequential"])
@pytest.mark.parametrize("ids", LOADED[1:], ids="+".join)
def test_the_snippet_for_transformers_generates_as_we_do(
    positions: str, ids: tuple[str, ...], model: FrozenModel, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = make(model, positions)
    export(store, ids, tmp_path / "prefix.safetensors", "transformers", lambda _: model)
    about = json.loads((tmp_path / "prefix.json").read_text())
    assert about["model"] == "tiny-llama" and about["ids"] == list(ids) and about["fingerprint"] == model.fingerprint
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"model": model.hf, "tokenizer": model.tokenizer, "question": QUESTION}
    exec(page_snippet("transformers"), names)
    cartridges = {i: store.cartridge(i) for i in ids}
    ours = generate(model, [Prompt(model.question_tokens(QUESTION), ids)], cartridges, store.layout, max_new_tokens=64)[
        0
    ]
    theirs = names["output"][0, names["n"] + len(model.question_tokens(QUESTION)) :].tolist()
    assert theirs[: len(ours.ids)] == ours.ids and len(theirs) == len(ours.ids) + ours.finished
    assert names["answer"].startswith(model.tokenizer.decode(ours.ids[:3]))


def test_the_snippet_for_peft_runs(model: FrozenModel, make: Any, tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("peft")
    store = make(model, "offset")
    export(store, ["crane", "lamp"], tmp_path / "adapter", "peft", lambda _: model)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: tiny_hf("llama"))
    names: dict[str, Any] = {"ids": list(model.question_tokens(QUESTION))}
    exec(page_snippet("peft"), names)
    cartridges = {i: store.cartridge(i) for i in ("crane", "lamp")}
    prompt = Prompt(model.question_tokens(QUESTION), ("crane", "lamp"))
    ours = generate(model, [prompt], cartridges, store.layout, max_new_tokens=1)[0].ids
    assert names["logits"][0, -1].argmax().item() == ours[0]


def test_tokasaurus_gets_lists_of_fixed_and_trainable_rows(model: FrozenModel, make: Any, tmp_path: Path) -> None:
    store = make(model, "offset")
    kv = tiny_cartridges(model, {"crane": -model.layout_header % 16 + 16})["crane"]  # so that pages are full
    store.write_tensors("crane", {"kv": kv})
    store.commit(store.rows(), None)
    assert [*export(store, ["crane"], tmp_path / "served", "tokasaurus", lambda _: model)] == [
        f"crane -> {tmp_path / 'served' / 'crane'}"
    ]
    folder = tmp_path / "served" / "crane"
    tensors = torch.load(folder / "cartridge.pt", weights_only=True)
    assert set(tensors) == {f"{kind}_{part}" for kind in ("fixed", "trainable") for part in ("keys", "values")}
    for part, index in (("keys", 0), ("values", 1)):
        assert len(tensors[f"fixed_{part}"]) == len(tensors[f"trainable_{part}"]) == model.geometry.layers
        for layer, rows in enumerate(tensors[f"trainable_{part}"]):
            assert torch.equal(rows, kv[None, layer, index])
        for layer, rows in enumerate(tensors[f"fixed_{part}"]):
            assert torch.equal(rows, model.header_kv[None, layer, index])
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["kv_cache_initializer"]["max_tokens"] % 16 == 0
    assert config["kv_cache_initializer"]["max_tokens"] == model.layout_header + kv.shape[3]
    assert config["model"]["pretrained_model_name_or_path"] == "tiny-llama"


def test_several_as_safetensors_are_header_and_cartridges(model: FrozenModel, make: Any, tmp_path: Path) -> None:
    store = make(model, "offset")
    export(store, ["lamp", "crane"], tmp_path / "two.safetensors", "safetensors", lambda _: model)
    with safe_open(tmp_path / "two.safetensors", "pt") as file:
        kv, about = file.get_tensor("kv"), json.loads(file.metadata()["cartridge"])
    assert torch.equal(
        kv[:, :, :, model.layout_header :], torch.cat([store.cartridge("lamp"), store.cartridge("crane")], 3)
    )
    assert (
        about["ids"] == ["lamp", "crane"] and about["start"] == kv.shape[3] and about["header"] == model.layout_header
    )


@pytest.fixture
def command(model: FrozenModel, make: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """``command(*words)``: ``cas export``, of a store with fixed positions."""
    make(model).close()
    monkeypatch.setattr(FrozenModel, "from_pretrained", classmethod(lambda cls, *_, **__: model))
    monkeypatch.chdir(tmp_path)
    return lambda *words: call(tool.main, "export", *words, "--store", "s-fixed")


def test_the_command_writes_every_format(command: Any, tmp_path: Path) -> None:
    status, out, err = command("lamp", "lamp.safetensors")
    assert (status, out) == (0, "lamp -> lamp.safetensors\n"), err
    assert set(load_file("lamp.safetensors")) == {"kv"}
    status, out, err = command("crane", "lamp", "both.safetensors", "--format", "transformers")
    assert (status, out) == (0, "crane lamp -> both.safetensors and both.json\n"), err
    status, out, err = command("crane", "adapters/crane", "--format", "peft")
    assert status == 0 and (tmp_path / "adapters" / "crane" / "adapter_config.json").exists(), err


REFUSED = [
    (["lamp"], "name what to export, and where to"),
    (["lamp", "lamp.bin"], "name the file \\*.safetensors"),
    (["lamp", "lamp.bin", "--format", "transformers"], "name the file \\*.safetensors"),
    (["lomp", "x.safetensors"], "has no cartridge 'lomp'"),
    (["lomp", "x", "--format", "peft"], "has no cartridge 'lomp'"),
    (["lamp", "lamp", "x", "--format", "peft"], "same id is given twice"),
    (["lamp", "file", "--format", "peft"], "file is a file; --format peft writes a folder"),
    (
        ["lamp", "ferry", "x", "--format", "tokasaurus"],
        "positions, and Tokasaurus takes multiples of 16; train with another --system",
    ),
]


@pytest.mark.parametrize(("words", "line"), REFUSED)
def test_what_a_format_cannot_represent_is_refused(words: list[str], line: str, command: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    before = sorted(p.name for p in tmp_path.iterdir())
    status, out, err = command(*words)
    assert status == 2 and out == "" and err.count("\n") == 1 and re.search(line, err), err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_sliding_windows_stay_in_cas(tiny: Callable[..., FrozenModel], make: Any, tmp_path: Path) -> None:
    from cas.errors import ModelError

    model = tiny("gemma3")
    store = make(model)
    with pytest.raises(ModelError, match="sliding windows by cache index"):
        export(store, ["lamp"], tmp_path / "x", "peft", lambda _: model)
    export(store, ["lamp"], tmp_path / "x.safetensors", "safetensors", lambda _: model)
