"""A store as plain files, for a journey: ``store.json``, a safetensors file and a text of each document.

The database itself does not travel: whoever receives a store builds a new one from numbers, texts and records that were
checked, so nothing of a stranger's is executed, and no file of his is mapped into memory unchecked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection as AnyOf
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

from cas.errors import CollectionError, StoreError, StoreExists
from cas.exchange.files import dump
from cas.exchange.model_card import card
from cas.store.blobs import Values, metadata_of, parse_tensors
from cas.store.files import write_atomically, writing
from cas.store.merge import RecordedModel, built_beside, read_document, write_documents
from cas.store.records import Row, checksum, hashed
from cas.store.store import Store

RECORD, FORMAT = "store.json", 1
_SETTINGS = ("tokens", "ratio", "span", "positions", "initialisation", "seed")
_FIGURES = ("tokens", "p", "drawn", "steps", "trained_tokens")
_RECORD_BYTES = 1 << 28
_AT_ONCE = 16  # documents in one transaction


def files_of(document: str) -> tuple[str, str]:
    """Where a document's cartridge and text are in a parcel: never a path that somebody else has chosen."""
    return f"cartridges/{hashed(document)}.safetensors", f"texts/{hashed(document)}.txt"


def pack(store: Store, ids: Sequence[str], folder: Path, name: str) -> int:
    """Write the documents (none given: all) of a finished store as files, with a model card for ``name``.

    What belongs to training (optimizer state, self-study, logs) and the retrieval index stay behind.
    Returns: the number of documents. Raises: ConfigError for a store in training; CollectionError for an unknown id.
    """
    store.refuse_unfinished()
    names = list(dict.fromkeys(ids)) or list(store.answering())
    if not names:
        raise CollectionError(f"{store.folder} has no cartridges")
    model = dict(store.meta["model"])
    if model["source"]["kind"] in ("folder", "gguf"):  # where it is on this machine is nobody's business
        model["source"] = {**model["source"], "name": Path(model["source"]["name"]).name}
    documents = []
    with writing(folder):
        for place in ("cartridges", "texts"):
            (folder / place).mkdir(parents=True, exist_ok=True)
    for id in names:
        with store.records.read() as txn:
            row, text, blob, _ = read_document(store, txn, id, False, 0)
        for place, content in zip(files_of(id), (blob, text.encode()), strict=True):
            write_atomically(folder / place, content)
        documents.append({f: getattr(row, f) for f in ("id", "title", "hash", *_FIGURES)})
    about = {
        "format": FORMAT,
        "model": model,
        "values": store.meta.get("values", "float32"),
        **{setting: store.meta[setting] for setting in _SETTINGS},
        "documents": documents,
    }
    write_atomically(folder / RECORD, dump(about).encode())
    write_atomically(folder / "README.md", card(about, name).encode())
    return len(names)


def read_record(file: Path) -> dict[str, Any]:
    """``store.json`` of a parcel, checked. Raises: CollectionError for anything but what :func:`pack` writes."""
    try:
        if file.stat().st_size > _RECORD_BYTES:
            raise ValueError("too large")
        about = json.loads(file.read_text(encoding="utf-8"))
        _check(about)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CollectionError(f"{file.name} is not that of a store of CAS ({type(error).__name__}: {error})") from error
    return dict(about)


def unpack(folder: Path, about: dict[str, Any], ids: AnyOf[str], target: Path) -> Store:
    """A new store of a parcel's documents; they learn no more, and others can be trained beside them.

    Args: about: of :func:`read_record`; ids: the documents, none for all.
    Returns: the store, open for reading, verified. Raises: StoreExists; CollectionError for unknown ids or files that are
        not what the record says; StoreError if verification fails. Then nothing is left.
    """
    chosen = choose(about, ids)
    if target.exists() and any(target.iterdir()):
        raise StoreExists(f"{target} exists already; name a new folder as --store")
    settings = {name: about[name] for name in (*_SETTINGS, "values")}
    with (
        built_beside(target) as unfinished,
        Store.create(unfinished, RecordedModel(about["model"]), round=1, **settings) as store,
    ):
        for first in range(0, len(chosen), _AT_ONCE):
            documents = [_read(folder, about, d) for d in chosen[first : first + _AT_ONCE]]
            store.records.write(partial(write_documents, documents=documents))
        store.records.sync()
        if broken := store.verify():
            raise StoreError(f"{target.name}: {broken[0]}")
    return Store.open(target)


