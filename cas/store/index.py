"""The retrieval index beside a store, and the embedding model that it is made with."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cas.errors import EmbedderError
from cas.store.store import Store
from retrieval import ChunkIndex, IndexBroken

if TYPE_CHECKING:
    from retrieval import Embedder


def load_embedder(name: str | None = None) -> Embedder:
    """The embedding model of that name, or the default one. Raises EmbedderError with the reason."""
    from retrieval import EmbedderUnavailable, SentenceEmbedder

    try:
        return SentenceEmbedder() if name is None else SentenceEmbedder(name)
    except EmbedderUnavailable as error:
        raise EmbedderError(str(error)) from error


def open_index(store: Store, embedder: Embedder | None = None) -> ChunkIndex:
    """The retrieval index beside a store, updated to the documents that have a cartridge now."""
    embedder = embedder or load_embedder()
    folder = store.folder / "index"
    documents = store.texts()
    try:
        index = ChunkIndex.load(folder, embedder)
        changed = bool(index.update(documents)) or set(index.document_ids) != {d[0] for d in documents}
    except (IndexBroken, OSError):
        index, changed = ChunkIndex(documents, embedder), True
    if changed:
        with contextlib.suppress(OSError):  # a read-only store still answers; it only has to embed again next time
            index.save(folder)
    return index
