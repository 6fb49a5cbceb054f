"""The store: one LMDB environment; every value is a whole safetensors file, exportable as it is.

Keys: ``meta`` (what the store is, fixed at creation), ``run`` (the trainer's state), ``row/<key>`` (one document:
which version counts, checksums, figures), ``text/<key>`` (its text, for retrieval), ``kv/<key>/<version>`` and
``state/<key>/<version>`` (blobs).

Versions are written before the row that names them, and a checkpoint is one transaction that names a consistent set
and deletes what it replaces. Killed at any instant, the rows name whole versions; readers never block the writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from cas.config import Initialization
from cas.errors import CollectionError, ConfigError, StoreError, StoreMismatch
from cas.model.positions import MULTIPLE, Layout, Positions, cartridge_size
from cas.store.records import (
    FORMAT,
    READS,
    Database,
    Row,
    blob_keys,
    open_environment,
    record,
    row_key,
    text_key,
    under,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cas.answering.compose import Composed
    from cas.data.collection import Collection
    from cas.model.frozen import FrozenModel

_FILE = "cartridges.lmdb"


class Store(Database):
    """Cartridges of one collection over one model. Make one with :meth:`create`, open one with :meth:`open`."""

    def __init__(self, folder: Path, environment: Any, model: FrozenModel | None) -> None:
        super().__init__(folder, environment)
        self.model = model
        self._unnamed: dict[str, tuple[int, int, int | None]] = {}  # written since the last commit: version, checksums

    # -- making and opening -----------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: FrozenModel,
        *,
        tokens: int | None = None,
        ratio: float | None = None,
        span: int | None = None,
        positions: str = "fixed",
        initialisation: str = "matched",
        seed: int = 0,
    ) -> Store:
        """A new, empty store for this model. ``span`` (the largest p) is fixed now, or by the first documents added.

        Raises: StoreMismatch if the folder holds a store; ConfigError for impossible settings.
        """
        cartridge_size(MULTIPLE, tokens, ratio, span)
        if positions not in get_args(Positions) or initialisation not in get_args(Initialization):
            raise ConfigError(f"unknown positions {positions!r} or initialisation {initialisation!r}")
        folder = Path(folder)
        if (folder / _FILE).exists():
            raise StoreMismatch(
                f"{folder} holds a store already; give another --store (or open this one with Store.open)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": FORMAT,
            "model": model.describe(),
            "tokens": tokens,
            "ratio": ratio,
            "span": span,
            "positions": positions,
            "initialisation": initialisation,
            "seed": seed,
        }
        # Under another name first: a store that exists says what it is.
        partial = folder / f"{_FILE}.partial"
        partial.unlink(missing_ok=True)
        store = cls(folder, open_environment(partial, write=True), model)
        store._write(lambda txn: txn.put(b"meta", record(meta)))
        store._sync()
        store.close()
        partial.replace(folder / _FILE)
        Path(f"{partial}-lock").unlink()
        return cls(folder, open_environment(folder / _FILE, write=True), model)

    @classmethod
    def open(cls, folder: str | Path, model: FrozenModel | None = None, *, write: bool = False) -> Store:
        """Open an existing store, for reading or (``write``) for training.

        Raises: StoreMismatch if there is none, or it has another format or was made with another model.
        """
        folder = Path(folder)
        if not (folder / _FILE).exists():
            raise StoreMismatch(
                f"{folder} holds no store; train one: python -m cas.train --collection … --store {folder}"
            )
        store = cls(folder, open_environment(folder / _FILE, write=write), model)
        try:
            store._check()
            if write and store.meta["format"] != FORMAT:  # an older version must not take our records for damaged ones
                store._meta = {**store.meta, "format": FORMAT}
                store._write(lambda txn: txn.put(b"meta", record(store.meta)))
        except BaseException:
            store.close()  # a process can hold a file open only once
            raise
        return store

    def _check(self) -> None:
        """Raise StoreMismatch if this is not a store of our format, made with our model."""
        folder, model, found = self.folder, self.model, self.meta.get("format")
        if found not in READS:
            raise StoreMismatch(
                f"{folder} has store format {found}, this version reads {READS[0]} to {FORMAT}; train into a new --store"
            )
        if model is None:
            return
        recorded = self.meta["model"]
        if recorded["fingerprint"] != model.fingerprint or recorded["rope"] != model.rope_fingerprint:
            raise StoreMismatch(
                f"{folder} was made with {recorded['source']['name']} (fingerprint {recorded['fingerprint']}), "
                f"not with {model.source.name} ({model.fingerprint}); open it with the model it was made with"
            )
        if recorded["header_ids"] != list(model.template.header_ids):
            raise StoreMismatch(
                f"{folder} was made with another header (system text or chat template); open it with --system {recorded['system']!r}"
            )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Hold the store as its only trainer; versions that no checkpoint names are removed first.

        Raises: StoreMismatch if another trainer holds it.
        """
        with open(self.folder / "trainer.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreMismatch(
                    f"{self.folder}: another trainer is running on this store; wait for it or stop it"
                ) from error
            self._env.reader_check()  # a killed reader would pin the pages it was reading
            self._collect()
            yield

    # -- what it is -------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Positions of header, cartridges and tokens."""
        span = self.meta["span"]
        assert span is not None, "the span is known once documents were added"
        return Layout(self.meta["positions"], len(self.meta["model"]["header_ids"]), span)

    def rows(self) -> dict[str, Row]:
        """All documents by id, in order of id, as of the last checkpoint."""
        with self._read() as txn:
            rows = [self._row(value) for _, value in under(txn, b"row/")]
        return {row.id: row for row in sorted(rows, key=lambda row: row.id)}

    def row(self, document: str) -> Row:
        """One document's row. Raises CollectionError for an unknown id."""
        with self._read() as txn:
            return self._row(txn.get(row_key(document)), document)

    def texts(self) -> list[tuple[str, str, str]]:
        """(id, title, text) of every document, in order of id: what retrieval indexes."""
        rows = self.rows().values()
        with self._read() as txn:
            return [(row.id, row.title, self._text(txn, row)) for row in rows]

    def text(self, document: str) -> str:
        """One document's text. Raises CollectionError for an unknown id."""
        with self._read() as txn:
            return self._text(txn, self._row(txn.get(row_key(document)), document))

    @property
    def round(self) -> int:
        """How often the collection has changed since it was first trained; only cartridges of the last round learn."""
        return int(self.meta.get("round", 0))

    @property
    def conversations(self) -> Path:
        """The folder with the self-study of this round."""
        return self.folder / ("conversations" + (f"-{self.round}" if self.round else ""))

    @property
    def metrics(self) -> Path:
        """The log of this round's steps."""
        return self.folder / f"metrics{f'-{self.round}' if self.round else ''}.jsonl"

    def run_state(self) -> dict[str, Any] | None:
        """The trainer's state at the last checkpoint."""
        with self._read() as txn:
            value = txn.get(b"run")
        return None if value is None else self._parse(value)

    # -- documents --------------------------------------------------------------------------------------------------

    def add_documents(self, documents: Collection) -> None:
        """Give every document that has none its initial cartridge; fixes the span the first time. Resumable.

        Raises: CollectionError if a stored document's text has changed; ConfigError if the model's window is too small;
            StoreMismatch if a trainer holds the store.
        """
        model, rows = self.model, self.rows()
        assert model is not None
        for document in documents.documents:
            if document.id in rows and rows[document.id].hash != document.hash:
                raise CollectionError(f"{document.id} has changed since it was trained; train into a new --store")
        encoded = {d.id: model.encode(d.text) for d in documents.documents if d.id not in rows}
        if not encoded:
            return
        meta = dict(self.meta)
        if meta["span"] is None:
            meta["span"] = max(cartridge_size(len(e), meta["tokens"], meta["ratio"], None) for e in encoded.values())
        needed = len(meta["model"]["header_ids"]) + meta["span"]
        if needed >= model.geometry.max_positions:
            raise ConfigError(
                f"cartridges of {meta['span']} positions need {needed} of the model's {model.geometry.max_positions}; "
                "raise --ratio or give --span"
            )
        with self.training():
            new = [d for d in documents.documents if d.id in encoded]
            self._write(
                lambda txn: [txn.put(b"meta", record(meta)), *(txn.put(text_key(d.id), d.text.encode()) for d in new)]
            )
            self._meta = meta
            for n, document in enumerate(new, 1):
                ids = encoded[document.id]
                p = cartridge_size(len(ids), meta["tokens"], meta["ratio"], meta["span"])
                seed = int(document.hash[:15], 16) ^ meta["seed"]
                from cas.training.initialization import initialize

                kv = initialize(model, ids, p, meta["initialisation"], seed)
                version, kv_hash, _ = self._unnamed[document.id] = self._put(
                    document.id, 0, {"kv": kv.cpu()}, document.title
                )
                rows[document.id] = Row(
                    document.id, document.title, document.hash, len(ids), p, version, kv_hash, round=self.round
                )
                if n % 64 == 0:
                    self.commit(rows, None)
            self.commit(rows, None)

    def remove(self, documents: Sequence[str], new_round: bool) -> None:
        """Take documents and their cartridges out, in one transaction; ``new_round``: the run so far is over, what is added from
        now on is trained among the rest, which stays as it is."""
        rows, meta = self.rows(), {**self.meta, "round": self.round + new_round}

        def write(txn: Any) -> None:
            for name in documents:
                for key in (row_key(name), text_key(name), *blob_keys(name, rows[name].version)):
                    txn.delete(key)
            if new_round:
                txn.delete(b"run")
            txn.put(b"meta", record(meta))

        self._write(write)
        self._sync()
        self._meta = meta

    # -- tensors ----------------------------------------------------------------------------------------------------

    def cartridge(self, document: str) -> Tensor:
        """The trained KV of a document as of the last checkpoint, float32 [L, 2, H, P, D] on the CPU, checksum verified."""
        with self._read(in_place=True) as txn:  # row and tensors in one transaction: a trainer may be at work
            row = self._row(txn.get(row_key(document)), document)
            return self._get(txn, "kv", document, row.version, row.kv_hash)["kv"]

    def read_tensors(self, name: str, parts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """(BackingStore) Newest written tensors, committed or not."""
        if unnamed := self._unnamed.get(name):  # once: another thread may commit
            version, kv_hash, state_hash = unnamed
        else:
            row = self.row(name)
            version, kv_hash, state_hash = row.version, row.kv_hash, row.state_hash
        with self._read(in_place=True) as txn:
            tensors = self._get(txn, "kv", name, version, kv_hash)
            if state_hash is not None and (parts is None or set(parts) - {"kv"}):
                tensors |= self._get(txn, "state", name, version, state_hash)
        return tensors

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """(BackingStore) Write a new version that the next commit will name."""
        row = self.row(name)
        previous = self._unnamed.get(name)
        version = (previous[0] if previous else row.version) + 1
        self._unnamed[name] = self._put(name, version, tensors, row.title)
        if previous is not None:
            self._write(lambda txn: [txn.delete(k) for k in blob_keys(name, previous[0])])

    def forget(self, name: str) -> None:
        """Drop a version that no commit has named: the last named one is the newest again."""
        if unnamed := self._unnamed.pop(name, None):
            self._write(lambda txn: [txn.delete(k) for k in blob_keys(name, unnamed[0])])

    def commit(self, rows: Mapping[str, Row], run_state: Mapping[str, Any] | None) -> None:
        """One transaction: rows of everything written since the last commit, and the run state.

        Args: rows: current figures by id; the version and checksums of written ones are filled in here.
        """

        def write(txn: Any) -> None:
            for name, (version, kv_hash, state_hash) in self._unnamed.items():
                key = row_key(name)
                before = txn.get(key)
                if before is not None:
                    old = json.loads(before)["version"]
                    if old != version:
                        for blob in blob_keys(name, old):
                            txn.delete(blob)
                row = replace(rows[name], version=version, kv_hash=kv_hash, state_hash=state_hash)
                txn.put(key, record(asdict(row)))
            if run_state is not None:
                txn.put(b"run", record(run_state))

        self._write(write)
        self._sync()
        self._unnamed.clear()

    # -- sharing ----------------------------------------------------------------------------------------------------

    def compose(self, documents: Sequence[str]) -> Composed:
        """The header and these cartridges as one KV cache, for our engine or for plain transformers."""
        from cas.answering.compose import Composed

        assert self.model is not None, "open the store with its model to compose"
        return Composed(self.model, self.layout, {d: self.cartridge(d) for d in documents})

    def export(self, document: str, file: str | Path) -> None:
        """Write a cartridge's stored safetensors bytes to a file, whole or not at all."""
        file = Path(file)
        with self._read() as txn:
            row = self._row(txn.get(row_key(document)), document)
            blob = self._blob(txn, "kv", document, row.version, row.kv_hash)
        partial = file.with_name(f"{file.name}.partial")
        try:
            with partial.open("wb") as handle:
                handle.write(blob)
                handle.flush()
                os.fsync(handle.fileno())
            partial.replace(file)
        except OSError as error:
            raise StoreError(f"{file}: {error.strerror}; nothing was exported") from error

    def log_duration(self, what: str, seconds: float) -> None:
        """Note in ``seconds.jsonl`` what work on this store took; reports add it up. Steps have :attr:`metrics`."""
        with (self.folder / "seconds.jsonl").open("a") as log:
            log.write(json.dumps({"what": what, "seconds": round(seconds, 3)}) + "\n")

    # -- LMDB -------------------------------------------------------------------------------------------------------

    def _collect(self) -> None:
        """Delete versions that no row names: what a killed trainer wrote after its last checkpoint."""
        self._unnamed.clear()
        named = {key for row in self.rows().values() for key in blob_keys(row.id, row.version)}
        with self._read() as txn:
            stale = [
                key for kind in (b"kv/", b"state/") for key, _ in under(txn, kind, values=False) if key not in named
            ]
        if stale:
            self._write(lambda txn: [txn.delete(k) for k in stale])
