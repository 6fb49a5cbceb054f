"""Renamed and dropped documents in the files beside a store's database: conversations, step logs, lists of ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cas.errors import RunError
from cas.store.files import write_atomically


def erase(folder: Path, changes: Sequence[Mapping[str, Any]]) -> None:
    """Rewrite a store's files so that dropped documents are no longer in them and renamed ones have their new ids. It
    may be interrupted and called again.

    Args: changes: {"rename": {old id: new id}, "drop": [id]}, oldest first.
    Raises: RunError if a file cannot be read or written.
    """
    mark = hashlib.sha256(json.dumps(changes, sort_keys=True).encode()).hexdigest().encode()
    touched = {id for change in changes for id in (*change["rename"], *change["drop"])}

    def now(id: str) -> str | None:
        """Its id after all changes; None if it was dropped."""
        current: str | None = id
        for change in changes:
            if current is not None:
                current = None if current in change["drop"] else change["rename"].get(current, current)
        return current

    for units in sorted(folder.glob("conversations*")):
        rewritten = [_unit(file, touched, now, mark) for file in sorted(units.glob("unit-*.parquet"))]
        if any(rewritten):
            for copy in (*units.glob("units.*"), *units.glob("*.partial")):  # made of them again when they are read
                copy.unlink()
    for log in sorted(folder.glob("metrics*.jsonl")):
        _log(log, touched, now)
    file = folder / "without_conversations.json"
    if file.exists():
        entries = json.loads(file.read_text(encoding="utf-8"))
        if touched & entries.keys():
            kept = {new: text_hash for id, text_hash in entries.items() if (new := now(id)) is not None}
            write_atomically(file, json.dumps(kept, ensure_ascii=False, sort_keys=True, indent=1).encode())


def _unit(file: Path, touched: set[str], now: Callable[[str], str | None], mark: bytes) -> bool:
    """Rewrite one unit of conversations, if it is about any of them. ``mark``: a unit that has it is done already."""
    try:
        if (pq.read_metadata(file).metadata or {}).get(b"changes") == mark:
            return True
        ids = pq.read_table(file, columns=["document"]).column(0).to_pylist()
        if not touched & set(ids):
            return False
        table = pq.read_table(file, page_checksum_verification=True)
        kept = table.filter(pa.array([now(id) is not None for id in ids]))
        field = table.schema.field("document")
        column = pa.array([now(id) for id in kept.column("document").to_pylist()], field.type)
        kept = kept.set_column(table.schema.get_field_index("document"), field, column)
        partial = file.with_suffix(".partial")
        metadata = {**(table.schema.metadata or {}), b"changes": mark}
        pq.write_table(kept.replace_schema_metadata(metadata), partial, write_page_checksum=True)
        with open(partial, "rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(file)
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{file}: cannot be rewritten without dropped documents ({error})") from error
    return True


def _log(file: Path, touched: set[str], now: Callable[[str], str | None]) -> None:
    lines, different = [], False
    for line in file.read_bytes().splitlines(keepends=True):
        step = json.loads(line) if line.endswith(b"}\n") else {}
        if touched & set(step.get("targets", ())):
            step["targets"] = [new for id in step["targets"] if (new := now(id)) is not None]
            line, different = json.dumps(step).encode() + b"\n", True
        lines.append(line)
    if different:
        write_atomically(file, b"".join(lines))
