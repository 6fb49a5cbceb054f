"""Training conversations: one question and answer each, with the teacher's probabilities; a Parquet file per unit of work."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cas.errors import RunError
from cas.model import FrozenModel


@dataclass(frozen=True)
class Conversation:
    """One question and answer. ``answer`` ends with the end-of-turn token; ``top_ids``, ``top_logprobs``: [answer, K]."""

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


class Conversations:
    """All training conversations of a store, by document, in memory; ``dropped`` counts what was not kept, by reason."""

    def __init__(self, items: Sequence[Conversation], dropped: dict[str, int]) -> None:
        self.dropped = dropped
        self.by_document: dict[str, list[Conversation]] = {}
        for item in items:
            self.by_document.setdefault(item.document, []).append(item)

    def __len__(self) -> int:
        return sum(map(len, self.by_document.values()))

    @classmethod
    def load(cls, folder: Path) -> Conversations:
        """Read every whole unit of a store's ``conversations`` folder."""
        items: list[Conversation] = []
        dropped: Counter[str] = Counter()
        for file in sorted(folder.glob("unit-*.parquet")):
            found, counts, _ = read_unit(file)
            items += found
            dropped.update(counts)
        return cls(items, dict(dropped))


def write_unit(file: Path, items: Sequence[Conversation], dropped: Counter[str], made_with: str) -> None:
    """Write one unit's conversations, whole or not at all. ``made_with``: what must be the same for it to be used again."""
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
    types = [pa.string()] * 3 + [pa.list_(pa.int32())] * 3 + [pa.list_(pa.float32())]
    schema = pa.schema(
        [pa.field(name, kind) for name, kind in zip(columns, types, strict=True)],
        metadata={"made_with": made_with, "dropped": json.dumps(dropped, sort_keys=True)},
    )
    partial = file.with_suffix(".partial")
    pq.write_table(pa.table(columns, schema=schema), partial, write_page_checksum=True)
    with open(partial, "rb+") as handle:
        os.fsync(handle.fileno())
    partial.replace(file)


def read_unit(file: Path) -> tuple[list[Conversation], Counter[str], str]:
    """Conversations, drop counts and ``made_with`` of a unit. Raises RunError for a damaged file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(file, page_checksum_verification=True)
        about = table.schema.metadata or {}
        items = [
            Conversation(
                row["document"],
                row["kind"],
                row["question"],
                np.array(row["prompt"], np.int32),
                np.array(row["answer"], np.int32),
                np.array(row["top_ids"], np.int32).reshape(len(row["answer"]), -1),
                np.array(row["top_logprobs"], np.float32).reshape(len(row["answer"]), -1),
            )
            for row in table.to_pylist()
        ]
        return items, Counter(json.loads(about[b"dropped"])), about[b"made_with"].decode()
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise RunError(f"{file} is damaged; delete it and run the same command again") from error
