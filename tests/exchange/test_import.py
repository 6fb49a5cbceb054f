"""PEFT adapters into a store: the same cartridge, or one line that says why not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXTS, tiny_hf
from helpers_commands import call
from helpers_exchange import QUESTION, sized_store
from safetensors.torch import load_file, save_file

from cas import __main__ as tool
from cas import query
from cas.answering.answerer import Answerer
from cas.exchange.formats import export
from cas.exchange.imported import import_adapters
from cas.model.decoding import Prompt, generate
from cas.model.frozen import FrozenModel
from cas.store.index import open_index
from cas.store.store import Store
from retrieval import HashEmbedder


@pytest.fixture
def model(tiny: Callable[..., FrozenModel]) -> FrozenModel:
    return tiny("llama")


@pytest.fixture
def two(tmp_path: Path, model: FrozenModel) -> Iterator[Callable[[str, str], tuple[Store, Store]]]:
    """``two(positions, others)``: a store to export from and one to import into."""
    stores: list[Store] = []

    def make(positions: str, others: str) -> tuple[Store, Store]:
        stores.append(sized_store(tmp_path / "source", model, positions))
        stores.append(sized_store(tmp_path / "target", model, others, {"ferry": 16}))
        return stores[0], stores[1]

    yield make
    for store in stores:
        store.close()


@pytest.mark.parametrize("positions", ["fixed", "offset", "sequential"])
def test_export_and_import_is_the_same_cartridge(positions: str, two: Any, model: FrozenModel, tmp_path: Path) -> None:
    source, target = two(positions, positions)
    for name in ("crane", "lamp"):
        export(source, [name], tmp_path / "adapters" / f"{name}-1", "peft", lambda _: model)
    before = target.cartridge("ferry")
    lines = import_adapters(target, model, tmp_path / "adapters")
    assert [line.partition(" -> ")[2] for line in lines[:2]] == ["crane, 8 positions", "lamp, 16 positions"]
    assert len(lines) == 3 and lines[2].startswith("without a text, retrieval cannot find them")
    for name in ("crane", "lamp"):
        given, back = source.cartridge(name), target.cartridge(name)
        if positions == "fixed" and name == "crane":  # keys were shifted there and back
            assert torch.equal(given[:, 1], back[:, 1]) and torch.allclose(given, back, atol=1e-5)
        else:
            assert torch.equal(given, back)
        prompt = Prompt(model.question_tokens(QUESTION), (name,))
        ours, theirs = (
            generate(model, [prompt], {name: s.cartridge(name)}, s.layout, max_new_tokens=8)[0].ids
            for s in (source, target)
        )
        assert ours == theirs
        row = target.row(name)
        assert row.title == name.title() and row.round < target.round and row.steps == 0
    assert target.verify() == [] and torch.equal(target.cartridge("ferry"), before)


def test_an_imported_cartridge_answers(two: Any, model: FrozenModel, tmp_path: Path, monkeypatch: Any) -> None:
    source, target = two("offset", "offset")
    export(source, ["lamp"], tmp_path / "adapter", "peft", lambda _: model)
    (tmp_path / "lamp.txt").write_text(TEXTS["lamp"])
    target.close()
    monkeypatch.setattr(FrozenModel, "from_pretrained", classmethod(lambda cls, *_, **__: model))
    words = [str(tmp_path / "adapter"), "--store", str(tmp_path / "target"), "--id", "pier/lamp"]
    status, out, err = call(tool.main, "import", *words, "--text", str(tmp_path / "lamp.txt"))
    assert status == 0 and out.endswith("-> pier/lamp, 16 positions\n"), err
    words = ["--store", str(tmp_path / "target"), "--documents", "pier/lamp", "--json", QUESTION]
    status, out, err = call(query.main, *words)
    answer = json.loads(out)
    assert status == 0 and [c["id"] for c in answer["cartridges"]] == ["pier/lamp"], err
    assert answer["answer"] == Answerer(model, source, HashEmbedder()).ask(QUESTION, documents=["lamp"]).text
    with Store.open(tmp_path / "target") as store:
        assert store.text("pier/lamp") == TEXTS["lamp"] and store.verify() == []
        answer = Answerer(model, store, HashEmbedder()).ask("When does the pier lamp flash?", k=1)
        assert [c.id for c in answer.cartridges] == ["pier/lamp"]  # retrieval finds its text
        assert open_index(store, HashEmbedder()).document_ids == ["ferry", "pier/lamp"]


def test_what_peft_has_saved_answers_as_in_peft(two: Any, model: FrozenModel, tmp_path: Path) -> None:
    """An adapter trained on in PEFT, of a size that CAS would not choose, without metadata of ours."""
    peft = pytest.importorskip("peft")
    source, target = two("offset", "offset")
    export(source, ["lamp"], tmp_path / "adapter", "peft", lambda _: model)
    header, config = model.layout_header, peft.PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    config.num_virtual_tokens, config.inference_mode = header + 5, False
    adapted = peft.get_peft_model(tiny_hf("llama"), config)
    rows = load_file(tmp_path / "adapter" / "adapter_model.safetensors")["prompt_embeddings"][: header + 5]
    adapted.prompt_encoder["default"].load_prompt_embeddings(rows)
    parameters = [p for p in adapted.parameters() if p.requires_grad]
    tokens = torch.tensor([model.question_tokens(QUESTION)])
    adapted(input_ids=tokens, labels=tokens).loss.backward()
    torch.optim.SGD(parameters, lr=0.5).step()
    adapted.save_pretrained(str(tmp_path / "trained"))
    adapted.eval()
    with torch.no_grad():
        theirs = adapted(input_ids=tokens).logits[0, -1]
    assert len(import_adapters(target, model, tmp_path / "trained")) == 2  # nothing to remark
    trained = target.cartridge("trained")
    assert trained.shape[3] == 5 and not torch.equal(trained, source.cartridge("lamp")[:, :, :, :5])
    from cas.answering.compose import compose

    inputs = compose(model, target, ["trained"]).prompt(QUESTION)
    n = inputs["past_key_values"].get_seq_length()
    with torch.no_grad():
        ours = model.hf(
            input_ids=inputs["input_ids"][:, n:], position_ids=inputs["position_ids"][:, n:],
            past_key_values=inputs["past_key_values"],
        ).logits[0, -1]  # fmt: skip
    assert torch.allclose(ours, theirs, atol=2e-5 * float(theirs.abs().max()))
    answer = Answerer(model, target, HashEmbedder()).ask(QUESTION, documents=["trained", "ferry"], max_new_tokens=2)
    assert [c.id for c in answer.cartridges] == ["trained", "ferry"] and target.verify() == []


def test_other_positions_and_shorter_headers_are_said(two: Any, model: FrozenModel, tmp_path: Path) -> None:
    source, target = two("offset", "fixed")
    export(source, ["crane"], tmp_path / "adapter", "peft", lambda _: model)
    lines = import_adapters(target, model, tmp_path / "adapter")
    assert "the question stands 8 positions further behind the header than in the adapter, by the fixed" in lines[1]
    few = {"num_frozen_tokens": 1, "num_virtual_tokens": 13}  # as PEFT makes them by itself: only a sink is frozen
    rewrite(tmp_path / "adapter", lambda rows: {"prompt_embeddings": rows[:13]}, **few)
    lines = import_adapters(target, model, tmp_path / "adapter", id="sink")
    assert f"its frozen tokens are the first 1 of the header's {model.layout_header}" in lines[1]
    export(source, ["crane", "ferry"], tmp_path / "both", "peft", lambda _: model)
    target.meta["positions"] = "offset"  # 20 positions do not fit into a span of 16
    assert "-> both, 20 positions" in import_adapters(target, model, tmp_path / "both")[0]


def rewrite(folder: Path, tensors: Any = None, metadata: Any = None, **fields: Any) -> None:
    """Change an adapter: fields of its configuration, or its tensors."""
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "drop"}))
    if tensors is not None or metadata is not None:
        rows = load_file(folder / "adapter_model.safetensors")["prompt_embeddings"]
        made = {"prompt_embeddings": rows} if tensors is None else tensors(rows)
        save_file(made, folder / "adapter_model.safetensors", metadata)


def broken(folder: Path, content: bytes) -> None:
    (folder / "adapter_model.safetensors").write_bytes(content)


def nan(rows: torch.Tensor) -> dict[str, torch.Tensor]:
    rows[-1, 3] = float("nan")
    return {"prompt_embeddings": rows}


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nan": (lambda f: rewrite(f, nan), "holds a value that is not finite"),
    "integers": (lambda f: rewrite(f, lambda r: {"prompt_embeddings": r.int()}), "is I32 .* not floating point"),
    "narrow": (
        lambda f: rewrite(f, lambda r: {"prompt_embeddings": r[:, :-1].contiguous()}),
        "is F32 .*, not floating",
    ),
    "short": (lambda f: rewrite(f, lambda r: {"prompt_embeddings": r[:-1]}), "is F32 .*, not floating"),
    "more": (lambda f: rewrite(f, lambda r: {"prompt_embeddings": r, "x": r.clone()}), "expected one tensor"),
    "other name": (lambda f: rewrite(f, lambda r: {"x": r}), "expected one tensor"),
    "other header": (lambda f: rewrite(f, lambda r: {"prompt_embeddings": r + 0.3}, {}), "are not those of the header"),
    "frozen": (lambda f: rewrite(f, num_frozen_tokens=0), "0 of .* tokens are frozen; some must be"),
    "all frozen": (lambda f: rewrite(f, num_frozen_tokens=10**9), "tokens are frozen; some must be"),
    "no number": (lambda f: rewrite(f, num_virtual_tokens="many"), "num_virtual_tokens is not an integer"),
    "missing": (lambda f: rewrite(f, num_virtual_tokens="drop"), "num_virtual_tokens is not an integer"),
    "huge": (lambda f: rewrite(f, num_virtual_tokens=10**12), "must fit into the model's 1024 positions"),
    "layers": (lambda f: rewrite(f, num_layers=4), "num_layers is 4, and 3 in the model"),
    "kind": (lambda f: rewrite(f, peft_type="LORA"), "not a CARTRIDGE adapter"),
    "list": (lambda f: (f / "adapter_config.json").write_text("[]"), "not a CARTRIDGE adapter"),
    "no JSON": (lambda f: (f / "adapter_config.json").write_text("{"), "cannot be read as JSON"),
    "deep": (lambda f: (f / "adapter_config.json").write_text("[" * 10**5), "cannot be read as JSON"),
    "long": (lambda f: (f / "adapter_config.json").write_bytes(b" " * (1 << 21)), "too large"),
    "no file": (lambda f: (f / "adapter_model.safetensors").unlink(), "other files, such as adapter_model.bin"),
    "pickled": (lambda f: torch.save({}, f / "adapter_model.safetensors"), "not a safetensors file"),
    "empty": (lambda f: broken(f, b""), "not a safetensors file"),
    "length": (lambda f: broken(f, b"\xff" * 64), "not a safetensors file"),
    "elsewhere": (
        lambda f: rewrite(f, metadata={"cartridge": json.dumps({"fingerprint": "0", "model": "other"})}),
        "was exported for other .fingerprint 0., not for the model of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_foreign_file_is_refused_in_one_line(case: str, two: Any, model: FrozenModel, tmp_path: Path) -> None:
    source, target = two("offset", "offset")
    for name in ("crane", "lamp"):
        export(source, [name], tmp_path / "adapters" / name, "peft", lambda _: model)
    spoil, line = BAD[case]
    spoil(tmp_path / "adapters" / "lamp")
    before = target.stamp
    with pytest.raises(ValueError, match=line) as caught:
        import_adapters(target, model, tmp_path / "adapters")
    assert "\n" not in str(caught.value) and caught.value.exit_status == 2  # type: ignore[attr-defined]
    assert target.stamp == before and [*target.rows()] == ["ferry"]  # nor was the whole one imported


def test_ids_are_only_names(two: Any, model: FrozenModel, tmp_path: Path) -> None:
    source, target = two("offset", "offset")
    export(source, ["lamp"], tmp_path / "adapter", "peft", lambda _: model)
    about = {
        "fingerprint": model.fingerprint,
        "rope": model.rope_fingerprint,
        "ids": ["../../etc/x"],
        "titles": ["a\x1b[2J"],
    }
    rewrite(tmp_path / "adapter", metadata={"cartridge": json.dumps(about)})
    everything = sorted(tmp_path.rglob("*"))
    import_adapters(target, model, tmp_path / "adapter")
    assert sorted(tmp_path.rglob("*")) == sorted({*everything, tmp_path / "target" / "trainer.lock"})
    assert target.row("../../etc/x").title == "../../etc/x"
    about["ids"] = ["a\nb"]
    rewrite(tmp_path / "adapter", metadata={"cartridge": json.dumps(about)})
    assert "-> adapter, 16 positions" in import_adapters(target, model, tmp_path / "adapter")[0]
    for given, line in ((None, "has a document 'adapter' already"), ("", "give an --id"), ("a\nb", "give an --id")):
        with pytest.raises(ValueError, match=line):
            import_adapters(target, model, tmp_path / "adapter", id=given)
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "missing"):
        with pytest.raises(ValueError, match=r"has no adapter_config\.json, nor"):
            import_adapters(target, model, tmp_path / folder)


def test_other_models_and_unfinished_stores_are_refused(
    two: Any, tiny: Callable[..., FrozenModel], model: FrozenModel, tmp_path: Path
) -> None:
    source, target = two("offset", "offset")
    export(source, ["lamp"], tmp_path / "adapter", "peft", lambda _: model)
    with pytest.raises(ValueError, match="not with tiny-qwen3"):
        import_adapters(target, tiny("qwen3"), tmp_path / "adapter")
    other = tiny("llama", 1)
    with sized_store(tmp_path / "other", other, "offset") as store:
        with pytest.raises(ValueError, match="was exported for tiny-llama"):
            import_adapters(store, other, tmp_path / "adapter", id="x")
        rewrite(tmp_path / "adapter", metadata={})
        with pytest.raises(ValueError, match="are not those of the header"):  # even if nothing names the model
            import_adapters(store, other, tmp_path / "adapter", id="x")
    target.commit(target.rows(), {"step": 1, "settings": {"total_steps": 2}})
    with pytest.raises(ValueError, match="is in training; finish it first"):
        import_adapters(target, model, tmp_path / "adapter")
