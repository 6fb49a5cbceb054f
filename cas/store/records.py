"""What lies under a store: records in an LMDB environment, its transactions, and what can go wrong with them."""

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

from cas.errors import CollectionError, StoreError

if TYPE_CHECKING:
    from torch import Tensor

_T = TypeVar("_T")
FORMAT = 3
READS = (2, FORMAT)  # 2: records have no checksum


@dataclass(frozen=True)
class Row:
    """One document of the store. ``version`` names the blobs that count; ``drawn`` conversations and ``steps`` Adam
    steps were trained; ``tokens`` are the document's; ``trained_tokens`` the conversations'; ``round``: of :mod:`cas.training.rounds`."""

    id: str
    title: str
    hash: str
    tokens: int
    p: int
    version: int
    kv_hash: int
    state_hash: int | None = None
    drawn: int = 0
    steps: int = 0
    trained_tokens: int = 0
    round: int = 0


class Database:
    """A folder with one LMDB environment. ``_read`` and ``_write`` are its transactions."""

    def __init__(self, folder: Path, environment: Any) -> None:
        self.folder, self._env = folder, environment
        self._lock = threading.RLock()  # a map must not grow under another thread's transaction
        self._meta: dict[str, Any] | None = None
        self._buffer = bytearray()

    def close(self) -> None:
        """Release the file."""
        self._env.close()

    @contextlib.contextmanager
    def _read(self, in_place: bool = False) -> Iterator[Any]:
        """One read transaction: a consistent view, whatever a trainer elsewhere commits meanwhile. ``in_place``: values are
        views into the file, good until the end of the transaction."""
        with self._lock:
            yield from self._reading(in_place)

    def _reading(self, in_place: bool) -> Iterator[Any]:
        import lmdb

        try:
            try:
                txn = self._env.begin(buffers=in_place)
            except lmdb.MapResizedError:  # that trainer has grown the map
                self._env.set_mapsize(0)
                txn = self._env.begin(buffers=in_place)
            with txn:
                yield txn
        except lmdb.Error as error:
            raise StoreError(f"{self.folder}: cannot be read ({error})") from error

    def _sync(self) -> None:
        """Wait until everything written is on the disk."""
        import lmdb

        try:
            self._env.sync(True)
        except lmdb.Error as error:
            raise StoreError(f"{self.folder}: cannot be written ({error})") from error

    def _write(self, action: Callable[[Any], _T]) -> _T:
        """One write transaction; a full map grows, a full disk is said in one line."""
        import lmdb

        with self._lock:
            while True:
                try:
                    with self._env.begin(write=True) as txn:
                        done = action(txn)
                    # LMDB does not write a trailing page that a transaction took and gave back.
                    if (size := _pages(self._env)) > os.stat(self._env.path()).st_size:
                        os.truncate(self._env.path(), size)
                    return done
                except lmdb.MapFullError:
                    self._env.set_mapsize(self._env.info()["map_size"] * 2)
                except lmdb.MapResizedError:
                    self._env.set_mapsize(0)
                except lmdb.DiskError as error:
                    raise StoreError(
                        f"{self.folder}: the disk is full; free some space and run the same command again"
                    ) from error
                except lmdb.Error as error:
                    raise StoreError(f"{self.folder}: cannot be written ({error})") from error

    @property
    def meta(self) -> dict[str, Any]:
        """What was fixed at creation."""
        if self._meta is None:
            with self._read() as txn:
                self._meta = self._parse(txn.get(b"meta"))
        return self._meta

    def _broken(self, what: str) -> StoreError:
        return StoreError(f"{self.folder}: {what}; run: python -m cas verify --store {self.folder}")

    def _parse(self, value: bytes | None) -> dict[str, Any]:
        try:
            found = dict(json.loads(bytes(value or b"")))
        except (ValueError, TypeError) as error:
            raise self._broken("a record is damaged") from error
        expected = found.pop("checksum", None)  # stores of format 2 have none
        if expected is not None and expected != checksum(to_json(found)):
            raise self._broken("a record is damaged")
        return found

    def _blob(self, txn: Any, kind: str, name: str, version: int, wanted: int) -> Any:
        """Bytes of a safetensors file, in place where the transaction reads in place; its checksum is right."""
        blob = txn.get(blob_keys(name, version)[0 if kind == "kv" else 1])
        if blob is None or checksum(blob) != wanted:
            what = "is missing" if blob is None else "fails its checksum"
            raise self._broken(f"{kind} of {name!r} {what}")
        return blob

    def _text(self, txn: Any, row: Row) -> str:
        text = txn.get(text_key(row.id))
        if text is None or hashlib.sha256(f"{row.title}\n".encode() + text).hexdigest() != row.hash:
            raise self._broken(f"the text of {row.id!r} is missing or damaged")
        return str(text.decode())

    def _row(self, value: bytes | None, document: str = "") -> Row:
        if value is None:
            raise CollectionError(
                f"{self.folder} has no cartridge {document!r}; see: python -m cas ls --store {self.folder}"
            )
        try:
            return Row(**self._parse(value))
        except TypeError as error:
            raise self._broken("a record is damaged") from error

    def _put(self, name: str, version: int, tensors: Mapping[str, Tensor], title: str) -> tuple[int, int, int | None]:
        model = self.meta["model"]
        about = {
            "format": FORMAT,
            "id": name,
            "title": title,
            "model": model["source"]["name"],
            "fingerprint": model["fingerprint"],
            "rope": model["rope"],
            "header": len(model["header_ids"]),
            "positions": self.meta["positions"],
        }
        kv_key, state_key = blob_keys(name, version)
        state = {k: t for k, t in tensors.items() if k != "kv"}

        def write(txn: Any) -> tuple[int, int | None]:
            sums: list[int | None] = [None, None]
            for i, (key, some) in enumerate(((kv_key, {"kv": tensors["kv"]}), (state_key, state))):
                if some:
                    metadata = {} if i else {"cartridge": to_json(about).decode()}
                    blob = dump_tensors(some, metadata, self._buffer)
                    sums[i] = checksum(blob)
                    txn.put(key, blob)
                    blob.release()  # the next one may need a larger buffer
            assert sums[0] is not None
            return sums[0], sums[1]

        return version, *self._write(write)

    def _get(self, txn: Any, kind: str, name: str, version: int, wanted: int) -> dict[str, Tensor]:
        return parse_tensors(self._blob(txn, kind, name, version, wanted))

    def verify(self) -> list[str]:
        """Read everything back; one line for each thing that is broken (none: the store is whole)."""
        broken = []
        with self._read() as txn:
            keys = [key for key, _ in under(txn, b"row/")]
            for key in (b"meta", b"run"):
                try:
                    self._parse(txn.get(key, record({})))
                except StoreError:
                    broken.append(f"{key.decode()}: the record is damaged")
        for key in keys:
            with self._read() as txn:  # one at a time: a long transaction would keep a trainer's old versions alive
                try:
                    row = self._row(txn.get(key))
                except StoreError:
                    broken.append(f"{key.decode()}: the record is damaged")
                    continue
                try:
                    self._text(txn, row)
                except StoreError as error:
                    broken.append(str(error).rpartition("; run:")[0])
                for kind, wanted in (("kv", row.kv_hash), ("state", row.state_hash)):
                    try:
                        tensors = {} if wanted is None else self._get(txn, kind, row.id, row.version, wanted)
                    except StoreError as error:
                        broken.append(str(error).rpartition("; run:")[0])
                        continue
                    if not all(bool(t.isfinite().all()) for t in tensors.values()):
                        broken.append(f"{row.id}: {kind}: holds a value that is not finite")
                    if any(t.shape[3] != row.p for t in tensors.values()):
                        broken.append(f"{row.id}: {kind}: has another size than its record says")
        return broken


