"""One way to answer questions under every arm, and to score the answers."""

from __future__ import annotations

import resource
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from random import Random
from typing import Any

import numpy as np
from torch import Tensor

from cas.answering import prompts as prompting
from cas.answering.answerer import open_index
from cas.data.collection import Collection, Question
from cas.evaluation.metrics import contains, exact_match, f1
from cas.evaluation.recording import Prediction
from cas.model.decoding import Prompt, generate, log_likelihood
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.seed_prompts import normal
from cas.store.store import Store
from retrieval import ChunkIndex, Embedder, SentenceEmbedder, WordIndex, rank_chunks, rank_documents, with_title

METRICS = ("contains", "f1", "exact_match", "log_perplexity")


def build_prompts(
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    arm: str,
    embedder: Embedder | None = None,
) -> list[Prompt]:
    """The prompts of one arm, with "answer in a few words" in every one.

    Arms: ``no_context``; ``oracle``: the gold documents' cartridges; ``loaded``: every cartridge of the store;
    ``loaded<k>``: the gold ones and others, k in all, drawn at random or (``_nearest``) the next best by retrieval,
    ``_reversed`` in the reverse of the usual order; ``absent<k>``: k others alone; ``retrieved<k>``: the k best by retrieval;
    ``rag``: the best chunks that fit into as many tokens as four of the store's largest cartridges, titles counted;
    ``rag<n>``: chunks of about n words in three times as many. ``_hybrid`` behind the last three: by vectors and words.
    """
    asked = [q.question + prompting.brief(model) for q in questions]
    rows = store.rows()
    if arm == "no_context":
        return [prompting.no_context(model, a) for a in asked]
    if arm == "oracle":
        return [prompting.cartridges(model, a, q.document_ids) for a, q in zip(asked, questions, strict=True)]
    if arm == "loaded":
        return [prompting.cartridges(model, a, list(rows)) for a in asked]
    if arm.startswith(("loaded", "absent")) and not arm.endswith("_nearest"):
        count = int(arm.removesuffix("_reversed")[6:])
        prompts = []
        for a, q in zip(asked, questions, strict=True):
            own = [] if arm.startswith("absent") else list(q.document_ids)
            others = [name for name in rows if name not in q.document_ids]
            some = [*own, *Random(f"others/{q.id}").sample(others, count - len(own))]
            prompt = prompting.cartridges(model, a, some)
            prompts.append(Prompt(prompt.tokens, prompt.cartridges[:: -1 if arm.endswith("_reversed") else 1]))
        return prompts
    plain = [q.question for q in questions]
    arm, hybrid = arm.removesuffix("_hybrid"), arm.endswith("_hybrid")
    size = arm.removeprefix("rag") if arm.startswith("rag") else ""
    if size:
        index = ChunkIndex(store.texts(), embedder or SentenceEmbedder(), words=int(size))
    else:
        index = open_index(store, embedder)
    words = WordIndex(index, store.texts()) if hybrid else None
    if arm.startswith("loaded"):
        count = int(arm.removesuffix("_nearest").removeprefix("loaded"))
        ranked = rank_documents(index, plain, count + 2)
        return [
            prompting.cartridges(
                model,
                a,
                [*q.document_ids, *[r.document_id for r in best if r.document_id not in q.document_ids]][:count],
            )
            for a, q, best in zip(asked, questions, ranked, strict=True)
        ]
    if arm.startswith("retrieved"):
        ranked = rank_documents(index, plain, int(arm.removeprefix("retrieved")), words)
        return [
            prompting.cartridges(model, a, [r.document_id for r in best]) for a, best in zip(asked, ranked, strict=True)
        ]
    assert arm.startswith("rag"), arm
    room = (12 if size else 4) * store.layout.span
    best_rows = rank_chunks(index, plain, min(len(index), room), words)  # a chunk has a token at least
    prompts = []
    for a, best in zip(asked, best_rows, strict=True):
        texts: list[str] = []
        for row in best:
            name, start, length = index.span(int(row))
            chunk = with_title(collection[name].title, collection[name].text[start : start + length])
            if len(model.encode("\n\n".join([*texts, chunk]))) > room:
                break
            texts.append(chunk)
        prompts.append(prompting.text_context(model, a, texts))
    return prompts


def groups(
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    arm: str,
    cartridges: Mapping[str, Tensor],
    embedder: Embedder | None = None,
) -> Iterator[tuple[list[Question], list[Prompt], Mapping[str, Tensor], Layout]]:
    """The questions of an arm in groups, with their prompts and what these load.

    ``full_document`` (the gold documents' text) is a group per set of documents, read once for all its questions; every
    other arm of :func:`build_prompts` is one group.
    """
    if arm != "full_document":
        yield (
            list(questions),
            build_prompts(model, store, collection, questions, arm, embedder),
            cartridges,
            store.layout,
        )
        return
    behind_the_text = Layout("offset", model.layout_header, 0)
    for ids in dict.fromkeys(tuple(sorted(q.document_ids)) for q in questions):
        about = [q for q in questions if tuple(sorted(q.document_ids)) == ids]
        text = prompting.whole_documents(model, [collection[i] for i in ids])
        prompts = [Prompt(model.question_tokens(q.question + prompting.brief(model)), ("text",)) for q in about]
        yield about, prompts, {"text": text}, behind_the_text


