"""The retrieval index beside a store, and the embedding model that it is made with."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from cas.errors import EmbedderError
from cas.store.files import writing
from cas.store.store import Store
from retrieval import ChunkIndex, IndexBroken, OtherEmbedder

if TYPE_CHECKING:
    from retrieval import Embedder


def load_embedder(name: str | None = None, **options: Any) -> Embedder:
    """The embedding model of that name, or the default one; ``options`` (``device``, ``batch_size``) as of
    :class:`retrieval.SentenceEmbedder`. Raises EmbedderError with the reason."""
    from retrieval import EmbedderUnavailable, SentenceEmbedder

    try:
        return SentenceEmbedder(**options) if name is None else SentenceEmbedder(name, **options)
    except EmbedderUnavailable as error:
        raise EmbedderError(str(error)) from error


def open_index(
    store: Store,
    embedder: Embedder | None = None,
    progress: Callable[[int, int], None] | None = None,
    rebuild: bool = False,
    must_save: bool = False,
    texts: Callable[[], Sequence[tuple[str, str, str]]] | None = None,
) -> ChunkIndex:
    """The retrieval index beside a store, updated to the documents that answer questions now.

    Args:
        texts: reads the documents (default :meth:`Store.texts`); called only where they are not those of the index.
        progress: called with the number of chunks embedded so far and the number to embed. What is embedded is saved
            every minute, so the next call continues an interrupted one.
        rebuild: embed everything again if the index was made with another embedder, instead of raising EmbedderError.
        must_save: raise StoreError where the index cannot be written. Without it, a store that may only be read, or
            whose disk is full, answers all the same, and embeds again next time.
    """
    embedder = embedder or load_embedder()
    folder = store.folder / "index"
    try:
        index, changed = ChunkIndex.load(folder, embedder), False
    except OtherEmbedder as error:
        if not rebuild:
            raise EmbedderError(
                f"the index in {folder} was made with the embedder {error.made}, not {error.given}: "
                "give that one as --embedder, or delete the folder to embed everything again"
            ) from None
        index, changed = ChunkIndex([], embedder), True
    except (IndexBroken, OSError):
        index, changed = ChunkIndex([], embedder), True

    source = _source(store)
    if not changed and index.source == source:
        return index

    def save() -> None:
        with writing(folder) if must_save else contextlib.suppress(OSError):
            index.save(folder)

    index.source = ""  # of no state of the store while it is being updated
    index.update((texts or store.texts)(), progress, save)
    index.source = source
    save()
    return index


def _source(store: Store) -> str:
    """Changes with the documents that answer questions, their titles and texts."""
    rows = {name: row.hash for name, row in store.answering().items()}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
