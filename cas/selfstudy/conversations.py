"""Training conversations: a question, its answer and the teacher's probabilities; one Parquet file per unit.

Training reads them from one memory-mapped Arrow file made of all units, so memory does not grow with the collection.
"""

from __future__ import annotations

import contextlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, overload

import numpy as np

from cas.errors import RunError
from cas.model.frozen import FrozenModel
from cas.store.files import write_atomically, writing

_JOINED = "units.arrow"
_COLUMNS = ("document", "kind", "question", "prompt", "answer", "top_ids", "top_logprobs")


@dataclass(frozen=True)
class Conversation:
    """One question and answer. ``answer`` ends with the end-of-turn token; ``top_*``: [answer, K]."""

    document: str
    kind: str
    question: str
    prompt: np.ndarray  # int32, the user's message
    answer: np.ndarray  # int32
    top_ids: np.ndarray  # int32
    top_logprobs: np.ndarray  # float32

    def tokens(self, model: FrozenModel) -> list[int]:
        """Own tokens of the student: footer, question, suffix, answer without its last token. The last ``len(answer)``
        rows predict the answer."""
        template = model.template
        return [*template.footer_ids, *self.prompt.tolist(), *template.suffix_ids, *self.answer[:-1].tolist()]


class Asked(Protocol):
    """What a plan has to know of a conversation."""

    @property
    def document(self) -> str: ...

    @property
    def question(self) -> str: ...


@dataclass(frozen=True)
class Outline:
    """A conversation without its tokens."""

    document: str
    question: str


class Conversations:
    """All conversations of a store, by document; ``dropped`` counts dropped questions and answers by reason."""

    def __init__(self, items: Iterable[Conversation], dropped: dict[str, int]) -> None:
        self.dropped = dropped
        self.by_document: dict[str, Sequence[Conversation]] = {}
        by_document: dict[str, list[Conversation]] = {}
        for item in items:
            by_document.setdefault(item.document, []).append(item)
        self.by_document |= by_document

    def __len__(self) -> int:
        return sum(map(len, self.by_document.values()))

    @classmethod
    def load(cls, folder: Path, units: int | None = None, verify: bool = True) -> Conversations:
        """Open all finished units of a store's ``conversations`` folder, or the first ``units`` of them. Each
        conversation is read from disk when it is used. ``verify``: read everything once against its checksum.
        Raises: RunError for a damaged unit, StoreError when the disk is full."""
        files = sorted(folder.glob("unit-*.parquet"))[:units]
        joined = folder / _JOINED
        dropped = _joined_before(files, joined, verify)
        conversations = cls((), dict(_join(files, joined) if dropped is None else dropped))
        rows: dict[str, array[int]] = {}
        batches = [_Batch(batch) for batch in _batches(joined)]
        for number, batch in enumerate(batches):
            for row, document in enumerate(batch.columns["document"].to_pylist()):
                if (places := rows.get(document)) is None:
                    places = rows[document] = array("i")
                places.extend((number, row))
        conversations.by_document |= {
            name: _Lazy(batches, np.frombuffer(places, np.int32).reshape(-1, 2)) for name, places in rows.items()
        }
        return conversations


class _Batch:
    """One unit of the memory-mapped file."""

    def __init__(self, batch: Any) -> None:
        self.columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        self._flat: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    def numbers(self, column: str, row: int) -> np.ndarray:
        """One row of a column of lists, without copying."""
        if column not in self._flat:
            lists = self.columns[column]
            self._flat[column] = lists.offsets.to_numpy(), lists.values.to_numpy()
        offsets, values = self._flat[column]
        return values[offsets[row] : offsets[row + 1]]

    def conversation(self, row: int) -> Conversation:
        document, kind, question = (self.columns[name][row].as_py() for name in ("document", "kind", "question"))
        answer = self.numbers("answer", row)
        top = (self.numbers(name, row).reshape(len(answer), -1) for name in ("top_ids", "top_logprobs"))
        return Conversation(document, kind, question, self.numbers("prompt", row), answer, *top)


class _Lazy(Sequence[Conversation]):
    """The conversations of one document, each read from disk when it is used. ``rows``: int32 [N, 2], batch and row."""

    def __init__(self, batches: Sequence[_Batch], rows: np.ndarray) -> None:
        self._batches, self._rows = batches, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> list[Conversation]: ...
    def __getitem__(self, index: int | slice) -> Conversation | list[Conversation]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        batch, row = self._rows[index].tolist()
        return self._batches[batch].conversation(row)


