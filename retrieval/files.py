"""The two files of an index, ``index.faiss`` and ``chunks.json``: written together, checked when read."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

FORMAT = 1
_NAMES = ("index.faiss", "chunks.json")


class IndexBroken(ValueError):
    """An index on disk that is missing, damaged or of another embedder; it must be built again."""

    def __init__(self, folder: str | Path, reason: str) -> None:
        super().__init__(f"no usable index in {folder}: {reason}; build the index again")


def write_index(folder: Path, vectors: bytes, body: dict[str, Any]) -> None:
    """Make ``folder`` hold these vectors and this body (JSON), by way of a new folder next to it.

    A folder that is not empty cannot be replaced in one step: it is renamed away first, and :func:`read_index` and the
    next write find it under that name should we die in between. Raises FileExistsError if it holds other files.
    """
    folder = folder.resolve()
    new, old = _sibling(folder, "new"), _sibling(folder, "old")
    if folder.exists():
        if not folder.is_dir() or not {path.name for path in folder.iterdir()} <= set(_NAMES):
            raise FileExistsError(f"{folder} holds something other than an index; give the index a folder of its own")
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    body = body | {"faiss_sha256": hashlib.sha256(vectors).hexdigest()}
    header = {"format": FORMAT, "body_sha256": _body_hash(body), "body": body}
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


def read_index(folder: Path) -> tuple[bytes, dict[str, Any]]:
    """The vectors and the body that :func:`write_index` was given, both checked; raises :class:`IndexBroken`."""
    folder = folder.resolve()
    source = folder if folder.exists() else _sibling(folder, "old")
    try:
        header = json.loads((source / "chunks.json").read_bytes())
        vectors = (source / "index.faiss").read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise IndexBroken(folder, f"{Path(error.filename).name} is missing") from None
    except ValueError:
        raise IndexBroken(folder, "chunks.json is damaged") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise IndexBroken(folder, f"chunks.json is not of format {FORMAT}")
    body = header.get("body")
    if not isinstance(body, dict) or header.get("body_sha256") != _body_hash(body):
        raise IndexBroken(folder, "chunks.json does not match its checksum")
    if body["faiss_sha256"] != hashlib.sha256(vectors).hexdigest():
        raise IndexBroken(folder, "index.faiss does not match its checksum")
    return vectors, body


def _body_hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _sibling(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
