"""Loading models: what is missing or quantized is refused by name, and one fingerprint identifies what a model computes."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WINDOW, tiny_hf, tiny_model, tiny_tokenizer
from helpers_store import make_store

import cas.model.frozen
from cas.data.collection import Collection
from cas.errors import ModelError, StoreMismatch
from cas.model.fingerprint import identify
from cas.model.frozen import FrozenModel, Source
from cas.model.loading import halve
from cas.model.positions import Layout, unseen_layers
from cas.store.store import Store

SOURCE = Source("folder", "tiny")


def save(folder: Path, hf: Any = None, **options: Any) -> Path:
    (hf or tiny_hf("llama")).save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def change_tensors(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def load(folder: Path, **options: Any) -> FrozenModel:
    return FrozenModel.from_pretrained(str(folder), **{"device": "cpu", "dtype": "float32", **options})


def refusal(folder: Path) -> str:
    with pytest.raises(ModelError) as error:
        load(folder)
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{folder}: ")


# -- files --------------------------------------------------------------------------------------------------------------


def test_missing_tensors_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save(tmp_path / "m")
    change_tensors(folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    capfd.readouterr()
    assert refusal(folder).startswith("not loaded (the files lack model.layers.1.mlp.up_proj.weight); download")
    assert capfd.readouterr().err == ""  # no tables of transformers
    change_tensors(folder, lambda t: [t.pop(name) for name in sorted(t)[:4]])
    assert " and 2 more);" in refusal(folder)


def test_an_output_layer_is_missing_only_where_it_is_not_tied(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    change_tensors(folder, lambda t: t.pop("lm_head.weight"))
    assert "the files lack lm_head.weight" in refusal(folder)
    tied = FrozenModel(tiny_hf("llama", tie_word_embeddings=True), tiny_tokenizer(), SOURCE)
    loaded = load(save(tmp_path / "tied", tiny_hf("llama", tie_word_embeddings=True)))
    assert loaded.fingerprint == tied.fingerprint != tiny_model("llama").fingerprint


def test_other_tensors_do_not_matter(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    change_tensors(folder, lambda t: t.update({"visual.patch.weight": torch.ones(3)}))
    assert load(folder).fingerprint == tiny_model("llama").fingerprint


def test_tensors_of_another_shape_are_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(3)}))
    assert refusal(folder).startswith(
        "not loaded (model.norm.weight has shape [3] in the files and [48] in the model);"
    )


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", max_shard_size="60KB")
    assert load(folder).fingerprint == tiny_model("llama").fingerprint
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refusal(folder)


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", "awq", "hqq", "strange", None])
def test_quantized_folders_without_their_library_are_refused(method: str | None, tmp_path: Path) -> None:
    folder = save(tmp_path / "m")
    settings = {"bits": 4} | ({"quant_method": method} if method else {})
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    text = refusal(folder)
    assert text.startswith(f"not loaded (quantized with {method or 'an unknown method'}: ")
    assert text.endswith("give a folder that is not quantized")


def test_quantized_models_stay_where_they_were_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hf, asked = tiny_hf("llama"), []

    def fake(name: str, revision: Any, dtype: Any, device: Any) -> Any:
        asked.append((dtype, device))
        hf.is_quantized = True
        hf.to = lambda *_: pytest.fail("a quantized model cannot be moved")
        return hf, tiny_tokenizer(), SOURCE

    monkeypatch.setattr(cas.model.frozen, "load", fake)
    assert FrozenModel.from_pretrained("x", device="cpu", dtype="bfloat16").hf is hf
    assert asked == [(torch.bfloat16, torch.device("cpu"))]


def test_quantized_models_without_gradients_are_refused() -> None:
    hf = tiny_hf("llama")
    hf.is_quantized = True
    FrozenModel(hf, tiny_tokenizer(), SOURCE)
    hf.model.layers[1].mlp.register_forward_hook(lambda _, __, output: output.detach())
    hf.model.layers[1].register_forward_hook(lambda _, __, output: output.detach())
    with pytest.raises(ModelError, match=r"^llama: quantized layers give no gradients[^\n]*$"):
        FrozenModel(hf, tiny_tokenizer(), SOURCE)


def test_compute_types(monkeypatch: pytest.MonkeyPatch) -> None:
    choose, gpu, cpu = cas.model.frozen._dtype, torch.device("cuda"), torch.device("cpu")
    for computes, expected in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(cas.model.frozen, "_computes_bfloat16", lambda _, computes=computes: computes)
        assert choose("auto", gpu) == expected
    assert choose("auto", cpu) == choose("float32", gpu) == torch.float32 and choose("float16", gpu) == torch.float16
    with pytest.raises(ModelError, match="--dtype float16: needs a GPU"):
        choose("float16", cpu)
    with pytest.raises(ModelError, match="--dtype int8: choose"):
        choose("int8", gpu)


# -- fingerprints -------------------------------------------------------------------------------------------------------


def model(kind: str = "llama", tokenizer: Any = None, **settings: Any) -> FrozenModel:
    return FrozenModel(tiny_hf(kind, **settings), tokenizer or tiny_tokenizer(), SOURCE)


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("llama", {"rms_norm_eps": 1e-5}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"tie_word_embeddings": True}),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 2e4}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.5}}),
        ("mistral", {"sliding_window": WINDOW + 1}),
        ("mistral", {"sliding_window": None}),
        ("gemma3", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("gemma3", {"query_pre_attn_scalar": 24}),
        ("gemma3", {"final_logit_softcapping": 30.0}),
    ],
)
def test_what_shapes_a_forward_pass_is_in_the_fingerprint(kind: str, settings: dict[str, Any]) -> None:
    assert model(kind, **settings).fingerprint not in {
        model(kind).fingerprint,
        model(kind, rms_norm_eps=2e-6).fingerprint,
    }


def test_two_scalings_of_attention_differ() -> None:
    one, two = (model(rope_parameters={**YARN, "attention_factor": f}) for f in (1.5, 1.25))
    assert one.rope_fingerprint == two.rope_fingerprint and one.fingerprint != two.fingerprint


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_dropout": 0.1}, {"initializer_range": 0.3, "use_cache": False}, {"max_position_embeddings": 2048},
        {"pretraining_tp": 2}, {"transformers_version": "4.0"}, {"eos_token_id": 3}, {"rms_norm_eps": 1e-6},
        {"added_in_a_new_version": None, "another": False},
    ],
)  # fmt: skip
def test_nothing_else_is(settings: dict[str, Any]) -> None:
    assert model(**settings).fingerprint == tiny_model("llama").fingerprint


def test_every_weight_counts() -> None:
    hf = tiny_hf("llama")
    with torch.no_grad():
        hf.model.layers[1].mlp.up_proj.weight[7, 5] += 1
    assert FrozenModel(hf, tiny_tokenizer(), SOURCE).fingerprint != tiny_model("llama").fingerprint
    hf = tiny_hf("llama")
    hf.model.layers[0].mlp, hf.model.layers[1].mlp = hf.model.layers[1].mlp, hf.model.layers[0].mlp
    assert FrozenModel(hf, tiny_tokenizer(), SOURCE).fingerprint != tiny_model("llama").fingerprint


def test_names_of_parameters_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    hf = tiny_hf("llama")
    weights = hf.state_dict()
    renamed = {name.replace("mlp.", "ffn.").replace("embed_tokens", "a_tokens"): w for name, w in weights.items()}
    monkeypatch.setattr(hf, "state_dict", lambda: dict(sorted(renamed.items())))
    other = FrozenModel(hf, tiny_tokenizer(), SOURCE)
    assert other.fingerprint == tiny_model("llama").fingerprint
    assert other.legacy_fingerprint != tiny_model("llama").legacy_fingerprint


def test_float16_has_the_fingerprint_of_what_was_converted() -> None:
    hf = tiny_hf("llama")
    identity = identify(hf, tiny_tokenizer())
    halve(hf)
    half = FrozenModel(hf, tiny_tokenizer(), SOURCE, identity=identity)
    assert half.dtype == torch.float16 and half.fingerprint == tiny_model("llama").fingerprint
    assert half.legacy_fingerprint == tiny_model("llama").legacy_fingerprint


def changed_tokenizer(change: Callable[[dict[str, Any]], Any]) -> Any:
    from tokenizers import Tokenizer

    tokenizer = copy.copy(tiny_tokenizer())
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    change(spec)
    names = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    other = tokenizer.__class__(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), **names)
    other.chat_template = tokenizer.chat_template
    return other


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        (lambda s: s.update(normalizer={"type": "NFC"}), True),
        (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), True),
        (lambda s: s["model"]["merges"].reverse(), True),
        (lambda s: s["added_tokens"][0].update(lstrip=True), True),
        (lambda s: s["model"].update(ignore_merges=True), True),
        (lambda s: s["model"].update(dropout=None), False),
        (lambda s: s.update(truncation=None, post_processor=None), False),
    ],
)
def test_the_tokenizer_counts(change: Callable[[dict[str, Any]], Any], counts: bool) -> None:
    other = model(tokenizer=changed_tokenizer(change))
    assert (other.fingerprint != tiny_model("llama").fingerprint) == counts


def test_the_template_counts() -> None:
    tokenizer = copy.copy(tiny_tokenizer())
    tokenizer.chat_template = tokenizer.chat_template.replace("assistant", "Assistant")
    assert model(tokenizer=tokenizer).fingerprint != tiny_model("llama").fingerprint


# -- stores -------------------------------------------------------------------------------------------------------------


def test_stores_of_earlier_versions_open(
    tmp_path: Path, tiny: Callable[..., FrozenModel], collection: Collection
) -> None:
    model, other = tiny("llama"), tiny("llama", seed=1)
    assert model.legacy_fingerprint == "74f22f0788b02642"
    with make_store(tmp_path / "s", model, collection) as store:
        assert store.meta["model"]["fingerprint"] == model.fingerprint
        store.meta["model"]["fingerprint"] = model.legacy_fingerprint
        store.check_model(model)
        with pytest.raises(StoreMismatch, match="was made with tiny-llama"):
            store.check_model(other)


def test_a_model_that_has_moved(tmp_path: Path, collection: Collection) -> None:
    before = load(save(tmp_path / "before"))
    with make_store(tmp_path / "s", before, collection):
        pass
    shutil.move(tmp_path / "before", tmp_path / "after")
    with Store.open(tmp_path / "s") as store:
        with pytest.raises(
            ModelError, match=r"before: the store's model is no longer there; .* --model \(cas.query, cas.train\)$"
        ):
            FrozenModel.from_store(store, device="cpu")
        moved = FrozenModel.from_store(store, str(tmp_path / "after"), dtype="bfloat16", device="cpu")
        store.check_model(moved)
        assert moved.source.name == str(tmp_path / "after")
        with pytest.raises(StoreMismatch):
            other = save(tmp_path / "other", tiny_hf("llama", seed=1))
            store.check_model(FrozenModel.from_store(store, str(other), dtype="float32", device="cpu"))


# -- windows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "span", "sizes", "window", "count"),
    [
        ("fixed", 64, [4, 64], 24, 1),
        ("fixed", 64, [40], 24, 1),  # its last key is 25 positions before the question
        ("fixed", 64, [44], 24, 0),
        ("fixed", 64, [4, 64], None, 0),
        ("fixed", 64, [4], 62, 0),
        ("fixed", 64, [4], 61, 1),
        ("offset", 64, [4, 64], 24, 0),
        ("sequential", 64, [4, 64], 24, 0),
    ],
)
def test_cartridges_out_of_sight_of_sliding_layers(
    policy: Any, span: int, sizes: list[int], window: int | None, count: int
) -> None:
    line = unseen_layers(Layout(policy, 10, span), sizes, (window, None, window))
    assert (line is not None) == (count > 0)
    if line is not None:
        assert (
            line.startswith(f"{count} of {len(sizes)} cartridges are out of sight of layers 0, 2, ")
            and "\n" not in line
        )
        # As the mask has it: the first token behind the span sees no key of the cartridge.
        from cas.model.attention import causal_mask

        question, keys = torch.tensor([10 + span]), torch.arange(10, 10 + min(sizes))
        assert not causal_mask(question, keys, window).any()