def run_arms(
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    arms: Sequence[str],
    *,
    cartridges: Mapping[str, Tensor] | None = None,
    embedder: Embedder | None = None,
    seed: int = 0,
    max_new_tokens: int = 32,
    prefix: str = "",
    progress: Callable[[str], None] | None = None,
) -> list[Prediction]:
    """Greedy answers and gold log-perplexities of every arm.

    Args:
        cartridges: by id, in place of the store's (another training of the same documents).
        prefix: put before the arm's name in the predictions.
    ``log_perplexity``: minus the mean log-probability (nats per token) of the first gold answer and the end of the turn.
    """
    store.check_model(model)
    kv = dict(cartridges) if cartridges is not None else {name: store.cartridge(name) for name in store.rows()}
    kv = {name: tensor.to(model.device, model.dtype) for name, tensor in kv.items()}
    predictions: list[Prediction] = []
    for arm in arms:
        found: list[Prediction] = []
        for about, prompts, loaded, layout in groups(model, store, collection, questions, arm, kv, embedder):
            found += answered(model, prefix + arm, about, prompts, loaded, layout, seed, max_new_tokens)
        place = {q.id: i for i, q in enumerate(questions)}
        predictions += sorted(found, key=lambda p: place[p["question_id"]])
        if progress is not None:
            progress(prefix + arm)
    return predictions


def answered(
    model: FrozenModel,
    arm: str,
    questions: Sequence[Question],
    prompts: Sequence[Prompt],
    loaded: Mapping[str, Tensor],
    layout: Layout,
    seed: int = 0,
    max_new_tokens: int = 32,
) -> list[Prediction]:
    """Greedy answers to prompts, scored: those of :data:`METRICS`, in the order of the questions."""
    gold = [[*model.encode(q.answers[0]), *model.template.end_ids] for q in questions]
    answers = generate(model, prompts, loaded, layout, max_new_tokens=max_new_tokens)
    likelihoods = log_likelihood(model, prompts, gold, loaded, layout)
    found: list[Prediction] = []
    for q, answer, likelihood in zip(questions, answers, likelihoods, strict=True):
        text = model.decode(answer.ids)
        scores = {
            "contains": contains(text, q.answers),
            "f1": f1(text, q.answers),
            "exact_match": exact_match(text, q.answers),
            "log_perplexity": -likelihood,
        }
        found.append(
            {
                "arm": arm,
                "seed": seed,
                "question_id": q.id,
                "document_id": q.document_ids[0],
                "scores": scores,
                "answer": text,
            }
        )
    return found


def overlap_scores(text: str, answers: Sequence[str]) -> dict[str, float]:
    """``rouge_l`` (F-measure, stemmed; rouge-score) and ``chrf`` (chrF2; sacrebleu), 0 to 1, best over the gold answers: for
    answers that are sentences, where exact match says nothing."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import CHRF

    rouge = RougeScorer(["rougeL"], use_stemmer=True).score_multi(list(answers), text)["rougeL"].fmeasure
    chrf = max(CHRF().sentence_score(text, [answer]).score for answer in answers)
    return {"rouge_l": float(rouge), "chrf": min(1.0, chrf / 100)}


class CachingEmbedder:
    """An embedder that embeds a text once: the arms of an experiment share chunks and questions."""

    def __init__(self, embedder: Embedder) -> None:
        self.name, self.dimension = embedder.name, embedder.dimension
        self._embedder, self._known = embedder, dict[str, np.ndarray]()

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension], as of the embedder."""
        new = [text for text in dict.fromkeys(texts) if text not in self._known]
        self._known |= dict(zip(new, self._embedder.embed(new), strict=True))
        return np.stack([self._known[text] for text in texts]) if texts else np.zeros((0, self.dimension), np.float32)


def unseen(questions: Sequence[Question], conversations: Conversations) -> list[Question]:
    """The questions whose wording no training conversation has (case, punctuation and spacing ignored)."""
    asked = {normal(c.question) for items in conversations.by_document.values() for c in items}
    return [q for q in questions if normal(q.question) not in asked]


class PeakMemory:
    """Peak anonymous memory of this process while inside, in bytes, sampled twice a second; where the system does not
    tell, the peak resident size."""

    peak = 0

    def __enter__(self) -> PeakMemory:
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            if self._done.wait(0.5):
                return

    @staticmethod
    def now() -> int:
        try:
            with open("/proc/self/status") as status:
                return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))
        except (OSError, StopIteration):
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            return peak if sys.platform == "darwin" else peak * 1024

    def __exit__(self, *exc: Any) -> None:
        self._done.set()
        self._thread.join()
        self.peak = max(self.peak, self.now())
