"""What is read of a store: its documents, their texts and cartridges."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from cas.model.positions import Layout
from cas.store.files import write_atomically
from cas.store.records import OLD, WITHDRAWN, Records, Row, row_key

if TYPE_CHECKING:
    from torch import Tensor


class StoredDocuments:
    """The reading half of a :class:`cas.Store`. Attributes: those of the store."""

    def __init__(self, folder: Path, records: Records) -> None:
        self.folder, self.records = folder, records
        self._parsed: dict[str, tuple[int, dict[str, Row]]] = {}  # by space: number of the transaction, and its rows
        self.reload()

    @property
    def layout(self) -> Layout:
        """Positions of header, cartridges and tokens."""
        span = self.meta["span"]
        assert span is not None, "the span is known once documents were added"
        return Layout(self.meta["positions"], len(self.meta["model"]["header_ids"]), span)

    def rows(self) -> dict[str, Row]:
        """All documents by id, in order of id, as of the last checkpoint."""
        with self.records.read() as txn:
            return self._rows(txn)

    def old_rows(self) -> dict[str, Row]:
        """What changed documents were: they answer until their successors are trained."""
        with self.records.read() as txn:
            return self._rows(txn, OLD)

    def _rows(self, txn: Any, space: str = "") -> dict[str, Row]:
        """All rows, parsed once for every state of the store: a start asks for them twenty times."""
        number, parsed = self._parsed.get(space, (-1, {}))
        if number != txn.id():
            parsed = self.records.rows(txn, space)
            self._parsed[space] = txn.id(), parsed
        return dict(parsed)

    def answering(self) -> dict[str, Row]:
        """The documents that answer questions, by id: those with a cartridge, changed ones as they were."""
        with self.records.read() as txn:
            return self._answering(txn)

    def _answering(self, txn: Any) -> dict[str, Row]:
        rows = {i: row for i, row in self._rows(txn).items() if row.initialized} | self._rows(txn, OLD)
        return dict(sorted(rows.items()))

    def answering_row(self, document: str) -> Row:
        """One document as it answers questions. Raises CollectionError for an unknown id."""
        with self.records.read() as txn:
            return self._answering_row(txn, document)[0]

    def _answering_row(self, txn: Any, document: str) -> tuple[Row, str]:
        """The row that answers, and its space."""
        if (value := txn.get(row_key(document, OLD))) is not None:
            return self.records.parse_row(value), OLD
        return self.records.row(txn, document), ""

    @property
    def stamp(self) -> int:
        """A number that changes with everything that anyone writes into the store; cheap to ask for."""
        return self.records.stamp

    def reload(self) -> None:
        """Read again what another process may have changed in :attr:`meta`."""
        with self.records.read() as txn:
            self.meta = self.records.parse(txn.get(b"meta"))

    def row(self, document: str) -> Row:
        """One document's row. Raises CollectionError for an unknown id."""
        with self.records.read() as txn:
            return self.records.row(txn, document)

    def texts(self) -> list[tuple[str, str, str]]:
        """(id, title, text) of every document that answers questions, in order of id: what retrieval indexes."""
        with self.records.read() as txn:
            rows, old = self._answering(txn), self._rows(txn, OLD)
            return [(i, row.title, self.records.text(txn, row, OLD if i in old else "")) for i, row in rows.items()]

    def withdrawn(self) -> list[tuple[str, str, str]]:
        """(id, title, text) of documents that left this round after its self-study had begun."""
        with self.records.read() as txn:
            rows = self.records.rows(txn, WITHDRAWN).values()
            return [(row.id, row.title, self.records.text(txn, row, WITHDRAWN)) for row in rows]

    def text(self, document: str) -> str:
        """One document's text, whether or not it has a cartridge. Raises CollectionError for an unknown id."""
        with self.records.read() as txn:
            return self.records.text(txn, self.records.row(txn, document))

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
        with self.records.read() as txn:
            value = txn.get(b"run")
        return None if value is None else self.records.parse(value)

    def verify(self) -> list[str]:
        """Read everything back; one line for each thing that is broken (none: the store is whole)."""
        return self.records.verify()

    def cartridge(self, document: str) -> Tensor:
        """The KV that answers for a document, as of the last checkpoint: float32 [L, 2, H, P, D] on the CPU, checksum
        verified.

        Raises: CollectionError for an unknown id or one without cartridge yet; StoreError for damage.
        """
        with self.records.read(in_place=True) as txn:  # row and tensors in one transaction: a trainer may be at work
            row, space = self._answering_row(txn, document)
            return self.records.tensors(txn, "kv", document, row.version, row.kv_hash, space)["kv"]

    def export(self, document: str, file: str | Path) -> None:
        """Write a cartridge's stored safetensors bytes to a file, whole or not at all.

        Raises: CollectionError as :meth:`cartridge`; StoreError if the file cannot be written.
        """
        with self.records.read() as txn:
            row, space = self._answering_row(txn, document)
            blob = self.records.blob(txn, "kv", document, row.version, row.kv_hash, space)
        write_atomically(Path(file), blob)
