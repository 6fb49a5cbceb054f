"""Documents from one store to another: cartridges, optimizer state, texts and records, checksums verified."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cas.errors import ConfigError, EmbedderError, StoreExists, StoreMismatch
from cas.store.blobs import Values
from cas.store.index import load_embedder
from cas.store.records import blob_keys, record, row_key, text_key
from cas.store.store import Store
from retrieval import ChunkIndex, IndexBroken, OtherEmbedder

if TYPE_CHECKING:
    from retrieval import Embedder

_AT_ONCE = 16  # documents in one transaction
_LOGS = ("seconds.jsonl", "metrics*.jsonl")


class RecordedModel:
    """A model as a store describes it."""

    def __init__(self, described: Mapping[str, Any]) -> None:
        self.described = described

    def describe(self) -> dict[str, Any]:
        return dict(self.described)

    @property
    def legacy_fingerprint(self) -> str:
        return str(self.described["fingerprint"])


def create_like(store: Store, folder: Path, round: int | None = None, values: Values | None = None) -> Store:
    """A new, empty store with the model and the settings of another one; ``round``, ``values``: default the same."""
    settings = {name: store.meta[name] for name in ("tokens", "ratio", "span", "positions", "initialisation", "seed")}
    values = values or store.meta.get("values", "float32")
    return Store.create(
        folder,
        RecordedModel(store.meta["model"]),
        round=store.round if round is None else round,
        values=values,
        **settings,
    )


def copy_documents(
    source: Store, names: Iterable[str], target: Store, *, state: bool = True, round: int | None = None
) -> None:
    """Copy documents as they answer, bit for bit, over what the target has under their ids; on disk when it returns.

    Args: state: with the optimizer's; round: recorded of them, default as in the source.
    Raises: CollectionError for unknown ids or ones without a cartridge; StoreError for damage.
    """
    names = list(names)
    for first in range(0, len(names), _AT_ONCE):
        with source.records.read() as txn:
            read = [read_document(source, txn, name, state, round) for name in names[first : first + _AT_ONCE]]
        target.records.write(partial(write_documents, documents=read))
    target.records.sync()


def read_document(source: Store, txn: Any, name: str, state: bool, round: int | None) -> tuple[Any, ...]:
    """Row, text, cartridge and optimizer state (None: there is none, or it is not wanted) of a document."""
    records = source.records
    row, space = source._answering_row(txn, name)
    kv = records.blob(txn, "kv", name, row.version, row.kv_hash, space)
    moments = None
    if state and row.state_hash is not None:
        moments = records.blob(txn, "state", name, row.version, row.state_hash, space)
    kept = replace(
        row,
        state_hash=None if moments is None else row.state_hash,
        round=row.round if round is None else round,
    )
    return kept, records.text(txn, row, space), kv, moments


def write_documents(txn: Any, documents: Sequence[tuple[Any, ...]]) -> None:
    """Row, text, cartridge and optimizer state (or None) of documents, over what a store has under their ids."""
    for row, text, kv, state in documents:
        for prefix in (b"kv/", b"state/"):  # all versions that the target has
            key = prefix + row_key(row.id).removeprefix(b"row/") + b"/"
            with txn.cursor() as cursor:
                while cursor.set_range(key) and cursor.key().startswith(key):
                    cursor.delete()
        kv_key, state_key = blob_keys(row.id, row.version)
        txn.put(kv_key, kv)
        if state is not None:
            txn.put(state_key, state)
        txn.put(text_key(row.id), text.encode())
        txn.put(row_key(row.id), record(asdict(row)))


@contextlib.contextmanager
def built_beside(folder: Path) -> Iterator[Path]:
    """Where to build a store that becomes ``folder``, empty or absent, at the end. Nothing of it is left after an error."""
    unfinished = folder.with_name(f"{folder.name}.partial")
    if Store.exists(unfinished):  # of a command that was killed
        shutil.rmtree(unfinished)
    try:
        yield unfinished
        if folder.exists():
            folder.rmdir()
        unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def merge_stores(folder: Path, sources: Sequence[Path]) -> Store:
    """A new store of all documents of finished stores; it is trained no more, and documents can be added to it.

    Returns: the store, open for writing. Raises: StoreExists; StoreMismatch or ConfigError for stores that do not belong
    together, or are in training; StoreError for damage. Then nothing is left.
    """
    if folder.exists() and any(folder.iterdir()):
        raise StoreExists(f"{folder} exists already; name a new folder for the merged store")
    with contextlib.ExitStack() as stack:
        stores = [stack.enter_context(Store.open(source)) for source in sources]
        _refuse(stores)
        with built_beside(folder) as unfinished:
            # The documents are of a round before the store's, so that they learn no more.
            narrowest = max((s.meta.get("values", "float32") for s in stores), key=get_args(Values).index)
            with create_like(stores[0], unfinished, round=1, values=narrowest) as merged:
                for store in stores:
                    copy_documents(store, store.answering(), merged, round=0)
            for store in stores:
                copy_logs(store.folder, unfinished)
    return Store.open(folder, write=True)


def join_indexes(store: Store, sources: Iterable[Path], embedder: Embedder | None = None) -> None:
    """Give a store the vectors that the indexes of other stores have, where ``embedder`` (default: the default one) made
    them. Whatever is missing is embedded when the index is opened."""
    with contextlib.suppress(EmbedderError):  # then everything is embedded later
        embedder, indexes = embedder or load_embedder(), []
        for folder in (store.folder, *sources):
            with contextlib.suppress(OtherEmbedder, IndexBroken, OSError):
                indexes.append(ChunkIndex.load(folder / "index", embedder))
        if indexes:
            joined = ChunkIndex([], embedder)
            joined.absorb(indexes)
            joined.save(store.folder / "index")


def copy_logs(source: Path, target: Path) -> None:
    """Append the durations and steps in one store's folder to another's, of which reports make the cost."""
    for file in (file for pattern in _LOGS for file in sorted(source.glob(pattern))):
        with (target / file.name).open("ab") as log:
            log.write(file.read_bytes())


def _refuse(stores: Sequence[Store]) -> None:
    """Raise for stores that cannot be merged."""
    if len(stores) < 2:
        raise ConfigError("give two or more stores to merge")
    first, owners = stores[0], dict[str, Path]()
    for store in stores:
        theirs, ours = store.meta["model"], first.meta["model"]
        for name in ("fingerprint", "rope", "header_ids"):
            if theirs[name] != ours[name]:
                what = "another header (system text)" if name == "header_ids" else "another model"
                raise StoreMismatch(
                    f"{store.folder} was made with {what} than {first.folder} ({theirs['source']['name']}, "
                    f"{ours['source']['name']}): only stores of one model can be merged"
                )
        for name in ("positions", "tokens", "ratio", "span"):
            if store.meta[name] != first.meta[name]:
                raise StoreMismatch(
                    f"{store.folder} was made with {name} {store.meta[name]}, {first.folder} with {first.meta[name]}: "
                    f"train both with the same --{name}"
                )
        store.refuse_unfinished()
        if not store.answering():
            raise ConfigError(f"{store.folder} has no cartridges")
        for name in store.answering():
            if name in owners:
                raise ConfigError(
                    f"{name!r} is in both {owners[name]} and {store.folder}; documents need different ids"
                )
            owners[name] = store.folder
