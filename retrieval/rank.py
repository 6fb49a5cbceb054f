"""From chunk scores to ranked documents: a document scores as its best chunk does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from retrieval.bm25 import WordIndex, fuse
from retrieval.index import ChunkIndex

_BLOCK = 2**24  # BM25 scores held at once (64 MiB)
_FIRST = 64  # rows that FAISS is asked for at first
_ROUNDING = 1e-5  # FAISS and the exact scores differ by less


@dataclass(frozen=True)
class Ranked:
    """A document, its score (cosine, -1 to 1; with words, their fusion) and the index row of the chunk that gave it."""

    document_id: str
    score: float
    chunk_row: int


def rank_chunks(index: ChunkIndex, questions: Sequence[str], top: int, words: WordIndex | None = None) -> np.ndarray:
    """For each question the ``top`` best rows, best first, int64 [questions, top]; by vectors, or with ``words`` by
    both. Equal rows come in their order."""
    if words is None:
        return index.search(questions, top)[1]
    top = min(top, len(index))
    ranking = np.zeros((len(questions), top), np.int64)
    candidates = _candidates(
        index, questions, words, 2 * top, lambda rows, scores, bound: (scores > bound).sum() >= top
    )
    for best, (rows, scores) in zip(ranking, candidates):
        best[:] = rows[np.argsort(-scores, kind="stable")[:top]]
    return ranking


def rank_documents(
    index: ChunkIndex, questions: Sequence[str], k: int, words: WordIndex | None = None
) -> list[list[Ranked]]:
    """For each question the ``k`` best documents, best first; all of them if there are no more than ``k``.

    By vectors, or with ``words`` by both.

    FAISS is asked for the nearest rows, and for more of them until no other row can change the result: as exact as
    scoring every chunk, but for the rows that an approximate index (:data:`retrieval.index.EXACT_ROWS`) misses.
    Equal documents come in the order of their ids, equal chunks in that of their rows.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    if not questions or not index.document_ids:
        return [[] for _ in questions]
    ids = np.array(index.document_ids, dtype=object)
    alphabetical = np.argsort(np.argsort(ids))  # of each document, its place among the sorted ids

    def documents(rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(index.bounds, rows, side="right") - 1

    def enough(rows: np.ndarray, scores: np.ndarray, bound: float) -> bool:
        return len(np.unique(documents(rows[scores > bound]))) >= k

    ranking: list[list[Ranked]] = []
    for rows, scores in _candidates(index, questions, words, 4 * k, enough):
        best_first = np.lexsort((rows, -scores))
        found, first = np.unique(documents(rows)[best_first], return_index=True)  # each document's best row
        chunks = best_first[first]
        order = np.lexsort((alphabetical[found], -scores[chunks]))[:k]
        ranking.append([Ranked(ids[found[i]], float(scores[chunks[i]]), int(rows[chunks[i]])) for i in order])
    return ranking


def _candidates(
    index: ChunkIndex,
    questions: Sequence[str],
    words: WordIndex | None,
    size: int,
    enough: Callable[[np.ndarray, np.ndarray, float], bool],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each question rows in ascending order and their exact scores: all rows, or as many as it takes until
    ``enough(rows, scores, bound)`` is true, where no other row can score more than ``bound`` (the threshold algorithm
    of Fagin et al., 2001). At first about ``size`` rows."""
    queries = index.embed(questions, queries=True)
    step = max(1, _BLOCK // len(index))
    for begin in range(0, len(queries), step):
        block = queries[begin : begin + step]
        by_words = None if words is None else words.score(questions[begin : begin + step])
        first = _widen(index, max(_FIRST, size))
        nearest = index.nearest(block, first) if first < len(index) else None
        for i in range(len(block)):
            query, reach = block[i : i + 1], first
            near = None if nearest is None else (nearest[0][i], nearest[1][i])
            word_scores = None if by_words is None else by_words[i : i + 1]
            while near is not None:
                rows, scores, bound = _scored(index, query, near, word_scores)
                if enough(rows, scores, bound):
                    break
                reach = _widen(index, 4 * reach)
                near = None
                if reach < len(index):
                    near_scores, near_rows = index.nearest(query, reach)
                    near = near_scores[0], near_rows[0]
            else:
                rows = np.arange(len(index))
                scores = index.score(query)
                scores = (scores if word_scores is None else fuse(scores, word_scores))[0]
            yield rows, scores


def _widen(index: ChunkIndex, wanted: int) -> int:
    """How many rows to ask for: all of them where a large part would be."""
    return wanted if 4 * wanted < len(index) else len(index)


def _scored(
    index: ChunkIndex, query: np.ndarray, near: tuple[np.ndarray, np.ndarray], word_scores: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, float]:
    """The nearest rows, and as many of the best by words, with their exact scores; and what no other row can exceed."""
    rows = np.sort(near[1][near[1] >= 0])
    furthest = float(near[0][near[1] >= 0][-1]) + _ROUNDING
    if word_scores is None:
        return rows, index.score(query, rows)[0], furthest
    by_words = np.argpartition(-word_scores[0], len(rows))[: len(rows) + 1]
    rows = np.union1d(rows, by_words)
    exact, of_words = index.score(query, rows), word_scores[:, rows]
    highest = [max(float(scores.max()), 1e-9) for scores in (exact, of_words)]
    bound = max(furthest, 0) / highest[0] + float(word_scores[0, by_words].min()) / highest[1]
    return rows, fuse(exact, of_words)[0], bound / 2 + _ROUNDING