def _batches(file: Path) -> list[Any]:
    import pyarrow as pa

    return list(pa.ipc.open_file(pa.memory_map(str(file))).read_all().to_batches())


def _join(files: Sequence[Path], joined: Path) -> Counter[str]:
    """Write all units into one Arrow file, completely or not at all; returns their drop counts by reason."""
    import pyarrow as pa

    dropped: Counter[str] = Counter()
    partial = joined.with_suffix(".partial")
    with writing(joined):
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, _schema()) as writer:
            for file in files:
                table, counts, _ = _read_table(file)
                dropped.update(counts)
                for batch in table.combine_chunks().to_batches():
                    writer.write_batch(batch)
        about = {"units": _stamps(files), "dropped": dropped, "checksum": _checksum(partial)}
        _about(joined).unlink(missing_ok=True)  # of the file that is replaced
        partial.replace(joined)
    write_atomically(_about(joined), json.dumps(about).encode())
    return dropped


def _joined_before(files: Sequence[Path], joined: Path, verify: bool) -> Counter[str] | None:
    """The drop counts if the joined file is of these units as they are, and whole; else it has to be made again."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        about = json.loads(_about(joined).read_text())
        if about["units"] == _stamps(files) and (not verify or about["checksum"] == _checksum(joined)):
            return Counter(about["dropped"])
    return None


def _about(joined: Path) -> Path:
    return joined.with_suffix(".json")


def _stamps(files: Sequence[Path]) -> list[list[str | int]]:
    """Name, size and time of the last change (ns) of every unit: a unit is replaced as a whole, never written into."""
    return [[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]


def _checksum(file: Path) -> str:
    import xxhash

    digest = xxhash.xxh3_64()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _schema() -> Any:
    import pyarrow as pa

    numbers = pa.list_(pa.int32())
    types = [pa.string()] * 3 + [numbers] * 3 + [pa.list_(pa.float32())]
    return pa.schema(list(zip(_COLUMNS, types, strict=True)))


def write_unit(file: Path, items: Sequence[Conversation], dropped: Counter[str], made_with: str) -> None:
    """Write one unit's conversations, completely or not at all. ``made_with``: JSON of everything that must be the same
    for the unit to be used again. Raises: StoreError if that fails."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {
        "document": [i.document for i in items],
        "kind": [i.kind for i in items],
        "question": [i.question for i in items],
        "prompt": [i.prompt for i in items],
        "answer": [i.answer for i in items],
        "top_ids": [i.top_ids.reshape(-1) for i in items],
        "top_logprobs": [i.top_logprobs.reshape(-1) for i in items],
    }
    schema = _schema().with_metadata({"made_with": made_with, "dropped": json.dumps(dropped, sort_keys=True)})
    partial = file.with_suffix(".partial")
    with writing(file):
        pq.write_table(pa.table(columns, schema=schema), partial, write_page_checksum=True)
        with open(partial, "rb+") as handle:
            os.fsync(handle.fileno())
        partial.replace(file)


def read_unit(file: Path) -> tuple[list[Conversation], Counter[str], str]:
    """Conversations, drop counts and ``made_with`` of a unit. Raises RunError for a damaged file."""
    table, dropped, made_with = _read_table(file)
    items = [_Batch(batch).conversation(row) for batch in table.to_batches() for row in range(len(batch))]
    return items, dropped, made_with


def read_outlines(file: Path) -> tuple[list[Outline], Counter[str], str]:
    """As :func:`read_unit`, without reading any tokens."""
    table, dropped, made_with = _read_table(file, ("document", "question"))
    return list(map(Outline, *(column.to_pylist() for column in table.columns))), dropped, made_with


def recorded_settings(folder: Path) -> dict[str, Any]:
    """What the first unit of a folder was made with; nothing if there is none. Raises RunError for a damaged file."""
    first = folder / "unit-000000.parquet"
    return dict(json.loads(_read_table(first, ())[2])) if first.exists() else {}


def _read_table(file: Path, columns: Sequence[str] = _COLUMNS) -> tuple[Any, Counter[str], str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
            schema = parquet.schema_arrow
            if schema.names != list(_COLUMNS):
                raise KeyError("columns")
            table = parquet.read(list(columns)).cast(pa.schema([_schema().field(name) for name in columns]))
        metadata = schema.metadata or {}
        return table, Counter(json.loads(metadata[b"dropped"])), metadata[b"made_with"].decode()
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{file} is damaged; delete it and run the same command again") from error
