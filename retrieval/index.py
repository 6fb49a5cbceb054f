"""An exact inner-product index over the chunks of a collection, kept in two files that are replaced together.

``index.faiss`` holds the vectors (FAISS IndexFlatIP), ``chunks.json`` what each row stands for. The texts themselves
are not stored: a row names its document, the offset and the length, and each document has the hash of its content.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retrieval.chunk import Chunk, chunk_document, content_hash, with_title
from retrieval.embed import Embedder
from retrieval.files import IndexBroken, read_index, write_index


@dataclass(frozen=True)
class Entry:
    """One indexed document: its content hash and the ``(start, length)`` of its chunks, in characters."""

    hash: str
    spans: tuple[tuple[int, int], ...]


class ChunkIndex:
    """Chunks of documents and their unit vectors, one row per chunk, the rows of a document next to each other.

    Attributes: ``embedder``; ``words`` and ``overlap`` of the chunks; ``entries``, ``{document id: Entry}`` in row
    order; ``document_ids``; ``bounds`` int64 [documents + 1], document d has the rows bounds[d] to bounds[d + 1];
    ``vectors`` float32 [rows, dimension].
    """

    def __init__(
        self, documents: Iterable[tuple[str, str, str]], embedder: Embedder, words: int = 120, overlap: int = 1
    ) -> None:
        """Chunk and embed ``documents``, ``(id, title, text)`` each. Raises ValueError for an id given twice."""
        self.embedder, self.words, self.overlap = embedder, words, overlap
        self._set({}, np.zeros((0, embedder.dimension), np.float32))
        self.update(documents)

    def __len__(self) -> int:
        """The number of rows (chunks)."""
        return int(self.bounds[-1])

    def _set(self, entries: dict[str, Entry], vectors: np.ndarray) -> None:
        import faiss

        self.entries, self.vectors = entries, vectors
        self.document_ids = list(entries)
        self.bounds = np.cumsum([0, *(len(entry.spans) for entry in entries.values())], dtype=np.int64)
        self._faiss = faiss.IndexFlatIP(self.embedder.dimension)
        self._faiss.add(vectors)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [texts, dimension]; ValueError if the embedder breaks its promise of unit rows."""
        name, shape = self.embedder.name, (len(texts), self.embedder.dimension)
        vectors = np.asarray(self.embedder.embed(list(texts)), np.float32) if texts else np.zeros(shape, np.float32)
        if vectors.shape != shape or not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
            raise ValueError(f"embedder {name!r} must return {shape[0]} unit rows of {shape[1]}, not {vectors.shape}")
        return np.ascontiguousarray(vectors)

    def span(self, row: int) -> tuple[str, int, int]:
        """The document id, start and length (characters) of a row."""
        document = int(np.searchsorted(self.bounds, row, side="right")) - 1
        document_id = self.document_ids[document]
        return document_id, *self.entries[document_id].spans[row - int(self.bounds[document])]

    def search(self, texts: Sequence[str], top: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``top`` best rows (all rows if fewer): scores float32 and rows int64, both [texts, top], best first."""
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}")
        top = min(top, len(self))
        if not top or not texts:
            return np.zeros((len(texts), top), np.float32), np.zeros((len(texts), top), np.int64)
        return self._faiss.search(self.embed(texts), top)

    def score(self, queries: np.ndarray) -> np.ndarray:
        """Inner products of ``queries``, float32 [Q, dimension], with every row: float32 [Q, rows].

        einsum and not a matrix product: BLAS rounds by position in the matrix, and equal chunks must score equal.
        """
        return np.einsum("qd,nd->qn", np.ascontiguousarray(queries, np.float32), self.vectors)

    def update(self, documents: Iterable[tuple[str, str, str]]) -> list[str]:
        """Make the index one of exactly ``documents``; returns the ids that were embedded.

        A document whose title and text are unchanged keeps its vectors bit for bit; one that is missing is dropped.
        If embedding fails the index stays as it was. Raises ValueError for an id given twice.
        """
        entries: dict[str, Entry] = {}
        fresh: dict[str, list[str]] = {}  # document id -> what to embed
        for document_id, title, text in documents:
            if document_id in entries:
                raise ValueError(f"two documents have the id {document_id!r}; ids must differ")
            entry = self.entries.get(document_id)
            if entry is None or entry.hash != content_hash(title, text):
                # A blank document keeps one row, its title, so that every document can be ranked.
                chunks = chunk_document(document_id, text, self.words, self.overlap) or [Chunk(document_id, 0, "")]
                spans = tuple((chunk.start, len(chunk.text)) for chunk in chunks)
                entry = Entry(content_hash(title, text), spans)
                fresh[document_id] = [with_title(title, chunk.text) for chunk in chunks]
            entries[document_id] = entry
        embedded = self.embed([text for texts in fresh.values() for text in texts])
        old, place, used, blocks = self.vectors, dict(zip(self.document_ids, self.bounds)), 0, [embedded[:0]]
        for document_id, entry in entries.items():
            count = len(entry.spans)
            if document_id in fresh:
                blocks.append(embedded[used : used + count])
                used += count
            else:
                blocks.append(old[place[document_id] : place[document_id] + count])
        self._set(entries, np.concatenate(blocks))
        return list(fresh)

    def save(self, folder: str | Path) -> None:
        """Write the index as ``folder``, replacing an index there. A crash leaves the old one or the new one, whole.

        One writer at a time. Raises FileExistsError if the folder holds anything but an index.
        """
        import faiss

        body = {
            "embedder": self.embedder.name,
            "dimension": self.embedder.dimension,
            "words": self.words,
            "overlap": self.overlap,
            "documents": [
                {"id": name, "hash": entry.hash, "spans": entry.spans} for name, entry in self.entries.items()
            ],
        }
        write_index(Path(folder), faiss.serialize_index(self._faiss).tobytes(), body)

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder) -> ChunkIndex:
        """Read what :meth:`save` wrote. Raises :class:`IndexBroken` if missing, damaged or of another embedder."""
        import faiss

        data, body = read_index(Path(folder))
        if (body["embedder"], body["dimension"]) != (embedder.name, embedder.dimension):
            made, now = f"{body['embedder']} ({body['dimension']})", f"{embedder.name} ({embedder.dimension})"
            raise IndexBroken(folder, f"it was made with the embedder {made}, not {now}")
        entries = {
            document["id"]: Entry(document["hash"], tuple((start, length) for start, length in document["spans"]))
            for document in body["documents"]
        }
        stored = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        if (stored.d, stored.ntotal) != (embedder.dimension, sum(len(entry.spans) for entry in entries.values())):
            raise IndexBroken(folder, "index.faiss and chunks.json have different row counts")
        index = cls([], embedder, body["words"], body["overlap"])
        index._set(entries, stored.reconstruct_n(0, stored.ntotal) if entries else index.vectors)
        return index
