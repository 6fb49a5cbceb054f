"""From chunk scores to ranked documents: a document scores as its best chunk does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from retrieval.index import ChunkIndex
from retrieval.words import WordIndex, fuse

_BLOCK = 2**24  # scores held at once (64 MiB)


@dataclass(frozen=True)
class Ranked:
    """A document, its score (cosine, -1 to 1; with words, their fusion) and the index row of the chunk that gave it."""

    document_id: str
    score: float
    chunk_row: int


def rank_chunks(index: ChunkIndex, questions: Sequence[str], top: int, words: WordIndex | None = None) -> np.ndarray:
    """For each question the ``top`` best rows, best first, int64 [questions, top]; by vectors, or with ``words`` by both."""
    if words is None:
        return index.search(questions, top)[1]
    scores = fuse(index.score(index.embed(questions)), words.score(questions))
    return np.argsort(-scores, axis=1, kind="stable")[:, :top]


def rank_documents(
    index: ChunkIndex, questions: Sequence[str], k: int, words: WordIndex | None = None
) -> list[list[Ranked]]:
    """For each question the ``k`` best documents, best first; all of them if there are no more than ``k``. By vectors, or
    with ``words`` by both.

    Exact: every chunk is scored. Equal documents come in the order of their ids, equal chunks in that of their rows.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if not questions or not index.document_ids:
        return [[] for _ in questions]
    ids = np.array(index.document_ids, dtype=object)
    alphabetical = np.argsort(np.argsort(ids))  # of each document, its place among the sorted ids
    bounds = index.bounds
    queries = index.embed(questions)
    step = max(1, _BLOCK // len(index))
    ranking: list[list[Ranked]] = []
    for begin in range(0, len(queries), step):
        scores = index.score(queries[begin : begin + step])
        if words is not None:
            scores = fuse(scores, words.score(questions[begin : begin + step]))
        best = np.maximum.reduceat(scores, bounds[:-1], axis=1)  # [questions, documents]
        for row_scores, document_scores in zip(scores, best):
            order = np.lexsort((alphabetical, -document_scores))[:k]
            ranked = []
            for d in order:
                chunk = bounds[d] + row_scores[bounds[d] : bounds[d + 1]].argmax()
                ranked.append(Ranked(ids[d], float(document_scores[d]), int(chunk)))
            ranking.append(ranked)
    return ranking
