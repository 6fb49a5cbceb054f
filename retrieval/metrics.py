"""Retrieval metrics over document ids. All are fractions from 0 to 1, never percent."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence


def recall_at_k(ranked_ids: Sequence[str], relevant_ids: Collection[str], k: int) -> float:
    """The share of the relevant documents that are among the first ``k`` ranked."""
    relevant = _relevant(relevant_ids)
    return len(relevant.intersection(_first(ranked_ids, k))) / len(relevant)


def hit_at_k(ranked_ids: Sequence[str], relevant_ids: Collection[str], k: int) -> float:
    """1.0 if any relevant document is among the first ``k`` ranked, else 0.0."""
    return float(not _relevant(relevant_ids).isdisjoint(_first(ranked_ids, k)))


def reciprocal_rank(ranked_ids: Sequence[str], relevant_ids: Collection[str]) -> float:
    """1 / the rank (from 1) of the first relevant document; 0.0 if none is ranked."""
    relevant = _relevant(relevant_ids)
    return next((1.0 / rank for rank, name in enumerate(ranked_ids, 1) if name in relevant), 0.0)


def ndcg_at_k(ranked_ids: Sequence[str], relevant_ids: Collection[str], k: int) -> float:
    """Normalized discounted cumulative gain of the first ``k`` ranked (Järvelin and Kekäläinen, 2002), a gain of 1 for
    each relevant document, discounted by log2(rank + 1)."""
    relevant = _relevant(relevant_ids)
    gain = sum(1 / math.log2(rank + 1) for rank, name in enumerate(_first(ranked_ids, k), 1) if name in relevant)
    return gain / sum(1 / math.log2(rank + 1) for rank in range(1, min(k, len(relevant)) + 1))


def summarize(
    list_of_ranked: Sequence[Sequence[str]], list_of_relevant: Sequence[Collection[str]], ks: Sequence[int] = (1, 4, 10)
) -> dict[str, float]:
    """Means over the questions: ``{"recall@1": ..., "recall@4": ..., "recall@10": ..., "mrr": ...}``.

    ``mrr`` sees as far as the rankings given: rank all documents for the full value.
    Raises ValueError for no questions, lists of unequal length, a question without relevant documents, or k < 1.
    """
    pairs = list(zip(list_of_ranked, list_of_relevant))
    if not pairs or len(list_of_ranked) != len(list_of_relevant):
        raise ValueError(
            f"need one ranking and one set of relevant documents per question, "
            f"not {len(list_of_ranked)} rankings and {len(list_of_relevant)} sets"
        )
    result = {f"recall@{k}": sum(recall_at_k(*pair, k) for pair in pairs) / len(pairs) for k in ks}
    return result | {"mrr": sum(reciprocal_rank(*pair) for pair in pairs) / len(pairs)}


def _relevant(relevant_ids: Collection[str]) -> set[str]:
    if isinstance(relevant_ids, str) or not relevant_ids:
        raise ValueError(f"relevant documents must be a non-empty collection of ids, not {relevant_ids!r}")
    return set(relevant_ids)


def _first(ranked_ids: Sequence[str], k: int) -> Sequence[str]:
    if k < 1:
        raise ValueError(f"k must be at least 1, not {k}")
    return ranked_ids[:k]
