"""The store: cartridges, optimizer state and texts of one collection, in one LMDB file.

Keys: ``meta`` (what the store is, fixed at creation), ``run`` (the trainer's state), ``row/<key>`` (one document:
which version counts, checksums, figures), ``text/<key>`` (its text, for retrieval), ``kv/<key>/<version>`` and
``state/<key>/<version>`` (safetensors files, exportable as they are). :mod:`cas.store.changes` has more, for documents
that change.

Versions are written before the row that names them. A checkpoint is one transaction that names a consistent set and
deletes what it replaces. Killed at any instant, a store's rows name whole versions; readers never block the writer.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from cas.errors import CollectionError, ConfigError, StoreExists, StoreLocked, StoreMismatch, StoreMissing
from cas.model.positions import MULTIPLE, Layout, Positions, cartridge_size
from cas.options import Initialization
from cas.store import changes
from cas.store.blobs import Values
from cas.store.files import writing
from cas.store.reading import StoredDocuments
from cas.store.records import (
    FORMAT,
    FORMAT_VALUES,
    OLD,
    PENDING,
    READS,
    WITHDRAWN,
    Records,
    Row,
    blob_keys,
    record,
    row_key,
    text_key,
    under,
)

if TYPE_CHECKING:
    from torch import Tensor

    from cas.data.collection import Collection

_FILE = "cartridges.lmdb"


class DescribesItself(Protocol):
    """A model, as far as a store has to know it (:meth:`cas.FrozenModel.describe`)."""

    def describe(self) -> dict[str, Any]: ...

    @property
    def legacy_fingerprint(self) -> str: ...


class Store(StoredDocuments):
    """Cartridges of one collection, made with one model; a context manager that closes it.

    Attributes: folder: where it is; records: its LMDB file; meta: what was fixed at creation, and the round.
    """

    def __init__(self, folder: Path, records: Records) -> None:
        super().__init__(folder, records)
        self._uncommitted: dict[str, tuple[int, int, int | None]] = {}  # version and checksums, by id

    # -- creating and opening ---------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | Path,
        model: DescribesItself,
        *,
        tokens: int | None = None,
        ratio: float | None = None,
        span: int | None = None,
        positions: str = "fixed",
        initialisation: str = "matched",
        seed: int = 0,
        round: int = 0,
        values: Values = "float32",
    ) -> Store:
        """A new, empty store, open for writing. Of the model it records the description alone.

        Args:
            tokens, ratio: size of a cartridge, as positions or as document tokens per position; exactly one of them.
            span: the largest size; where it is not given, the first documents added fix it.
            positions, initialisation: see :class:`cas.model.positions.Layout` and :mod:`cas.training.initialization`.
            round: its first round, where cartridges of earlier ones are to be copied into it; values: how these may be
                stored (:mod:`cas.store.values`).
        Raises: StoreExists if the folder holds a store or is a file; ConfigError for impossible settings.
        """
        cartridge_size(MULTIPLE, tokens, ratio, span)
        if positions not in get_args(Positions) or initialisation not in get_args(Initialization):
            raise ConfigError(f"unknown positions {positions!r} or initialisation {initialisation!r}")
        folder = Path(folder)
        if cls.exists(folder):
            raise StoreExists(
                f"{folder} holds a store already; give another --store (or open this one with Store.open)"
            )
        folder.mkdir(parents=True, exist_ok=True)
        meta = {
            "format": FORMAT, "model": model.describe(), "tokens": tokens, "ratio": ratio, "span": span,
            "positions": positions, "initialisation": initialisation, "seed": seed, **({"round": round} if round else {}),
        }  # fmt: skip
        if values != "float32":
            meta |= {"format": FORMAT_VALUES, "values": values}
        # Under another name first, so that a store that exists has its meta record.
        partial = folder / f"{_FILE}.partial"
        partial.unlink(missing_ok=True)
        with contextlib.closing(Records.open(partial, write=True)) as records:
            records.write(lambda txn: txn.put(b"meta", record(meta)))
            records.sync()
        partial.replace(folder / _FILE)
        Path(f"{partial}-lock").unlink()
        return cls(folder, Records.open(folder / _FILE, write=True))

    @staticmethod
    def exists(folder: str | Path) -> bool:
        """Whether a folder holds a store. Raises: StoreExists for a file in its place."""
        folder = Path(folder)
        if file := next((place for place in (folder, *folder.parents) if place.is_file()), None):
            raise StoreExists(f"{file} is a file; give a folder as --store")
        return (folder / _FILE).exists()

    @classmethod
    def open(cls, folder: str | Path, *, write: bool = False) -> Store:
        """Open an existing store, for reading or (``write``) for training.

        Raises: StoreMissing, or StoreExists for a file; StoreMismatch for another format; StoreLocked if this process
            has it open; StoreError for damage.
        """
        folder = Path(folder)
        if not cls.exists(folder):
            raise StoreMissing(
                f"{folder} holds no store; train one: python -m cas.train --collection … --store {folder}"
            )
        records = Records.open(folder / _FILE, write)
        try:
            store = cls(folder, records)
            if (stored := store.meta.get("format")) not in READS:
                raise StoreMismatch(
                    f"{folder} has store format {stored}, this version reads {READS[0]} to {READS[-1]}; "
                    "train into a new --store"
                )
        except BaseException:
            records.close()  # a process can hold a file open only once
            raise
        return store

    def close(self) -> None:
        """Release the file."""
        self.records.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def check_model(self, model: DescribesItself) -> None:
        """Raise StoreMismatch if the store was made with another model, system text or chat template."""
        recorded, given = self.meta["model"], model.describe()
        same = recorded["fingerprint"] in (given["fingerprint"], model.legacy_fingerprint)
        if not same or recorded["rope"] != given["rope"]:
            raise StoreMismatch(
                f"{self.folder} was made with {recorded['source']['name']} (fingerprint {recorded['fingerprint']}), "
                f"not with {given['source']['name']} ({given['fingerprint']}); open it with the model it was made with"
            )
        if recorded["header_ids"] != given["header_ids"]:
            raise StoreMismatch(
                f"{self.folder} was made with another header (system text or chat template); "
                f"open it with --system {recorded['system']!r}"
            )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Hold the store as its only trainer; versions that no checkpoint names are removed first.

        Raises: StoreLocked if another trainer holds it.
        """
        with open(self.folder / "trainer.lock", "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreLocked(
                    f"{self.folder}: another trainer is running on this store; wait for it or stop it"
                ) from error
            self.records.environment.reader_check()  # a killed reader would pin the pages it was reading
            self._delete_uncommitted()
            if self.meta["format"] < FORMAT:  # an older version must not take our records for damaged ones
                self.meta["format"] = FORMAT
                self.records.write(lambda txn: txn.put(b"meta", record(self.meta)))
            yield

    # -- documents --------------------------------------------------------------------------------------------------

    def add_documents(self, documents: Collection, count_tokens: Callable[[str], int]) -> None:
        """Record new documents in one transaction: text, token count, size of the cartridge. Fixes the span at first.

        The cartridges come later (:func:`cas.training.initialization.initialize_cartridges`).
        Args: count_tokens: of a text, under the store's model (:meth:`cas.FrozenModel.count_tokens`).
        Raises: CollectionError if a stored document's text has changed; ConfigError if the model's window is too small, or a
            document too long for the cartridges of this store; StoreLocked if a trainer holds the store.
        """
        rows, meta = self.rows(), {**self.meta, "format": max(FORMAT, self.meta["format"])}
        with self.records.read() as txn:
            left = {(row.id, row.hash) for row in self.records.rows(txn, WITHDRAWN).values()}
        given = [d for d in documents.documents if (d.id, d.hash) not in left]
        for document in given:
            if document.id in rows and rows[document.id].hash != document.hash:
                raise CollectionError(f"{document.id} has changed since it was trained; train into a new --store")
        new = [(d, count_tokens(d.text)) for d in given if d.id not in rows]
        if not new:
            return
        for document, count in new if rows and meta["span"] is not None and meta["ratio"] is not None else ():
            if (p := cartridge_size(count, None, meta["ratio"], None)) > meta["span"]:
                raise ConfigError(
                    f"{document.id} has {count} tokens, which take {p} positions at --ratio {meta['ratio']:g}; cartridges "
                    f"of {self.folder} have {meta['span']} at most: split it, as cas.train does, or give a new --store"
                )
        if meta["span"] is None:
            meta["span"] = max(cartridge_size(count, meta["tokens"], meta["ratio"], None) for _, count in new)
        needed = len(meta["model"]["header_ids"]) + meta["span"]
        window = meta["model"]["geometry"]["max_positions"]
        if needed >= window:
            raise ConfigError(
                f"cartridges of {meta['span']} positions need {needed} of the model's {window}; "
                "raise --ratio or give --span"
            )

        def write(txn: Any) -> None:
            txn.put(b"meta", record(meta))
            for document, count in new:
                p = cartridge_size(count, meta["tokens"], meta["ratio"], meta["span"])
                row = Row(document.id, document.title, document.hash, count, p, round=self.round)
                txn.put(text_key(document.id), document.text.encode())
                txn.put(row_key(document.id), record(asdict(row)))

        with self.training():
            self.records.write(write)
            self.records.sync()
            self.meta = meta

    def refuse_unfinished(self) -> None:
        """Raise ConfigError where a training of this store has not ended."""
        learning = any(row.round == self.round for row in self.rows().values())
        if self.pending() or (learning and not changes.ends_round(self.run_state())):
            raise ConfigError(f"{self.folder} is in training; finish it first")

    def layout_for(self, p: int) -> Layout:
        """The layout with a cartridge of ``p`` positions added. Raises: ConfigError if the store cannot hold it."""
        model, span = self.meta["model"], self.meta["span"] or p
        if p > span and self.meta["positions"] == "fixed":
            raise ConfigError(f"{self.folder} has fixed positions for cartridges of {span} at most, not of {p}")
        if len(model["header_ids"]) + max(p, span) >= (window := model["geometry"]["max_positions"]):
            raise ConfigError(f"a cartridge of {p} positions does not fit into the model's {window}")
        return Layout(self.meta["positions"], len(model["header_ids"]), span)

    def add_cartridge(self, name: str, title: str, text: str, kv: Tensor, tokens: int) -> None:
        """A document with a cartridge that was trained elsewhere; it learns no more.

        Args: kv: float32 [L, 2, H, P, D] as the store's layout places it; tokens: of the text.
        Raises: CollectionError for an id that is taken; ConfigError for sizes; StoreLocked if a trainer holds the store.
        """
        if name in self.rows():
            raise CollectionError(f"{self.folder} has a document {name!r} already")
        span, hash = self.layout_for(kv.shape[3]).span, sha256(f"{title}\n{text}".encode()).hexdigest()
        with self.training():
            meta = {**self.meta, "span": span}
            kv_hash, _ = self.records.put_tensors(name, 0, {"kv": kv}, self._about(name, title))
            row = Row(name, title, hash, tokens, kv.shape[3], version=0, kv_hash=kv_hash, round=-1)

            def write(txn: Any) -> None:
                txn.put(b"meta", record(meta))
                txn.put(text_key(name), text.encode())
                txn.put(row_key(name), record(asdict(row)))

            self.records.write(write)
            self.records.sync()
            self.meta = meta

    def change(self, change: changes.Change) -> None:
        """Rename, retire, restore or drop documents, in one transaction; the caller holds :meth:`training`."""
        meta = {**self.meta, "round": self.round + change.new_round}

        def write(txn: Any) -> None:
            changes.apply(self.records, txn, change)
            txn.put(b"meta", record(meta))

        self.records.write(write)
        self.records.sync()
        self.meta = meta

    def pending(self) -> list[dict[str, Any]]:
        """Ids that files of the store still have (:func:`cas.store.changes.pending`)."""
        with self.records.read() as txn:
            return changes.pending(self.records, txn)

    def clear_pending(self) -> None:
        """The files no longer have them."""
        self.records.write(lambda txn: txn.delete(PENDING))

    # -- tensors ----------------------------------------------------------------------------------------------------

    def read_tensors(self, name: str, parts: Sequence[str] | None = None) -> dict[str, Tensor]:
        """(BackingStore) Newest written tensors, committed or not."""
        kv_hash: int | None
        if uncommitted := self._uncommitted.get(name):  # once: another thread may commit
            version, kv_hash, state_hash = uncommitted
        else:
            row = self.row(name)
            version, kv_hash, state_hash = row.version, row.kv_hash, row.state_hash
        with self.records.read(in_place=True) as txn:
            tensors = self.records.tensors(txn, "kv", name, version, kv_hash)
            if state_hash is not None and (parts is None or set(parts) - {"kv"}):
                tensors |= self.records.tensors(txn, "state", name, version, state_hash)
        return tensors

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor], version: int | None = None) -> None:
        """(BackingStore) Write a new version that the next commit will name. ``version``: 0 for initial values that do
        not depend on conversations (:class:`Row`), else the next one."""
        row, previous = self.row(name), self._uncommitted.get(name)
        if version is None:
            version = max(previous[0] if previous else row.version, 0) + 1
        about = self._about(name, row.title)
        self._uncommitted[name] = version, *self.records.put_tensors(name, version, tensors, about)
        if previous is not None and previous[0] != version:
            self.records.write(lambda txn: [txn.delete(k) for k in blob_keys(name, previous[0])])

    def _about(self, name: str, title: str) -> dict[str, Any]:
        """What a cartridge's file says about itself."""
        model = self.meta["model"]
        return {
            "format": FORMAT,
            "id": name,
            "title": title,
            "model": model["source"]["name"],
            "fingerprint": model["fingerprint"],
            "rope": model["rope"],
            "header": len(model["header_ids"]),
            "positions": self.meta["positions"],
        }

    def forget(self, name: str) -> None:
        """Drop a version that no commit has named: the last named one is the newest again."""
        if uncommitted := self._uncommitted.pop(name, None):
            self.records.write(lambda txn: [txn.delete(k) for k in blob_keys(name, uncommitted[0])])

    def commit(self, rows: Mapping[str, Row], run_state: Mapping[str, Any] | None) -> None:
        """One transaction: rows of everything written since the last commit, and the run state.

        Args: rows: current figures by id; the version and checksums of written ones are filled in here.
        """

        def write(txn: Any) -> None:
            for name, (version, kv_hash, state_hash) in self._uncommitted.items():
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
            if changes.ends_round(run_state):  # the successors answer from now on
                changes.clear(txn, OLD)

        self.records.write(write)
        self.records.sync()
        self._uncommitted.clear()

    def log_duration(self, what: str, seconds: float) -> None:
        """Append to ``seconds.jsonl`` what work on this store took; reports add it up. Steps have :attr:`metrics`."""
        file = self.folder / "seconds.jsonl"
        with writing(file), file.open("a") as log:
            log.write(json.dumps({"what": what, "seconds": round(seconds, 3)}) + "\n")

    def _delete_uncommitted(self) -> None:
        """Delete versions that no row names: what a killed trainer wrote after its last checkpoint."""
        self._uncommitted.clear()
        named = {key for row in self.rows().values() for key in blob_keys(row.id, row.version)}
        with self.records.read() as txn:
            stale = [
                key for kind in (b"kv/", b"state/") for key, _ in under(txn, kind, values=False) if key not in named
            ]
        if stale:
            self.records.write(lambda txn: [txn.delete(k) for k in stale])
