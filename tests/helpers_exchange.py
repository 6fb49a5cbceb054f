"""Stores with cartridges of different sizes, to be carried to other programs and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from conftest import TEXTS, tiny_cartridges

from cas.data.collection import Collection, Document
from cas.model.frozen import FrozenModel
from cas.store.store import Store
from cas.training.rounds import end_untrained

SIZES = {"crane": 8, "ferry": 12, "lamp": 16}  # so that fixed positions leave a gap
QUESTION = "Which valve is red, and why?"


def sized_store(folder: Path, model: FrozenModel, positions: Any = "fixed", sizes: dict[str, int] = SIZES) -> Store:
    """A finished store with a cartridge of each size, open for writing."""
    store = Store.create(folder, model, ratio=1, span=16, positions=positions)
    documents = {TEXTS[i]: Document(i, i.title(), TEXTS[i]) for i in sizes}
    store.add_documents(Collection("c", tuple(documents.values())), lambda text: sizes[documents[text].id])
    for name, kv in tiny_cartridges(model, sizes).items():
        store.write_tensors(name, {"kv": kv}, 0)
    store.commit(store.rows(), None)
    end_untrained(store)
    return store
