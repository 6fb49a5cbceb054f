"""An inner-product index over the chunks of a collection, kept in two files that are replaced together.

``index.faiss`` holds the vectors (FAISS, exact up to 100,000 rows, HNSW beyond), ``chunks.json`` what each row stands
for. The texts themselves are not stored: a row names its document, the offset and the length, and each document has the
hash of its content.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from retrieval.chunk import Chunk, chunk_document, content_hash, truncate, with_title
from retrieval.embed import Embedder
from retrieval.index_files import IndexBroken, OtherEmbedder, read_index, write_index

MAX_TOKENS = 256  # of a chunk with its title, so that chunks stay comparable where an embedder reads more
EXACT_ROWS = 100_000  # more rows are searched approximately
_BLOCK = 256  # chunks embedded between two reports of progress
_SAVE_SECONDS = 60.0  # the least time between two checkpoints


@dataclass(frozen=True)
class Entry:
    """One indexed document: its content hash and the ``(start, length)`` of its chunks, in characters."""

    hash: str
    spans: tuple[tuple[int, int], ...]


class ChunkIndex:
    """Chunks of documents and their unit vectors, one row per chunk, the rows of a document next to each other.

    A chunk has at most ``words`` words and, with its title, at most as many tokens as the embedder reads, 256 at most
    (a title takes a quarter of them at most, the rest of it is not embedded).

    Attributes: ``embedder``; ``words`` and ``overlap`` of the chunks; ``limit``, their tokens, None where the embedder
    has no limit; ``entries``, ``{document id: Entry}`` in row order; ``document_ids``; ``bounds`` int64
    [documents + 1], document d has the rows bounds[d] to bounds[d + 1]; ``vectors`` float32 [rows, dimension];
    ``source``, what the caller says that the documents were, saved with them.
    """

    source = ""

    def __init__(
        self, documents: Iterable[tuple[str, str, str]], embedder: Embedder, words: int = 120, overlap: int = 1
    ) -> None:
        """Chunk and embed ``documents``, ``(id, title, text)`` each. Raises ValueError for an id given twice."""
        self.embedder, self.words, self.overlap = embedder, words, overlap
        self.limit = None if embedder.limit is None else min(embedder.limit, MAX_TOKENS)
        self._set({}, np.zeros((0, embedder.dimension), np.float32))
        self.update(documents)

    def __len__(self) -> int:
        """The number of rows (chunks)."""
        return int(self.bounds[-1])

    def _set(self, entries: dict[str, Entry], vectors: np.ndarray, stored: Any = None) -> None:
        import faiss

        self.entries = entries
        self.document_ids = list(entries)
        self.bounds = np.cumsum([0, *(len(entry.spans) for entry in entries.values())], dtype=np.int64)
        self.exact = len(self) <= EXACT_ROWS
        if stored is None:
            if self.exact:
                stored = faiss.IndexFlatIP(self.embedder.dimension)
            else:
                stored = faiss.IndexHNSWFlat(self.embedder.dimension, 32, faiss.METRIC_INNER_PRODUCT)
                stored.hnsw.efConstruction = 80
            stored.add(vectors)
        self._faiss = stored
        self.vectors = _vectors(stored) if len(self) else vectors

    def embed(self, texts: Sequence[str], queries: bool = False) -> np.ndarray:
        """float32 [texts, dimension], of documents or of questions. Raises ValueError if a row has not length 1."""
        name, shape = self.embedder.name, (len(texts), self.embedder.dimension)
        embed = self.embedder.embed_queries if queries else self.embedder.embed
        vectors = np.asarray(embed(list(texts)), np.float32) if texts else np.zeros(shape, np.float32)
        if vectors.shape != shape or not np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3):
            raise ValueError(f"embedder {name!r} must return {shape[0]} unit rows of {shape[1]}, not {vectors.shape}")
        return np.ascontiguousarray(vectors)

    def span(self, row: int) -> tuple[str, int, int]:
        """The document id, start and length (characters) of a row."""
        document = int(np.searchsorted(self.bounds, row, side="right")) - 1
        document_id = self.document_ids[document]
        return document_id, *self.entries[document_id].spans[row - int(self.bounds[document])]

    def search(self, texts: Sequence[str], top: int) -> tuple[np.ndarray, np.ndarray]:
        """The ``top`` best rows for each question, or all rows if there are fewer, best first.

        Returns: scores float32 and rows int64, both [texts, top].
        """
        if top < 1:
            raise ValueError(f"top must be at least 1, not {top}")
        return self.nearest(self.embed(texts, queries=True), top)

    def nearest(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """As :meth:`search`, for vectors float32 [Q, dimension]. Row -1 where the approximate search found no more."""
        import faiss

        top = min(top, len(self))
        if not top or not len(queries):
            return np.zeros((len(queries), top), np.float32), np.zeros((len(queries), top), np.int64)
        if self.exact:
            return self._faiss.search(queries, top)
        wide = faiss.SearchParametersHNSW(efSearch=max(256, 2 * top))  # type: ignore[attr-defined]
        return self._faiss.search(queries, top, params=wide)

    def score(self, queries: np.ndarray, rows: np.ndarray | None = None) -> np.ndarray:
        """Inner products of ``queries``, float32 [Q, dimension], with ``rows`` or every row: float32 [Q, rows].

        einsum and not a matrix product: BLAS rounds by position in the matrix, and equal chunks must score equal.
        """
        vectors = self.vectors if rows is None else self.vectors[rows]
        return np.einsum("qd,nd->qn", np.ascontiguousarray(queries, np.float32), vectors)

    def update(
        self,
        documents: Iterable[tuple[str, str, str]],
        progress: Callable[[int, int], None] | None = None,
        checkpoint: Callable[[], None] | None = None,
    ) -> list[str]:
        """Make the index one of exactly ``documents``; returns the ids that were embedded.

        A document whose title and text are unchanged keeps its vectors bit for bit; one that is missing is dropped.

        Args:
            progress: called with the chunks embedded so far and all that are to be, after every block.
            checkpoint: called about once a minute and when the update fails or is interrupted, with this index holding
                what is embedded so far: save it, and the next update goes on from there. Without it, an update that
                fails changes nothing.
        Raises: ValueError for an id given twice.
        """
        entries: dict[str, Entry] = {}
        fresh: dict[str, list[str]] = {}  # document id -> what to embed
        for document_id, title, text in documents:
            if document_id in entries:
                raise ValueError(f"two documents have the id {document_id!r}; ids must differ")
            entry = self.entries.get(document_id)
            if entry is None or entry.hash != content_hash(title, text):
                chunks, fresh[document_id] = self._chunks(document_id, title, text)
                entry = Entry(content_hash(title, text), tuple((chunk.start, len(chunk.text)) for chunk in chunks))
            entries[document_id] = entry
        if list(entries) == self.document_ids and not fresh:
            return []
        rows = {name: self.vectors[start:end] for name, start, end in zip(self.entries, self.bounds, self.bounds[1:])}
        rows = {name: vectors for name, vectors in rows.items() if name in entries and name not in fresh}
        total, done = sum(map(len, fresh.values())), 0
        next_save = time.monotonic() + _SAVE_SECONDS

        def keep() -> None:
            if checkpoint is not None and done:
                self._join({name: entry for name, entry in entries.items() if name in rows}, rows)
                checkpoint()

        try:
            for block in _blocks(fresh):
                vectors, used = self.embed([text for name in block for text in fresh[name]]), 0
                for name in block:
                    rows[name] = vectors[used : used + len(fresh[name])]
                    used += len(fresh[name])
                done += used
                if progress is not None:
                    progress(done, total)
                if (started := time.monotonic()) >= next_save:
                    keep()
                    ended = time.monotonic()
                    next_save = ended + max(_SAVE_SECONDS, 10 * (ended - started))  # saving takes a tenth at most
        except BaseException:
            keep()
            raise
        self._join(entries, rows)
        return list(fresh)

    def absorb(self, others: Iterable[ChunkIndex]) -> None:
        """Take over the documents of indexes that were made with the same embedder and sizes, vectors bit for bit."""
        entries, rows = dict[str, Entry](), dict[str, np.ndarray]()
        for index in (self, *others):
            assert (index.embedder.name, index.words, index.overlap) == (self.embedder.name, self.words, self.overlap)
            entries |= index.entries
            rows |= {name: index.vectors[a:b] for name, a, b in zip(index.entries, index.bounds, index.bounds[1:])}
        self._join(entries, rows)

    def _join(self, entries: dict[str, Entry], rows: dict[str, np.ndarray]) -> None:
        none = np.zeros((0, self.embedder.dimension), np.float32)
        self._set(entries, np.concatenate([none, *(rows[name] for name in entries)]))

    def _chunks(self, document_id: str, title: str, text: str) -> tuple[list[Chunk], list[str]]:
        """A document's chunks, and each with the title, as it is embedded. A blank document has one, its title, so that
        every document can be ranked."""
        blank = [Chunk(document_id, 0, "")]
        if self.limit is None:
            chunks = chunk_document(document_id, text, self.words, self.overlap) or blank
            return chunks, [with_title(title, chunk.text) for chunk in chunks]
        count = cache(self.embedder.count)  # sentences are counted when they are cut and when chunks are filled
        empty = count("")
        title = truncate(title, max(1, self.limit // 4), lambda piece: count(piece) - empty)
        room = self.limit - (count(f"{title}\n\n") if title.strip() else empty)
        while True:
            room = max(room, 1)
            chunks = chunk_document(
                document_id, text, self.words, self.overlap, room, lambda piece: count(piece) - empty
            )
            texts = [with_title(title, chunk.text) for chunk in chunks or blank]
            excess = max(map(count, texts)) - self.limit
            if excess <= 0 or room == 1:
                return chunks or blank, texts
            room -= excess  # the tokens of title and chunk together are more than of both alone

    def save(self, folder: str | Path) -> None:
        """Write the index as ``folder``, replacing an index there. A crash leaves the old one or the new one, whole.

        One writer at a time. Raises FileExistsError if the folder holds anything but an index.
        """
        import faiss

        write_index(Path(folder), faiss.serialize_index(self._faiss).tobytes(), self.body())

    def body(self) -> dict[str, Any]:
        """What ``chunks.json`` says: the embedder, the sizes of chunks, and every document's hash and chunks."""
        return {
            "embedder": self.embedder.name,
            "dimension": self.embedder.dimension,
            "words": self.words,
            "overlap": self.overlap,
            "limit": self.limit,
            "source": self.source,
            "documents": [
                {"id": name, "hash": entry.hash, "spans": entry.spans} for name, entry in self.entries.items()
            ],
        }

    @classmethod
    def load(cls, folder: str | Path, embedder: Embedder) -> ChunkIndex:
        """Read what :meth:`save` wrote.

        Raises: :class:`OtherEmbedder` if it was made with another embedder; :class:`IndexBroken` if missing or damaged.
        """
        import faiss

        data, body = read_index(Path(folder))  # mapped, not read
        if (body["embedder"], body["dimension"]) != (embedder.name, embedder.dimension):
            made, given = f"{body['embedder']} ({body['dimension']})", f"{embedder.name} ({embedder.dimension})"
            raise OtherEmbedder(folder, made, given)
        entries = {
            document["id"]: Entry(document["hash"], tuple((start, length) for start, length in document["spans"]))
            for document in body["documents"]
        }
        stored = faiss.deserialize_index(np.frombuffer(data, np.uint8))
        if (stored.d, stored.ntotal) != (embedder.dimension, sum(len(entry.spans) for entry in entries.values())):
            raise IndexBroken(folder, "index.faiss and chunks.json have different row counts")
        index = cls([], embedder, body["words"], body["overlap"])
        if body["limit"] != index.limit:
            raise IndexBroken(folder, f"its chunks have at most {body['limit']} tokens, not {index.limit}")
        if entries:
            index._set(entries, index.vectors, stored)
        index.source = body.get("source", "")
        return index


class _Shared:
    """The vectors of a FAISS index where they lie, for numpy. Arrays of it keep the index alive."""

    def __init__(self, stored: Any) -> None:
        import faiss

        flat: Any = faiss.downcast_index(stored.storage) if hasattr(stored, "storage") else stored
        self.stored = stored
        self.__array_interface__ = {
            "shape": (flat.ntotal, flat.d),
            "typestr": "<f4",
            "data": (int(flat.get_xb()), True),
            "version": 3,
        }


def _vectors(stored: Any) -> np.ndarray:
    """float32 [rows, dimension], read-only: no second copy."""
    return np.asarray(_Shared(stored))


def _blocks(fresh: dict[str, list[str]]) -> Iterable[list[str]]:
    """The documents in groups of at least so many chunks that a block has (the last may have fewer)."""
    block: list[str] = []
    size = 0
    for name, texts in fresh.items():
        block.append(name)
        size += len(texts)
        if size >= _BLOCK:
            yield block
            block, size = [], 0
    if block:
        yield block
