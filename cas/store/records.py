"""Records and tensors of a store in one LMDB file: transactions, checksums, and the errors they can raise."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cas.errors import CasError, CollectionError, StoreError, StoreLocked
from cas.store.blobs import dump_tensors, parse_tensors
from cas.store.files import broken_page, shared_lock

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
FORMAT = 3
FORMAT_VALUES = 4  # of a store that was compacted: cartridges need not be float32
READS = (2, FORMAT, FORMAT_VALUES)  # 2: records have no checksum
OLD, WITHDRAWN, PENDING = "old/", "withdrawn/", b"pending"  # keys of cas.store.changes


@dataclass(frozen=True)
class Row:
    """One document of the store.

    Attributes:
        tokens: of the document; p: positions of its cartridge.
        version: which stored tensors count. -1: none yet. 0: initial values that do not depend on conversations.
            Higher: initial values fitted to conversations, or trained ones.
        kv_hash, state_hash: checksums of the cartridge (None: not initialized) and of its optimizer state (None: untrained).
        drawn, steps, trained_tokens: conversations, Adam steps and conversation tokens it was trained on.
        round: the round it was added in (:mod:`cas.training.rounds`).
    """

    id: str
    title: str
    hash: str
    tokens: int
    p: int
    version: int = -1
    kv_hash: int | None = None
    state_hash: int | None = None
    drawn: int = 0
    steps: int = 0
    trained_tokens: int = 0
    round: int = 0

    @property
    def initialized(self) -> bool:
        """Whether there is a cartridge."""
        return self.kv_hash is not None


class Records:
    """One LMDB file with records (JSON and a checksum), texts, and tensors (safetensors files).

    :meth:`read` and :meth:`write` are its transactions; methods that take ``txn`` run inside one.
    """

    def __init__(self, file: Path, environment: Any, descriptor: int) -> None:
        self.folder, self.environment, self.descriptor = file.parent, environment, descriptor
        self._lock = threading.RLock()  # a map must not grow under another thread's transaction
        self._buffer = bytearray()

    @classmethod
    def open(cls, file: Path, write: bool) -> Records:
        """Open an LMDB file, or make it where ``write`` is given.

        Raises: StoreLocked if this process has it open already; StoreError if it is no LMDB file, or not a whole one.
        """
        import lmdb

        descriptor = shared_lock(file, write)
        existing = os.fstat(descriptor).st_size
        # LMDB registers readers in a file of its own; who may not write it reads without, as nobody trains there.
        lock = write or os.access(f"{file}-lock" if os.path.exists(f"{file}-lock") else file.parent, os.W_OK)
        try:
            # The map is address space, not disk; it doubles when it is full.
            environment = lmdb.open(
                str(file), subdir=False, map_size=max(1 << 30, 2 * existing), readonly=not write, max_readers=512,
                lock=lock, metasync=False,  # what no checkpoint names may be lost in a power cut; a checkpoint syncs
            )  # fmt: skip
        except lmdb.Error as error:
            os.close(descriptor)
            if "already open in this process" in str(error):
                raise StoreLocked(
                    f"{file.parent} is open already in this process; "
                    "go on using that store, or close it first: store.close()"
                ) from error
            raise StoreError(f"{file}: cannot be opened as a store ({error})") from error
        if (missing := _size(environment) - file.stat().st_size) > 0:  # reading a missing page would end the process
            environment.close()
            os.close(descriptor)
            raise StoreError(
                f"{file}: the last {missing:,} bytes are missing; copy it again whole, or train into a new --store"
            )
        if lock:
            environment.reader_check()  # a killed reader would keep the pages it was reading from being used again
        records = cls(file, environment, descriptor)
        while True:
            with records.read() as txn:
                number, broken = txn.id(), broken_page(file, txn.id(), environment.stat()["psize"])
            if broken is None:
                return records
            if records.stamp == number:  # else someone has written meanwhile, over what we were looking at
                records.close()
                raise StoreError(f"{file}: page {broken} is damaged; copy it again whole, or train into a new --store")

    def close(self) -> None:
        """Release the file."""
        self.environment.close()
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1

    @property
    def stamp(self) -> int:
        """A number that changes with every transaction that anyone writes; cheap to ask for."""
        return int(self.environment.info()["last_txnid"])

    # -- transactions -----------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def read(self, in_place: bool = False) -> Iterator[Any]:
        """One read transaction: a consistent view, whatever a trainer elsewhere commits meanwhile. ``in_place``: values
        are views into the file, valid until the end of the transaction. Raises: StoreError if the file cannot be
        read."""
        import lmdb

        with self._lock:
            try:
                try:
                    txn = self.environment.begin(buffers=in_place)
                except lmdb.MapResizedError:  # that trainer has grown the map
                    self.environment.set_mapsize(0)
                    txn = self.environment.begin(buffers=in_place)
                with txn:
                    yield txn
            except lmdb.Error as error:
                raise StoreError(f"{self.folder}: cannot be read ({error})") from error

    def write(self, action: Callable[[Any], _T]) -> _T:
        """Run ``action(txn)`` in one write transaction; where the map is full, it grows and the action runs again.

        Raises: StoreError if the disk is full or the file cannot be written.
        """
        import lmdb

        with self._lock:
            while True:
                try:
                    with self.environment.begin(write=True) as txn:
                        result = action(txn)
                    # LMDB does not write a trailing page that a transaction took and gave back.
                    if (size := _size(self.environment)) > os.stat(self.environment.path()).st_size:
                        os.truncate(self.environment.path(), size)
                    return result
                except lmdb.MapFullError:
                    self.environment.set_mapsize(self.environment.info()["map_size"] * 2)
                except lmdb.MapResizedError:
                    self.environment.set_mapsize(0)
                except lmdb.DiskError as error:
                    raise StoreError(
                        f"{self.folder}: the disk is full; free some space and run the same command again"
                    ) from error
                except lmdb.Error as error:
                    raise StoreError(f"{self.folder}: cannot be written ({error})") from error

    def sync(self) -> None:
        """Wait until everything written is on the disk. Raises: StoreError if that fails."""
        import lmdb

        try:
            self.environment.sync(True)
            self.environment.reader_check()  # one that was killed meanwhile would make the file grow until we close it
        except lmdb.Error as error:
            raise StoreError(f"{self.folder}: cannot be written ({error})") from error

    # -- records ----------------------------------------------------------------------------------------------------

    def damaged(self, what: str) -> StoreError:
        """The error that says so and names the command that finds all damage."""
        return StoreError(f"{self.folder}: {what}; run: python -m cas verify --store {self.folder}")

    def parse(self, value: bytes | None) -> dict[str, Any]:
        """A record. Raises StoreError if it is missing or damaged."""
        try:
            fields = dict(json.loads(bytes(value or b"")))
        except (ValueError, TypeError) as error:
            raise self.damaged("a record is damaged") from error
        expected = fields.pop("checksum", None)  # stores of format 2 have none
        if expected is not None and expected != checksum(to_json(fields)):
            raise self.damaged("a record is damaged")
        return fields

    def parse_row(self, value: bytes | None) -> Row:
        """A document's record. Raises StoreError if it is damaged."""
        try:
            return Row(**self.parse(value))
        except TypeError as error:
            raise self.damaged("a record is damaged") from error

    def row(self, txn: Any, document: str) -> Row:
        """The record of a document. Raises CollectionError for an unknown id."""
        value = txn.get(row_key(document))
        if value is None:
            raise CollectionError(
                f"{self.folder} has no cartridge {document!r}; see: python -m cas ls --store {self.folder}"
            )
        return self.parse_row(value)

    def rows(self, txn: Any, space: str = "") -> dict[str, Row]:
        """All records of documents by id, in order of id."""
        rows = [self.parse_row(value) for _, value in under(txn, f"{space}row/".encode())]
        return {row.id: row for row in sorted(rows, key=lambda row: row.id)}

    def text(self, txn: Any, row: Row, space: str = "") -> str:
        """A document's text, checked against its hash."""
        text = txn.get(text_key(row.id, space))
        if text is None or hashlib.sha256(f"{row.title}\n".encode() + text).hexdigest() != row.hash:
            raise self.damaged(f"the text of {row.id!r} is missing or damaged")
        return str(text.decode())

    # -- tensors ----------------------------------------------------------------------------------------------------

    def blob(self, txn: Any, kind: str, name: str, version: int, expected: int | None, space: str = "") -> Any:
        """Bytes of a safetensors file (``kind``: "kv" or "state") that has the expected checksum, in place where the
        transaction reads in place. Raises CollectionError where no checksum is recorded since the cartridge is not
        initialized yet."""
        if expected is None:
            raise CollectionError(f"{self.folder}: {name!r} has no cartridge yet; go on with its training")
        blob = txn.get(blob_keys(name, version, space)[0 if kind == "kv" else 1])
        if blob is None or checksum(blob) != expected:
            what = "is missing" if blob is None else "fails its checksum"
            raise self.damaged(f"{kind} of {name!r} {what}")
        return blob

    def tensors(
        self, txn: Any, kind: str, name: str, version: int, expected: int | None, space: str = ""
    ) -> dict[str, Tensor]:
        """The tensors in a :meth:`blob`, float32 on the CPU, whatever they are stored as."""
        try:
            return parse_tensors(self.blob(txn, kind, name, version, expected, space))
        except ValueError as error:
            if isinstance(error, CasError):
                raise
            raise self.damaged(f"{kind} of {name!r} is {error}") from error

    def put_tensors(
        self, name: str, version: int, tensors: Mapping[str, Tensor], about: Mapping[str, Any]
    ) -> tuple[int, int | None]:
        """Write a version of a cartridge ("kv", with ``about`` as metadata) and of its optimizer state (all other
        tensors).

        Returns: their checksums, None where there is no state.
        """
        state = {k: t for k, t in tensors.items() if k != "kv"}
        metadata = {"cartridge": to_json(about).decode()}
        kv_key, state_key = blob_keys(name, version)

        def put(txn: Any, key: bytes, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
            blob = dump_tensors(values, metadata, self._buffer)
            txn.put(key, blob)
            result = checksum(blob)
            blob.release()  # the next one may need a larger buffer
            return result

        return self.write(
            lambda txn: (
                put(txn, kv_key, {"kv": tensors["kv"]}, metadata),
                put(txn, state_key, state, {}) if state else None,
            )
        )

    def verify(self) -> list[str]:
        """Read everything back; one line for each thing that is broken (none: the store is whole)."""
        broken = []
        with self.read() as txn:
            spaces = ("", OLD, WITHDRAWN)
            keys = [(space, key) for space in spaces for key, _ in under(txn, f"{space}row/".encode(), values=False)]
            for key in (b"meta", b"run", PENDING):
                try:
                    self.parse(txn.get(key, record({})))
                except StoreError:
                    broken.append(f"{key.decode()}: the record is damaged")
        for space, key in keys:
            with self.read() as txn:  # one at a time: a long transaction would keep a trainer's old versions alive
                try:
                    row = self.parse_row(txn.get(key))
                except StoreError:
                    broken.append(f"{key.decode()}: the record is damaged")
                    continue
                try:
                    self.text(txn, row, space)
                except StoreError as error:
                    broken.append(str(error).rpartition("; run:")[0])
                for kind, expected in (("kv", row.kv_hash), ("state", row.state_hash)):
                    try:
                        args = txn, kind, row.id, row.version, expected, space
                        tensors = {} if expected is None else self.tensors(*args)
                    except StoreError as error:
                        broken.append(str(error).rpartition("; run:")[0])
                        continue
                    if not all(bool(t.isfinite().all()) for t in tensors.values()):
                        broken.append(f"{row.id}: {kind}: holds a value that is not finite")
                    if any(t.shape[3] != row.p for t in tensors.values()):
                        broken.append(f"{row.id}: {kind}: has another size than its record says")
        return broken


def _size(environment: Any) -> int:
    """Bytes that an LMDB file has by its own records."""
    return int((environment.info()["last_pgno"] + 1) * environment.stat()["psize"])


def checksum(blob: Any) -> int:
    """XXH3 of a value, as rows record it: as fast as memory."""
    import xxhash

    return xxhash.xxh3_64_intdigest(blob)


def under(txn: Any, prefix: bytes, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
    """Keys that begin with a prefix, and their values (empty if not wanted: a blob is large)."""
    with txn.cursor() as cursor:
        more = cursor.set_range(prefix)
        while more and cursor.key().startswith(prefix):
            yield cursor.key(), cursor.value() if values else b""
            more = cursor.next()


def hashed(document: str) -> str:
    """A hash that stands for an id in keys: ids may be any text, and LMDB keys are short."""
    return hashlib.blake2b(document.encode(), digest_size=12).hexdigest()


def row_key(document: str, space: str = "") -> bytes:
    """Key of a document's row; ``space``: "", or OLD or WITHDRAWN."""
    return f"{space}row/{hashed(document)}".encode()


def text_key(document: str, space: str = "") -> bytes:
    """Key of a document's text."""
    return f"{space}text/{hashed(document)}".encode()


def blob_keys(name: str, version: int, space: str = "") -> tuple[bytes, bytes]:
    """Keys of a version of a cartridge and of its optimizer state."""
    return f"{space}kv/{hashed(name)}/{version}".encode(), f"{space}state/{hashed(name)}/{version}".encode()


def record(value: Mapping[str, Any]) -> bytes:
    """A record as it is stored: JSON with a checksum of all the rest."""
    plain = json.loads(to_json(value))  # as reading will see it
    return to_json({**plain, "checksum": checksum(to_json(plain))})


def to_json(value: Any) -> bytes:
    """JSON as bytes, the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
