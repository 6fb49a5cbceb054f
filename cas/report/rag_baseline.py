"""The RAG baseline, as strong as we can make it, at any budget of prompt tokens.

Chunks of whole sentences, ranked by vectors, BM25 or both, best first, as many as the budget holds. The size of a
chunk, its overlap, the ranking, and whether titles go before chunks are chosen on validation questions.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from cas.model.frozen import FrozenModel
from retrieval import ChunkIndex, Embedder, Ranked, WordIndex, rank_chunks, rank_documents, with_title

Ranking = Literal["vectors", "words", "both"]
RANKINGS: tuple[Ranking, ...] = ("vectors", "words", "both")


@dataclass(frozen=True)
class Setting:
    """How chunks are made and ranked."""

    words: int = 80
    """Words of a chunk, at most; and no more tokens than the embedder reads (:class:`retrieval.ChunkIndex`)."""
    ranking: Ranking = "both"
    """By vectors, by words (BM25), or by both (mean of the shares of the best score)."""
    titles: bool = True
    """Whether the document's title goes before each chunk, its tokens counted."""
    overlap: int = 1
    """Sentences that a chunk shares with the one before."""

    def __str__(self) -> str:
        by = {"vectors": "vectors", "words": "BM25", "both": "vectors and BM25"}[self.ranking]
        titles = "with titles" if self.titles else "without titles"
        return f"chunks of {self.words} words, overlap {self.overlap}, by {by}, {titles}"


# Searched one field after the other, keeping the best so far: a full grid would cost six times as much.
CHOICES: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("words", (20, 40, 80, 160, 320)),
    ("ranking", ("both", "vectors", "words")),
    ("titles", (True, False)),
    ("overlap", (1, 0, 3)),
)
SETTINGS_TRIED = sum(len(values) - 1 for _, values in CHOICES) + 1


class Rag:
    """Chunk indexes over one collection, built on first use."""

    def __init__(self, model: FrozenModel, documents: Sequence[tuple[str, str, str]], embedder: Embedder) -> None:
        """``documents``: ``(id, title, text)`` each."""
        self.model, self.documents, self.embedder = model, list(documents), embedder
        self._texts = {i: (title, text) for i, title, text in self.documents}
        self._indexes: dict[tuple[int, int], tuple[ChunkIndex, WordIndex]] = {}

    def index(self, setting: Setting) -> tuple[ChunkIndex, WordIndex]:
        """The chunks of a setting, as vectors and as words."""
        key = setting.words, setting.overlap
        if key not in self._indexes:
            index = ChunkIndex(self.documents, self.embedder, words=setting.words, overlap=setting.overlap)
            self._indexes[key] = index, WordIndex(index, self.documents)
        return self._indexes[key]

    def chunks(self, questions: Sequence[str], setting: Setting, tokens: int) -> list[list[str]]:
        """For each question the best chunks that have at most ``tokens`` tokens together, with blank lines and titles.

        The first chunk that does not fit ends the list; if that is the best one, it is cut to fit.
        """
        index, words = self.index(setting)
        top = min(len(index), max(1, tokens // 8))  # shorter chunks are rare
        if setting.ranking == "words":
            best = np.argsort(-words.score(questions), axis=1, kind="stable")[:, :top]
        else:
            best = rank_chunks(index, questions, top, words if setting.ranking == "both" else None)
        chosen = []
        for rows in best:
            texts: list[str] = []
            for row in rows:
                name, start, length = index.span(int(row))
                title, text = self._texts[name]
                chunk = text[start : start + length]
                chunk = with_title(title, chunk) if setting.titles else chunk
                if len(self.model.encode("\n\n".join([*texts, chunk]))) > tokens:
                    if not texts:
                        texts.append(self._cut(chunk, tokens))
                    break
                texts.append(chunk)
            chosen.append(texts)
        return chosen

    def _cut(self, text: str, tokens: int) -> str:
        """The first words of the text that have at most ``tokens`` tokens."""
        words = re.findall(r"\S+\s*", text)
        most = bisect_right(range(1, len(words) + 1), tokens, key=lambda n: len(self.model.encode("".join(words[:n]))))
        return "".join(words[:most]).rstrip()

    def documents_by(self, ranking: Ranking, questions: Sequence[str], k: int, setting: Setting) -> list[list[Ranked]]:
        """The k best documents of each question by their best chunk, under one ranking."""
        index, words = self.index(setting)
        if ranking != "words":
            return rank_documents(index, questions, k, words if ranking == "both" else None)
        scores = words.score(questions)
        best = np.maximum.reduceat(scores, index.bounds[:-1], axis=1)
        order = np.argsort(-best, axis=1, kind="stable")[:, :k]
        return [
            [Ranked(index.document_ids[d], float(row[d]), -1) for d in best_documents]
            for row, best_documents in zip(best, order, strict=True)
        ]


def tune(score: Callable[[Setting], float], start: Setting | None = None) -> tuple[Setting, list[dict[str, Any]]]:
    """Search the setting that scores best, one field of CHOICES after the other; ties go to the one tried first.

    Returns: the best setting, and every setting tried with its score.
    """
    best = start or Setting()
    tried: dict[Setting, float] = {}
    for field, values in CHOICES:
        for value in values:
            setting = replace(best, **{field: value})
            if setting not in tried:
                tried[setting] = score(setting)
        best = max(tried, key=lambda s: tried[s])
    return best, [asdict(s) | {"score": round(v, 4)} for s, v in tried.items()]