def choose(about: dict[str, Any], ids: AnyOf[str]) -> list[dict[str, Any]]:
    """The records of these documents, or of all. Raises: CollectionError for an unknown id."""
    known = {d["id"]: d for d in about["documents"]}
    for id in ids:
        if id not in known:
            raise CollectionError(
                f"there is no cartridge {id!r}; it has {', '.join(list(known)[:10])}{' …' * (len(known) > 10)}"
            )
    return [d for i, d in known.items() if not ids or i in ids]


def _read(folder: Path, about: dict[str, Any], document: dict[str, Any]) -> tuple[Row, str, bytes, None]:
    """Row, text and cartridge of a document, each as the record says."""
    cartridge, text_file = (folder / place for place in files_of(document["id"]))
    geometry = about["model"]["geometry"]
    shape = (geometry["layers"], 2, geometry["kv_heads"], document["p"], geometry["head_dim"])
    what = f"{document['id']!r}: "
    try:
        numbers = 4 * shape[0] * shape[1] * shape[2] * shape[3] * shape[4]
        if cartridge.stat().st_size > 2 * numbers + (1 << 20):
            raise CollectionError(f"{what}its cartridge is larger than a cartridge can be")
        blob, text = cartridge.read_bytes(), text_file.read_bytes()
        tensors, metadata = parse_tensors(blob), metadata_of(blob)
        described = json.loads(metadata.get("cartridge", "{}"))
    except CollectionError:
        raise
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CollectionError(f"{what}its cartridge or text is missing or broken ({type(error).__name__})") from error
    if set(tensors) != {"kv"} or tensors["kv"].shape != shape or not isinstance(described, dict):
        raise CollectionError(f"{what}its cartridge is not {list(shape)}")
    if hashlib.sha256(f"{document['title']}\n".encode() + text).hexdigest() != document["hash"]:
        raise CollectionError(f"{what}its text is not the one that was packed")
    figures = {name: document[name] for name in _FIGURES}
    row = Row(document["id"], document["title"], document["hash"], version=1, kv_hash=checksum(blob), **figures)
    return row, text.decode(), blob, None


def _check(about: Any) -> None:
    """Raise ValueError, TypeError or KeyError for a record that :func:`pack` could not have written."""
    _expect(about["format"] == FORMAT, f"format {about['format']!r}, this version reads {FORMAT}")
    _expect(about["values"] in get_args(Values), "values")
    model = about["model"]
    _texts(model, ("fingerprint", "rope", "dtype", "system"))
    _texts(model["source"], ("kind", "name"))
    _expect(model["source"]["revision"] is None or isinstance(model["source"]["revision"], str), "revision")
    geometry = model["geometry"]
    _counts(geometry, ("layers", "query_heads", "kv_heads", "head_dim", "hidden", "vocabulary", "max_positions"), 1)
    windows = geometry["windows"]
    _expect(len(windows) == geometry["layers"], "windows")
    _expect(all(w is None or type(w) is int for w in windows), "windows")
    _expect(all(type(i) is int and 0 <= i < geometry["vocabulary"] for i in model["header_ids"]), "header_ids")
    _counts(about, ("span", "seed"), 0)
    seen = set()
    for document in about["documents"]:
        _texts(document, ("id", "title", "hash"))
        _counts(document, _FIGURES, 0)
        _expect(0 < document["p"] < geometry["max_positions"], "p")
        _expect(document["id"] not in seen, "an id stands there twice")
        seen.add(document["id"])
    _expect(bool(seen), "no documents")


def _expect(right: bool, what: str) -> None:
    if not right:
        raise ValueError(what)


def _texts(fields: Any, names: Iterable[str]) -> None:
    for name in names:
        _expect(isinstance(fields[name], str) and len(fields[name]) < 100_000, name)


def _counts(fields: Any, names: Iterable[str], least: int) -> None:
    for name in names:
        _expect(type(fields[name]) is int and least <= fields[name] < 2**40, name)
