"""The prompts, answers and scores of every arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
from torch import Tensor

from cas.answering import prompts as prompting
from cas.answering.answerer import open_index
from cas.data.collection import Collection, Question
from cas.evaluation.arms import Arm
from cas.evaluation.metrics import METRICS, contains, exact_match, f1
from cas.evaluation.recording import Prediction
from cas.model.decoding import Prompt, generate, log_likelihood
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.seed_prompts import normal
from cas.store.store import Store
from retrieval import ChunkIndex, Embedder, SentenceEmbedder, WordIndex, rank_chunks, rank_documents, with_title

RAG_CARTRIDGES = 4  # RAG without a chunk size has as many tokens as so many of the store's largest cartridges


class PromptGroup(NamedTuple):
    """Questions, the prompt of each, and what these prompts load: KV [L, 2, H, P, D] by id, and where it stands."""

    questions: list[Question]
    prompts: list[Prompt]
    cartridges: Mapping[str, Tensor]
    layout: Layout


def build_prompts(
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    arm: Arm,
    embedder: Embedder | None = None,
) -> list[Prompt]:
    """The prompts of an arm other than ``full_document``, a prompt per question; each asks for a short answer."""
    wordings = [question.question + prompting.brief(model) for question in questions]
    if arm.kind == "no_context":
        return [prompting.no_context(model, wording) for wording in wordings]
    if arm.kind == "rag":
        texts = _retrieved_texts(model, store, collection, questions, arm, embedder)
        return [prompting.text_context(model, *pair) for pair in zip(wordings, texts, strict=True)]
    ids = _loaded_ids(store, questions, arm, embedder)
    prompts = [prompting.cartridges(model, *pair) for pair in zip(wordings, ids, strict=True)]
    if arm.order == "reversed":
        prompts = [Prompt(prompt.tokens, prompt.cartridges[::-1]) for prompt in prompts]
    return prompts


def _loaded_ids(store: Store, questions: Sequence[Question], arm: Arm, embedder: Embedder | None) -> list[list[str]]:
    """For each question the ids of the cartridges that an arm loads."""
    gold = [list(question.document_ids) for question in questions]
    stored = list(store.rows())
    if arm.kind == "oracle":
        return gold
    if arm.kind == "loaded" and arm.k is None:
        return [stored] * len(questions)
    assert arm.kind in ("loaded", "absent", "retrieved") and arm.k is not None, arm
    plain = [question.question for question in questions]
    if arm.kind == "retrieved":
        index = open_index(store, embedder)
        words = WordIndex.open(index, store.texts, store.folder / "index") if arm.retriever == "hybrid" else None
        return [[r.document_id for r in ranked] for ranked in rank_documents(index, plain, arm.k, words)]
    if arm.others == "nearest":
        rankings = rank_documents(open_index(store, embedder), plain, arm.k + 2)  # two: a question's gold documents
        nearest = [[r.document_id for r in ranked] for ranked in rankings]
        return [
            [*own, *(i for i in ranked if i not in own)][: arm.k] for own, ranked in zip(gold, nearest, strict=True)
        ]
    ids = []
    for question, own in zip(questions, gold, strict=True):
        others = [i for i in stored if i not in own]
        kept = own if arm.kind == "loaded" else []
        ids.append([*kept, *Random(f"others/{question.id}").sample(others, arm.k - len(kept))])
    return ids


def _retrieved_texts(
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    arm: Arm,
    embedder: Embedder | None,
) -> list[list[str]]:
    """For each question the best chunks, with titles, up to as many tokens as RAG_CARTRIDGES of the store's largest
    cartridges have; chunks of ``arm.size`` words have three times as many."""
    room = RAG_CARTRIDGES * store.layout.span
    if arm.size is None:
        index = open_index(store, embedder)
    else:
        index, room = ChunkIndex(store.texts(), embedder or SentenceEmbedder(), words=arm.size), 3 * room
    words = WordIndex(index, store.texts()) if arm.retriever == "hybrid" else None
    plain = [question.question for question in questions]
    all_texts = []
    for rows in rank_chunks(index, plain, min(len(index), room), words):  # a chunk has a token at least
        texts: list[str] = []
        for row in rows:
            name, start, length = index.span(int(row))
            chunk = with_title(collection[name].title, collection[name].text[start : start + length])
            if len(model.encode("\n\n".join([*texts, chunk]))) > room:
                break
            texts.append(chunk)
        all_texts.append(texts)
    return all_texts


def prompt_groups(
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    arm: Arm,
    cartridges: Mapping[str, Tensor],
    embedder: Embedder | None = None,
) -> Iterator[PromptGroup]:
    """The questions of an arm in groups, with their prompts and what these load.

    ``full_document`` has a group per set of gold documents, whose text is read once for all its questions; every other
    arm is one group.
    """
    if arm.kind != "full_document":
        prompts = build_prompts(model, store, collection, questions, arm, embedder)
        yield PromptGroup(list(questions), prompts, cartridges, store.layout)
        return
    after_text = Layout("offset", model.layout_header, 0)
    for ids in dict.fromkeys(tuple(sorted(q.document_ids)) for q in questions):
        group = [q for q in questions if tuple(sorted(q.document_ids)) == ids]
        text = prompting.whole_documents(model, [collection[i] for i in ids])
        wordings = [question.question + prompting.brief(model) for question in group]
        prompts = [Prompt(model.question_tokens(wording), ("text",)) for wording in wordings]
        yield PromptGroup(group, prompts, {"text": text}, after_text)


def run_arms(
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    arms: Sequence[Arm],
    *,
    cartridges: Mapping[str, Tensor] | None = None,
    embedder: Embedder | None = None,
    seed: int = 0,
    max_new_tokens: int = 32,
    prefix: str = "",
    progress: Callable[[str], None] | None = None,
) -> list[Prediction]:
    """Greedy answers and scores (:data:`METRICS`) of every arm, in the order of the questions.

    Args:
        cartridges: by id, in place of the store's (another training of the same documents).
        prefix: put before the arm's name in the predictions, such as ``joint_``.
        progress: called with the name of every arm that is done.
    Raises: StoreMismatch for another model than the store's.
    """
    store.check_model(model)
    kv = dict(cartridges) if cartridges is not None else {name: store.cartridge(name) for name in store.rows()}
    kv = {name: tensor.to(model.device, model.dtype) for name, tensor in kv.items()}
    place = {question.id: i for i, question in enumerate(questions)}
    predictions: list[Prediction] = []
    for arm in arms:
        name = f"{prefix}{arm}"
        answers: list[Prediction] = []
        for group in prompt_groups(model, store, collection, questions, arm, kv, embedder):
            answers += answer_prompts(model, name, *group, seed, max_new_tokens)
        predictions += sorted(answers, key=lambda p: place[p["question_id"]])
        if progress is not None:
            progress(name)
    return predictions


def answer_prompts(
    model: FrozenModel,
    arm: str,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    cartridges: Mapping[str, Tensor],
    layout: Layout,
    seed: int = 0,
    max_new_tokens: int = 32,
) -> list[Prediction]:
    """Greedy answers to prompts with their scores, in the order of the questions.

    ``arm``: the name under which they are recorded. ``log_perplexity`` is minus the mean log-probability (nats per
    token) of the first gold answer and the end of the turn.
    """
    gold = [[*model.encode(q.answers[0]), *model.template.end_ids] for q in questions]
    answers = answer_texts(model, prompts, cartridges, layout, max_new_tokens)
    likelihoods = log_likelihood(model, prompts, gold, cartridges, layout)
    predictions: list[Prediction] = []
    for question, text, likelihood in zip(questions, answers, likelihoods, strict=True):
        quality = (contains(text, question.answers), f1(text, question.answers), exact_match(text, question.answers))
        scores = dict(zip(METRICS, (*quality, -likelihood), strict=True))
        predictions.append(
            {
                "arm": arm,
                "seed": seed,
                "question_id": question.id,
                "document_id": question.document_ids[0],
                "scores": scores,
                "answer": text,
            }
        )
    return predictions


def answer_texts(
    model: FrozenModel,
    prompts: Sequence[Prompt],
    cartridges: Mapping[str, Tensor],
    layout: Layout,
    max_new_tokens: int = 32,
) -> list[str]:
    """Greedy answers to prompts, in their order."""
    answers = generate(model, prompts, cartridges, layout, max_new_tokens=max_new_tokens)
    return [model.answer_text(answer.ids) for answer in answers]


class CachingEmbedder:
    """An embedder that embeds a text once: the arms of an experiment share chunks and questions."""

    def __init__(self, embedder: Embedder) -> None:
        self.name, self.dimension, self.limit = embedder.name, embedder.dimension, embedder.limit
        self.count = embedder.count
        self._embedder, self._vectors = embedder, dict[tuple[str, bool], np.ndarray]()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension], as the embedder returns."""
        return self._cached(texts, False)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension], as the embedder returns."""
        return self._cached(texts, True)

    def _cached(self, texts: Sequence[str], queries: bool) -> np.ndarray:
        embed = self._embedder.embed_queries if queries else self._embedder.embed
        new = [text for text in dict.fromkeys(texts) if (text, queries) not in self._vectors]
        self._vectors |= {(text, queries): row for text, row in zip(new, embed(new), strict=True)}
        rows = [self._vectors[text, queries] for text in texts]
        return np.stack(rows) if rows else np.zeros((0, self.dimension), np.float32)


def unseen_questions(questions: Sequence[Question], conversations: Conversations) -> list[Question]:
    """The questions whose wording is in no training conversation (case, punctuation and spacing ignored)."""
    trained = {normal(c.question) for items in conversations.by_document.values() for c in items}
    return [q for q in questions if normal(q.question) not in trained]
