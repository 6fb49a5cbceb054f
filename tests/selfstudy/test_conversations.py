"""Conversations in memory and in files."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from cas.options import KINDS
from cas.selfstudy.conversations import Conversation, Conversations, write_unit


def test_conversations_by_document() -> None:
    def one(document: str, n: int) -> Conversation:
        values = np.array([n], np.int32)
        return Conversation(document, "question", str(n), values, values, values[None], values[None].astype(np.float32))

    conversations = Conversations([one("b", 1), one("a", 2), one("b", 3)], {"loop": 4})
    assert {name: [c.question for c in items] for name, items in conversations.by_document.items()} == {
        "b": ["1", "3"],
        "a": ["2"],
    }
    assert len(conversations) == 3 and conversations.dropped == {"loop": 4}


def test_units_are_joined_and_read_from_the_disk(tmp_path: Path) -> None:
    """Loaded conversations equal the written ones, of the units that exist; the joined file is always rebuilt."""

    def one(document: str, n: int) -> Conversation:
        answer = np.arange(n % 4 + 1, dtype=np.int32)
        top = np.stack([answer + n] * 3, axis=1)
        return Conversation(
            document, KINDS[n % 5], f"question {n}", answer[:2] + 7, answer, top, -top.astype(np.float32)
        )

    def same(a: Conversation, b: Conversation) -> bool:
        arrays = ("prompt", "answer", "top_ids", "top_logprobs")
        equal = all(np.array_equal(getattr(a, name), getattr(b, name)) for name in arrays)
        return equal and (a.document, a.kind, a.question) == (b.document, b.kind, b.question)

    items = [one("ab"[n % 2], n) for n in range(12)]
    for unit in range(3):
        file = tmp_path / f"unit-{unit:06d}.parquet"
        write_unit(file, items[4 * unit : 4 * unit + 4], Counter({"loop": unit}), "settings")

    def check(conversations: Conversations, expected: list[Conversation], dropped: int) -> None:
        assert set(conversations.by_document) == {"a", "b"} and len(conversations) == len(expected)
        for name in "ab":
            own = [c for c in expected if c.document == name]
            assert all(map(same, conversations.by_document[name], own)) and same(
                conversations.by_document[name][-1], own[-1]
            )
            assert all(map(same, conversations.by_document[name][1:3], own[1:3]))
        assert sum(conversations.dropped.values()) == dropped

    check(Conversations.load(tmp_path), items, 3)
    check(Conversations.load(tmp_path, 2), items[:8], 1)
    (tmp_path / "units.arrow").write_bytes(b"damaged")
    check(Conversations.load(tmp_path), items, 3)
    (tmp_path / "unit-000002.parquet").unlink()
    check(Conversations.load(tmp_path), items[:8], 1)