def open_environment(file: Path, write: bool) -> Any:
    """Open or make an LMDB file. Raises StoreError if it is none."""
    import lmdb

    existing = file.stat().st_size if file.exists() else 0
    try:
        # The map is address space, not disk; it doubles when it is full.
        found = lmdb.open(
            str(file), subdir=False, map_size=max(1 << 30, 2 * existing), readonly=not write, max_readers=512, lock=True,
            metasync=False,  # a version that no checkpoint names need not outlive a power cut; a checkpoint syncs
        )  # fmt: skip
    except lmdb.Error as error:
        raise StoreError(f"{file}: cannot be opened as a store ({error})") from error
    if (missing := _pages(found) - file.stat().st_size) > 0:  # reading such a page of the map would end the process
        found.close()
        raise StoreError(
            f"{file}: the last {missing:,} bytes are missing; copy it again whole, or train into a new --store"
        )
    return found


def _pages(environment: Any) -> int:
    """Bytes that an LMDB file has by its own records."""
    return int((environment.info()["last_pgno"] + 1) * environment.stat()["psize"])


def checksum(blob: Any) -> int:
    """XXH3 of a value, as rows record it: as fast as memory."""
    import xxhash

    return xxhash.xxh3_64_intdigest(blob)


def dump_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, str], into: bytearray) -> memoryview:
    """float32 CPU tensors as a safetensors file with these metadata, in ``into``, which grows as needed and is used again:
    fresh memory for every value would cost more than the copy."""
    import numpy as np

    header_of: dict[str, Any] = {"__metadata__": dict(about)}
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = end, end + 4 * tensor.numel()
        header_of[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": list(places[name])}
        end = places[name][1]
    header = json.dumps(header_of, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    if len(into) < start + end:
        into.extend(bytes(start + end - len(into)))
    view = memoryview(into)[: start + end]
    view[:8], view[8:start] = len(header).to_bytes(8, "little"), header
    for name, tensor in tensors.items():
        low, high = (start + n for n in places[name])
        np.copyto(np.frombuffer(view[low:high], np.float32).reshape(tensor.shape), tensor.numpy())
    return view


def parse_tensors(blob: Any) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file, copied once. The file is a length, a JSON header and the data."""
    import numpy as np
    import torch

    view = memoryview(blob)
    start, found = 8 + int.from_bytes(view[:8], "little"), {}
    for name, about in json.loads(bytes(view[8:start])).items():
        if name != "__metadata__":
            assert about["dtype"] == "F32", "stores hold float32"
            low, high = about["data_offsets"]
            data = np.frombuffer(view[start + low : start + high], np.float32).copy()
            found[name] = torch.from_numpy(data).view(about["shape"])
    return found


def under(txn: Any, prefix: bytes, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
    """Keys that begin with a prefix, and their values (empty if not wanted: a blob is large)."""
    with txn.cursor() as cursor:
        found = cursor.set_range(prefix)
        while found and cursor.key().startswith(prefix):
            yield cursor.key(), cursor.value() if values else b""
            found = cursor.next()


def hashed(document: str) -> str:
    """Ids are anybody's text and LMDB keys are short: a hash stands for the id."""
    return hashlib.blake2b(document.encode(), digest_size=12).hexdigest()


def row_key(document: str) -> bytes:
    """Where a document's row is."""
    return f"row/{hashed(document)}".encode()


def text_key(document: str) -> bytes:
    """Where its text is."""
    return f"text/{hashed(document)}".encode()


def blob_keys(name: str, version: int) -> tuple[bytes, bytes]:
    """Where a version of its cartridge is, and of the optimiser state."""
    return f"kv/{hashed(name)}/{version}".encode(), f"state/{hashed(name)}/{version}".encode()


def record(value: Mapping[str, Any]) -> bytes:
    """A record as it is stored: JSON with a checksum of all the rest."""
    plain = json.loads(to_json(value))  # as it will be read
    return to_json({**plain, "checksum": checksum(to_json(plain))})


def to_json(value: Any) -> bytes:
    """JSON as bytes, the same for equal values."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
