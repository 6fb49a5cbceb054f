"""Self-study without a model that can write: small documents, and a test double in place of ``generate``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model

from cas.data.collection import Collection, Document
from cas.model.decoding import Generation, Prompt
from cas.model.frozen import FrozenModel
from cas.selfstudy.conversations import Conversations

PLACES = ("Alder", "Birch", "Cedar", "Dogwood", "Elder")
DEEDS = (
    "was dug by Tom Reed in 1911", "supplies forty gardens", "is nine metres deep", "froze in the winter of 1947", "has an oak lid",
    "was cleaned by two divers", "belongs to the parish", "lost its rope in a storm", "was painted green", "is listed",
)  # fmt: skip
SMALL: dict[str, Any] = {
    "conversations": 60, "chunk_tokens": 120, "questions_per_call": 8, "top_k": 5, "reconstruction": "off",
}  # fmt: skip


def wells(*sentences: int) -> Collection:
    """One document for each number, with that many sentences of the same pattern."""
    documents = [
        Document(name.lower(), f"{name} Well", " ".join(f"{name} Well {deed}." for deed in DEEDS[:count]))
        for name, count in zip(PLACES, sentences, strict=False)
    ]
    return Collection("wells", tuple(documents))


def plain(conversations: Conversations) -> list[list[Any]]:
    """Everything about every conversation, to compare."""
    return [
        [name, *(v.tolist() if isinstance(v, np.ndarray) else v for v in vars(c).values())]
        for name, items in conversations.by_document.items()
        for c in items
    ]


class Writer:
    """In place of ``generate``: makes questions from the words of the sentence in the prompt, and short answers. Some
    have each of the faults that filters look for. Equal prompts get equal words, as from a greedy model, unless
    sampled."""

    def __init__(self, model: FrozenModel) -> None:
        self.model, self.asked, self.answered, self.calls = model, 0, 0, 0
        self.bad_questions, self.bad_answers = Counter[str](), Counter[str]()

    def __call__(
        self, model: FrozenModel, prompts: Sequence[Prompt], cartridges: Any, layout: Any, **options: Any
    ) -> list[Generation]:
        self.calls += 1
        assert layout.policy == "offset" and layout.header == model.layout_header
        assert {name for p in prompts for name in p.cartridges} <= set(cartridges)
        if options.get("keep_top"):
            self.answered += len(prompts)
            return [self.answer(p, options["keep_top"]) for p in prompts]
        assert options["also_stop"] and set(options["temperature"]) <= {0.0, 0.7}
        self.asked += len(prompts)
        heat = zip(prompts, options["temperature"], strict=True)
        return [self.question(prompt, options["seed"] if temperature else 0) for prompt, temperature in heat]

    def question(self, prompt: Prompt, seed: int) -> Generation:
        text = self.model.tokenizer.decode(list(prompt.tokens))
        sentence, opening = text.split("Sentence: ")[1].split("\nAbout ")[0], text.rpartition("\n- ")[2]
        subject, _, deed = sentence.rstrip(".").partition(" Well ")
        chance = (sum(map(ord, sentence + opening)) + seed) % 10
        words, why = f" {subject} Well {deed}{f', {seed % 3}' if seed else ''}?", ""
        if chance == 0:
            words, why = f" {subject} Well {deed}", "malformed question"
        elif chance == 1:
            words, why = " did Napoleon do with the moon?", "off topic"
        elif chance == 2:
            words, why = f" {subject} Well" + " and so on" * 4 + "?", "loop"
        elif chance == 3:
            words, why = " Mount Everest lies in Nepal and Tibet?", "off topic"
        elif chance == 4:
            why = "unfinished question"
        self.bad_questions[why] += 1
        return Generation(self.model.encode(words), finished=why != "unfinished question")

    def answer(self, prompt: Prompt, k: int) -> Generation:
        chance = sum(prompt.tokens) % 11
        ids, finished, why = self.model.encode(f"Yes, {chance}."), True, ""
        if chance == 0:
            finished, why = False, "answer too long"
        elif chance == 1:
            ids, why = [], "empty answer"
        elif chance == 2:
            ids, why = [301, 302, 303] * 3, "loop"
        elif chance == 3:
            ids, why = self.model.encode("The thing."), "answer without substance"
        self.bad_answers[why] += 1
        stop = next(iter(self.model.template.stop_ids))
        chosen = [*ids, *([stop] if finished else [])]
        top = [torch.tensor([t, *(n for n in range(3, 3 + k) if n != t)][:k], dtype=torch.int32) for t in chosen]
        values = [(0.1 * torch.arange(k) + t).neg().log_softmax(-1) for t in range(len(chosen))]
        return Generation(ids, finished, {}, top, values)


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Commands with a tiny model and nothing that needs the network or sense, as in the fixture ``manuals``."""
    from retrieval import HashEmbedder

    model = tiny_model("llama")

    class Talk(Writer):
        def question(self, prompt: Any, seed: int) -> Any:
            return Generation(model.encode(f" of number {sum(prompt.tokens) % 97}?"), finished=True)

    patch.setattr("cas.selfstudy.synthesize.generate", Talk(model))
    patch.setattr("cas.selfstudy.synthesize.bad_question", lambda *_: None)
    patch.setattr("cas.selfstudy.synthesize.bad_answer", lambda *_: None)
    patch.setattr(FrozenModel, "from_pretrained", classmethod(lambda cls, *_, **__: model))
    patch.setattr("retrieval.SentenceEmbedder", lambda *_, **__: HashEmbedder())
    patch.setattr("cas.training.pipeline.estimate", lambda *_: None)
    patch.delenv("CAS_STORE", raising=False)
