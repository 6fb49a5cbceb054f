"""Shared fixtures: tiny random models of four architectures, one tokenizer for all of them, a small collection."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from cas.data.collection import Collection, Document, Question
from cas.model.frozen import FrozenModel, Source
from cas.options import DEFAULT_SYSTEM

torch.set_num_threads(1)

KINDS = ("llama", "qwen3", "mistral", "gemma3")
WINDOW = 24  # of the sliding layers of mistral (all) and gemma3 (two of three); shorter than header and cartridge

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

TEXTS = {
    "crane": "The harbour crane lifts nine tonnes. Its brake is checked every Monday by the night shift.",
    "ferry": "The ferry Alma leaves at seven. Her engine was rebuilt in the spring and she carries forty cars.",
    "lamp": "The lamp of the north pier is green. It flashes twice a minute, and a spare stands in the shed.",
    "pump": "The pump of dock two has a red valve. Open the red valve before the pump is started, never after.",
    "tide": "The tide table hangs beside the door. High water on the first of May is at ten past four.",
}


@cache
def tiny_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer of 384 ids, trained on our own few sentences; it can spell any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(
        [*TEXTS.values(), *[DEFAULT_SYSTEM] * 3, "system user assistant Question: Answer:"], trainer
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_hf(kind: str, seed: int = 0, **overrides: Any) -> Any:
    """A tiny random Hugging Face decoder, float32 on the CPU: 3 layers, grouped-query heads, and what marks its kind.

    ``qwen3``: head_dim is not hidden / heads, norms on queries and keys. ``mistral``: every layer slides.
    ``gemma3``: sliding and full layers with two RoPE bases. Weights are large enough that attention is far from flat.
    """
    import transformers

    names = {"llama": "Llama", "qwen3": "Qwen3", "mistral": "Mistral", "gemma3": "Gemma3Text"}
    settings: dict[str, Any] = {
        "vocab_size": 384, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 1024, "initializer_range": 0.3,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    if kind == "qwen3":
        settings |= {"head_dim": 16}
    elif kind == "mistral":
        settings |= {"sliding_window": WINDOW}
    elif kind == "gemma3":
        settings |= {
            "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            # With tied embeddings this small, a random model only repeats its last token.
            "query_pre_attn_scalar": 12, "tie_word_embeddings": False,
        }  # fmt: skip
    config = getattr(transformers, f"{names[kind]}Config")(**(settings | overrides))
    torch.manual_seed(seed)
    hf = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    for parameter in hf.parameters():  # norms start at a constant; a mistake in them should show, too
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.1)
    return hf.eval()


@cache
def tiny_model(kind: str, seed: int = 0) -> FrozenModel:
    return FrozenModel(tiny_hf(kind, seed), tiny_tokenizer(), Source("folder", f"tiny-{kind}"))


@pytest.fixture(scope="session")
def tiny() -> Callable[..., FrozenModel]:
    """``tiny(kind, seed=0)``: the tiny model as a FrozenModel, made once and shared: do not change it."""
    return tiny_model


@pytest.fixture(scope="session")
def collection() -> Collection:
    """Five documents of some 30 to 60 tokens, one question about each and one about two."""
    documents = tuple(Document(id, id.title(), text) for id, text in TEXTS.items())
    asked = [
        ("crane", "How much does the crane lift?", "nine tonnes"),
        ("ferry", "When does the ferry leave?", "at seven"),
        ("lamp", "What colour is the lamp of the north pier?", "green"),
        ("pump", "Which valve is opened before the pump is started?", "the red valve"),
        ("tide", "Where does the tide table hang?", "beside the door"),
    ]
    questions = [Question(f"q-{id}", (id,), text, (answer,)) for id, text, answer in asked]
    questions.append(Question("q-two", ("lamp", "pump"), "What is green and what is red?", ("the lamp and the valve",)))
    return Collection("tiny", documents, tuple(questions))


def tiny_cartridges(model: FrozenModel, sizes: dict[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Cartridges as training leaves them: the KV of some text plus noise, float32 [L, 2, H, P, D], by id."""
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for name, p in sizes.items():
        ids = torch.randint(3, 384, (p,), generator=generator).tolist()
        kv = model.prefill([*model.template.header_ids, *ids])[:, :, :, model.layout_header :].float()
        made[name] = kv + 0.3 * kv.std() * torch.randn(kv.shape, generator=generator).to(kv.device)
    return made


@pytest.fixture
def manuals(tmp_path: Path, tiny: Callable[..., FrozenModel], monkeypatch: pytest.MonkeyPatch) -> Iterator[FrozenModel]:
    """A folder ``manuals/`` in the current directory, and nothing that needs the network or sense."""
    from helpers_writer import Writer

    from cas.model.decoding import Generation
    from retrieval import HashEmbedder

    model = tiny("llama")

    class Talk(Writer):
        def question(self, prompt: Any, seed: int) -> Any:
            text = model.tokenizer.decode(list(prompt.tokens))
            title = text.split("\nAbout ")[1].split(":")[0]
            number = sum(prompt.tokens) % 97
            return Generation(model.encode(f" of {title} number {number}?"), finished=True)

    writer = Talk(model)
    monkeypatch.setattr("cas.selfstudy.synthesize.generate", writer)
    monkeypatch.setattr("cas.selfstudy.synthesize.bad_question", lambda *_: None)
    monkeypatch.setattr("cas.selfstudy.synthesize.bad_answer", lambda *_: None)
    monkeypatch.setattr(FrozenModel, "from_pretrained", classmethod(lambda cls, *_, **__: model))
    monkeypatch.setattr("retrieval.SentenceEmbedder", lambda *_, **__: HashEmbedder())
    monkeypatch.setattr("cas.training.cost.PROBE_SECONDS", 0.0)
    monkeypatch.delenv("CAS_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "manuals").mkdir()
    for name in ("pump", "tide", "lamp"):
        (tmp_path / "manuals" / f"{name}.md").write_text(f"# The {name}\n\n{TEXTS[name]}\n")
    (tmp_path / "manuals" / "valve.txt").write_text(TEXTS["ferry"])
    (tmp_path / "manuals" / "empty.txt").write_text("")
    yield model


@pytest.fixture
def new_store(tmp_path: Path, model: FrozenModel) -> Iterator[Callable[..., Any]]:
    """``new_store(name)``: an empty store of the test's ``model``, closed after the test."""
    from cas.store.store import Store

    stores: list[Store] = []

    def make(name: str = "store") -> Store:
        stores.append(Store.create(tmp_path / name, model, tokens=16))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


@pytest.fixture
def writer(model: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A writer in place of the test's ``model``."""
    from helpers_writer import Writer

    writer = Writer(model)
    monkeypatch.setattr("cas.selfstudy.synthesize.generate", writer)
    return writer
