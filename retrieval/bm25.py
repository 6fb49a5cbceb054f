"""BM25 beside the vectors: names and numbers that an embedding model never saw are matched literally."""

from __future__ import annotations

import contextlib
import logging
import re
import sys
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import regex

from retrieval.chunk import with_title
from retrieval.index import ChunkIndex
from retrieval.index_files import IndexBroken, body_hash, check_words, write_words

# A letter or number of a script that puts no spaces between words, and Hangul, where particles are attached to words.
UNSPACED = (
    r"[\p{L}\p{N}&&[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Hang}\p{scx=Thai}\p{scx=Laoo}"
    r"\p{scx=Khmr}\p{scx=Mymr}]--[0-9]]"
)
_TERMS_VERSION = 1  # of terms() below: raise it when a text gets other terms
_SPACED = rf"(?:[[\p{{L}}\p{{N}}]--{UNSPACED}]\p{{M}}*)+"
_CHARACTER = regex.compile(r"\P{M}\p{M}*")
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d)")


def _patterns(word: str) -> tuple[str, str]:
    """For runs of letters and numbers ``word``: a term, and the parts of a compound term."""
    decimal = rf"(?<=[0-9])[.,](?=[0-9]){word}"
    return rf"{word}(?:{decimal}|_+{word}|[/-](?=[0-9]){word}|(?<=[0-9])/{word})*[+#]*", rf"{word}(?:{decimal})*"


_ASCII = [re.compile(pattern) for pattern in _patterns("[a-z0-9]+")]  # ten times as fast
_UNICODE = [regex.compile(pattern, regex.V1) for pattern in _patterns(_SPACED)]
_UNICODE[0] = regex.compile(rf"(?P<unspaced>(?:{UNSPACED}\p{{M}}*)+)|{_UNICODE[0].pattern}", regex.V1)


class WordIndex:
    """BM25 (bm25s, its defaults) over the rows of an index, titles included; terms as in :func:`terms`."""

    def __init__(self, index: ChunkIndex, documents: Iterable[tuple[str, str, str]]) -> None:
        """``documents``: the ``(id, title, text)`` that the index was made of. Raises ValueError if they differ."""
        bm25s = _import_bm25s()
        given = {document_id: (title, text) for document_id, title, text in documents}
        if set(given) != set(index.document_ids):
            raise ValueError("a word index needs the documents of its chunk index")
        rows = []
        for row in range(len(index)):
            name, start, length = index.span(row)
            title, text = given[name]
            rows.append(terms(with_title(title, text[start : start + length])))
        self.rows, self._bm25 = len(rows), bm25s.BM25()
        if rows:
            self._bm25.index(rows, show_progress=False)

    @classmethod
    def open(
        cls, index: ChunkIndex, documents: Callable[[], Iterable[tuple[str, str, str]]], folder: str | Path
    ) -> WordIndex:
        """The word index saved in the folder of ``index``, mapped into memory.

        If there is none, or one of other documents, a new one is made of ``documents()`` and saved there if possible.
        """
        try:
            return cls.load(index, folder)
        except IndexBroken:
            words = cls(index, documents())
            with contextlib.suppress(OSError):
                words.save(index, folder)
            return words

    def save(self, index: ChunkIndex, folder: str | Path) -> None:
        """Write the word index into the folder of ``index``, as ``words``."""
        bm25 = self._bm25 if self.rows else None
        write_words(
            Path(folder), _key(index), lambda new: bm25.save(new, show_progress=False) if bm25 is not None else None
        )

    @classmethod
    def load(cls, index: ChunkIndex, folder: str | Path) -> WordIndex:
        """Read what :meth:`save` wrote. Raises :class:`IndexBroken` if missing, damaged, or of other documents."""
        saved, bm25s = check_words(Path(folder), _key(index)), _import_bm25s()
        words = cls.__new__(cls)
        words.rows = len(index)
        words._bm25 = bm25s.BM25.load(saved, mmap=True) if words.rows else bm25s.BM25()
        return words

    def score(self, questions: Sequence[str]) -> np.ndarray:
        """float32 [questions, rows], at least 0; 0 where no word is shared."""
        found = np.zeros((len(questions), self.rows), np.float32)
        for row, question in zip(found, questions):
            if self.rows and (asked := terms(question)):
                row[:] = self._bm25.get_scores(asked)
        return found


def _key(index: ChunkIndex) -> str:
    """Changes with the documents, their chunks, and how terms are made."""
    body = {key: value for key, value in index.body().items() if key != "source"}
    return body_hash({"terms": _TERMS_VERSION, "index": body})


def fuse(dense: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The mean of both scores [questions, rows], each as a share of the question's best: 0 to 1."""
    positive = (np.maximum(x, 0) for x in (dense, words))
    shares = [x / np.maximum(x.max(axis=1, keepdims=True, initial=0), 1e-9) for x in positive]
    return (shares[0] + shares[1]) / 2


def terms(text: str) -> list[str]:
    """The search terms of a text, in order, with repetitions; case and compatibility forms folded (NFKC).

    A word with its combining marks. A number with its decimals (``1.5``; ``1,000`` is ``1000``). A compound with ``_``,
    with ``/`` or ``-`` before a number, or with ``+`` or ``#`` behind it, as a whole and in parts: ``max_connections,
    max, connections``; ``c++, c``. Of scripts without spaces each pair of neighboring characters, or a lone character.
    """
    if text.isascii():
        text, (term, part) = text.lower(), _ASCII
    else:
        text, (term, part) = ascii_digits(unicodedata.normalize("NFKC", text).casefold()), _UNICODE
    found: list[str] = []
    for match in term.finditer(_THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)):
        if match.lastgroup:
            characters = _CHARACTER.findall(match[0])
            found += map("".join, pairwise(characters)) if len(characters) > 1 else characters
        elif match[0].isalnum():
            found.append(match[0])
        else:
            parts = part.findall(match[0])
            found += parts if parts == [match[0]] else [match[0], *parts]
    return found


def ascii_digits(text: str) -> str:
    """The text with the decimal digits of all scripts, and the Arabic decimal and thousands separators, as ASCII."""
    text = regex.sub(r"[^\P{Nd}0-9]", lambda match: str(unicodedata.digit(match[0])), text)
    return text.translate({0x066B: ".", 0x066C: ","})


def _import_bm25s() -> Any:
    """The library, without jax and without its debug log.

    When imported it tries jax, for a search that is not used here; jax takes most of a GPU's memory on its first call.
    """
    hidden = sys.modules.setdefault("jax", None) is None  # type: ignore[arg-type]
    try:
        import bm25s
    finally:
        if hidden:
            del sys.modules["jax"]
    logging.getLogger("bm25s").setLevel(logging.WARNING)  # the library sets DEBUG
    return bm25s
