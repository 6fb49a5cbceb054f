"""The files of a store: the lock on its LMDB file, its compaction, and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cas.errors import StoreError, StoreLocked

_PAGE = struct.Struct("<Q2xHH2x")  # number, flags (1: branch, 2: leaf), end of the list of nodes
# After magic, version, address and size: depth and root of both trees; last page, number of the transaction.
_META = struct.Struct("<24x6xH32xQ6xH32xQ8xQ")


def shared_lock(file: Path, create: bool) -> int:
    """A descriptor of a store's file under a shared lock, so that nobody replaces the file meanwhile.

    Raises: StoreLocked while it is being replaced; StoreError if it cannot be read.
    """
    while True:
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT if create else os.O_RDONLY, 0o644)
        except OSError as error:
            raise StoreError(f"{file}: cannot be opened as a store ({error.strerror})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise StoreLocked(f"{file.parent} is being compacted; try again when that is done") from error
        except OSError:  # a file system without locks
            return descriptor
        if file.exists() and os.path.samestat(os.fstat(descriptor), file.stat()):
            return descriptor
        os.close(descriptor)  # replaced in between


def broken_page(file: Path, txn: int, page_size: int) -> int | None:
    """The number of a page of LMDB's trees, as of a transaction, that is none; None if all are whole.

    LMDB ends the process at a page that was zeroed, as by a copy that was cut short and has its full size all the same.
    Only the headers of leaves are read: what records and tensors say has checksums. Layout: MDB_meta and MDB_page of
    LMDB 0.9.
    """
    with open(file, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if struct.unpack_from("<I", data, _PAGE.size + 4) != (1,):  # a layout that we do not know
            return None
        metas = (_META.unpack_from(data, n * page_size + _PAGE.size) for n in (0, 1))
        found = next((m for m in metas if m[-1] == txn), None)
        if found is None:
            return 0
        # Depth and root of the tree of free pages and of the main one.
        pending = [(root, depth) for depth, root in (found[:2], found[2:4]) if depth]
        while pending:
            number, depth = pending.pop()
            at = number * page_size
            if at + page_size > len(data):
                return number
            its_number, flags, lower = _PAGE.unpack_from(data, at)
            if its_number != number or flags & 0x3 != (0x2 if depth == 1 else 0x1):
                return number
            if depth > 1:
                for n in range((lower - _PAGE.size) // 2):
                    (node,) = struct.unpack_from("<H", data, at + _PAGE.size + 2 * n)
                    low, high, top = struct.unpack_from("<HHH", data, at + node)
                    pending.append((low | high << 16 | top << 32, depth - 1))
    return None


def lock_alone(folder: Path, descriptor: int) -> None:
    """Lock a store's file for its replacement, until it is closed. Raises: StoreLocked if anyone else has the store open."""
    try:
        # Not only for writers: LMDB's file of readers is valid for the file that they have open.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StoreLocked(f"{folder} is open in another process; stop that one first") from error


def compact(environment: Any, descriptor: int) -> tuple[int, int]:
    """Replace a store's file by one without free pages; the environment must be closed afterwards.

    Args: descriptor: that of :func:`shared_lock`.
    Returns: bytes before and after. Raises: StoreLocked if anyone else has the store open; StoreError if the disk is full.
    """
    import lmdb

    file = Path(environment.path())
    lock_alone(file.parent, descriptor)
    new, before = file.with_name(f"{file.name}.compact"), file.stat().st_size
    new.unlink(missing_ok=True)
    try:
        environment.copy(str(new), compact=True)
        _sync(new)
        new.replace(file)
        _sync(file.parent)
    except (OSError, lmdb.Error) as error:
        new.unlink(missing_ok=True)
        raise StoreError(f"{file.parent}: cannot be compacted ({error}); nothing has changed") from error
    return before, file.stat().st_size


@contextlib.contextmanager
def writing(file: Path) -> Iterator[None]:
    """Work that writes a file. Raises: StoreError, with its name and what to do, if the disk is full or refuses it."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        advice = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "see to that"
        raise StoreError(f"{file}: {reason}; {advice} and run the same command again") from error


def write_atomically(file: Path, content: Any) -> None:
    """Write bytes to a file, whole or not at all. Raises: StoreError if that fails."""
    with writing(file):
        partial = file.with_name(f"{file.name}.partial")
        with partial.open("wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(file)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
