"""The files of an index: ``index.faiss`` and ``chunks.json``, written together and checked when read; and ``words``, a
folder beside them that :class:`retrieval.WordIndex` can make again at any time."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMAT = 2  # 1: chunks were not limited to what the embedder reads
_NAMES = ("index.faiss", "chunks.json")
WORDS = "words"


class IndexBroken(ValueError):
    """An index on disk that is missing, damaged or of another embedder; it must be built again."""

    def __init__(self, folder: str | Path, reason: str) -> None:
        super().__init__(f"no usable index in {folder}: {reason}; build the index again")


class OtherEmbedder(IndexBroken):
    """An index that was made with another embedder. ``made``, ``given``: their names and dimensions."""

    def __init__(self, folder: str | Path, made: str, given: str) -> None:
        super().__init__(folder, f"it was made with the embedder {made}, not {given}")
        self.made, self.given = made, given


def write_index(folder: Path, vectors: bytes, body: dict[str, Any]) -> None:
    """Make ``folder`` hold these vectors and this body (JSON), by way of a new folder next to it.

    A folder that is not empty cannot be replaced in one step: it is renamed away first, and :func:`read_index` and the
    next write find it under that name should we die in between. Raises FileExistsError if it holds other files.
    """
    folder = folder.resolve()
    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    if folder.exists():
        if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= {*_NAMES, WORDS}:
            raise FileExistsError(f"{folder} holds something other than an index; give the index a folder of its own")
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    body = body | {"faiss_sha256": hashlib.sha256(vectors).hexdigest()}
    header = {"format": FORMAT, "body_sha256": body_hash(body), "body": body}
    for name, content in zip(_NAMES, (vectors, json.dumps(header).encode())):
        with open(new / name, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    _sync(new)
    if folder.exists():
        os.rename(folder, old)
    os.rename(new, folder)
    _sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def read_index(folder: Path) -> tuple[mmap.mmap | bytes, dict[str, Any]]:
    """The vectors and the body that :func:`write_index` was given, both checked; raises :class:`IndexBroken`."""
    folder = folder.resolve()
    source = folder if folder.exists() else _sibling(folder, "old")
    try:
        header = json.loads((source / "chunks.json").read_bytes())
        with open(source / "index.faiss", "rb") as file:
            empty = file.seek(0, os.SEEK_END) == 0
            vectors = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexBroken(folder, f"{Path(error.filename).name} is missing") from None
    except ValueError:
        raise IndexBroken(folder, "chunks.json is damaged") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise IndexBroken(folder, f"chunks.json is not of format {FORMAT}")
    body = header.get("body")
    if not isinstance(body, dict) or header.get("body_sha256") != body_hash(body):
        raise IndexBroken(folder, "chunks.json does not match its checksum")
    if body["faiss_sha256"] != hashlib.sha256(vectors).hexdigest():
        raise IndexBroken(folder, "index.faiss does not match its checksum")
    return vectors, body


def write_words(folder: Path, key: str, write: Callable[[Path], None]) -> None:
    """Make ``words`` in an index's folder, by way of a new folder: files that ``write`` makes, with ``key``."""
    if not folder.is_dir():
        raise FileNotFoundError(f"no index in {folder}")
    new, final = _sibling(folder.resolve(), "words"), folder / WORDS
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    write(new)
    (new / "key.json").write_text(json.dumps({"key": key, "sha256": _digests(new)}))
    for path in new.iterdir():
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    os.rename(new, final)


def check_words(folder: Path, key: str) -> Path:
    """The ``words`` of an index's folder if they have this key and are whole; raises :class:`IndexBroken`."""
    words = folder / WORDS
    try:
        header = json.loads((words / "key.json").read_bytes())
        if header["key"] != key:
            raise IndexBroken(words, "it was made of other documents")
        if header["sha256"] != _digests(words):
            raise IndexBroken(words, "its files do not match their checksums")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, IndexBroken):
            raise
        raise IndexBroken(words, "it is missing or damaged") from None
    return words


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for path in sorted(folder.iterdir()):
        if path.name != "key.json":
            with open(path, "rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests


def body_hash(body: dict[str, Any]) -> str:
    """SHA-256 of what ``chunks.json`` says, in hex."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
