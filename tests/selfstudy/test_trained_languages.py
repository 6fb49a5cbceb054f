"""Conversations in eight languages are trained on, and the store opens under its own model alone, whatever the tokenizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_hf
from test_languages import LANGUAGES, REAL, TOKENIZERS, scripted_model, study

from cas.answering.answerer import Answerer
from cas.errors import StoreMismatch
from cas.model.frozen import FrozenModel, Source
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.trainer import Trainer, Training

QUICK = (("byte-level", "German"), ("SentencePiece", "Chinese"))  # other pairs only in slow runs
AVAILABLE = [name for name in TOKENIZERS if name not in REAL or "CAS_TOKENIZERS" in os.environ]


def pairs() -> list[Any]:
    """Every tokenizer with every language."""
    return [
        pytest.param(
            name, language, id=f"{name}-{language}", marks=[] if (name, language) in QUICK else pytest.mark.slow
        )
        for name in AVAILABLE
        for language in LANGUAGES
    ]


def fresh_model(name: str, seed: int = 0) -> FrozenModel:
    """The model of :func:`scripted_model` made again, or one with other weights."""
    tokenizer = TOKENIZERS[name]()
    options = {"max_position_embeddings": 4096, "eos_token_id": tokenizer.eos_token_id}
    return FrozenModel(
        tiny_hf("llama", seed, vocab_size=len(tokenizer), **options), tokenizer, Source("folder", "fresh")
    )


@pytest.mark.parametrize(("tokenizer", "language"), pairs())
def test_kept_conversations_are_trained_and_the_store_opens_again(
    tokenizer: str, language: str, tmp_path: Path
) -> None:
    model = scripted_model(tokenizer)
    with Store.create(tmp_path / "store", model, tokens=16) as store:
        with pytest.MonkeyPatch.context() as patch:
            conversations, _ = study(model, language, store, patch)
        kept, dropped = len(conversations), sum(conversations.dropped.values())
        assert kept >= 0.95 * (kept + dropped) and kept >= 2
        initialize_cartridges(model, store, conversations)
        before = store.cartridge("one")
        losses: list[float] = []
        training = Training(steps=2, pool=1, targets=1, per_target=kept, isolation=1.0)
        assert Trainer(model, store, conversations, training, on_step=lambda r: losses.append(r.loss)).run()
        after = store.cartridge("one")
    assert len(losses) == 2 and all(0 < loss < float("inf") for loss in losses)
    assert after.isfinite().all() and not torch.equal(before, after)

    again = fresh_model(tokenizer)
    with Store.open(tmp_path / "store") as store:
        row = store.row("one")
        assert row.steps == 2 and row.trained_tokens > 0 and torch.equal(store.cartridge("one"), after)
        store.check_model(again)
        (title, sentences, _, _) = LANGUAGES[language]
        question = next(iter(sentences.values()))[0][0]
        answer = Answerer(again, store).ask(question, documents=["one"], max_new_tokens=4)
        assert [c.id for c in answer.cartridges] == ["one"] and answer.cartridges[0].title == title
        others = [scripted_model(name) for name in AVAILABLE if name != tokenizer]
        for other in (fresh_model(tokenizer, seed=1), *others):
            with pytest.raises(StoreMismatch, match="open it with"):
                store.check_model(other)
