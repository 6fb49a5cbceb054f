"""BM25 beside the vectors: names and numbers that an embedding model has never met are found by their letters."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from retrieval.chunk import with_title
from retrieval.index import ChunkIndex


class WordIndex:
    """BM25 (bm25s, its defaults) over the rows of an index: lower-case words, nothing left out, titles counted."""

    def __init__(self, index: ChunkIndex, documents: Iterable[tuple[str, str, str]]) -> None:
        """``documents``: the same ``(id, title, text)`` that the index was made of. Raises ValueError if they differ."""
        bm25s = _import_bm25s()
        given = {document_id: (title, text) for document_id, title, text in documents}
        if set(given) != set(index.document_ids):
            raise ValueError("a word index needs the documents of its chunk index")
        rows = []
        for row in range(len(index)):
            name, start, length = index.span(row)
            title, text = given[name]
            rows.append(_words(with_title(title, text[start : start + length])))
        self.rows, self._bm25 = len(rows), bm25s.BM25()
        if rows:
            self._bm25.index(rows, show_progress=False)

    def score(self, questions: Sequence[str]) -> np.ndarray:
        """float32 [questions, rows], at least 0; 0 where no word is shared."""
        found = np.zeros((len(questions), self.rows), np.float32)
        for row, question in zip(found, questions):
            if self.rows and (asked := _words(question)):
                row[:] = self._bm25.get_scores(asked)
        return found


def fuse(dense: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The mean of both scores [questions, rows], each as a share of the question's best: 0 to 1."""
    positive = (np.maximum(x, 0) for x in (dense, words))
    shares = [x / np.maximum(x.max(axis=1, keepdims=True, initial=0), 1e-9) for x in positive]
    return (shares[0] + shares[1]) / 2


def _import_bm25s() -> Any:
    """The library, without jax: it tries jax when it is imported, for a search that is not used here, and jax takes most of a
    GPU's memory on its first call."""
    hidden = sys.modules.setdefault("jax", None) is None  # type: ignore[arg-type]
    try:
        import bm25s
    finally:
        if hidden:
            del sys.modules["jax"]
    return bm25s


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())
