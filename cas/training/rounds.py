"""A collection that changes: what is new, changed and gone, and a *round* of training for exactly that.

A round gives new and changed documents a start, self-study and training of their own, among the cartridges of earlier rounds as
read-only distractors. Those stay bit for bit as they were, and the round costs what its own documents cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cas.data.collection import Collection, Document
from cas.errors import ConfigError

if TYPE_CHECKING:
    from cas.config import Training
    from cas.store.store import Store


@dataclass(frozen=True)
class Changes:
    """Ids of documents by how a collection differs from a store."""

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.gone)

    def __str__(self) -> str:
        parts = ((self.added, "new"), (self.changed, "changed"), (self.gone, "gone"))
        return ", ".join(f"{len(ids)} {what}" for ids, what in parts if ids) or "nothing changed"


def changes(store: Store, documents: Collection) -> Changes:
    """How these documents differ from those of the store, by id, title and text."""
    rows = store.rows()
    hashes = {d.id: d.hash for d in documents.documents}
    return Changes(
        added=tuple(i for i in hashes if i not in rows),
        changed=tuple(i for i, h in hashes.items() if i in rows and rows[i].hash != h),
        gone=tuple(i for i in rows if i not in hashes),
    )


def begun(store: Store) -> bool:
    """Whether this round has self-study or training already."""
    return store.run_state() is not None or any(store.conversations.glob("unit-*.parquet"))


def finished(store: Store) -> bool:
    """Whether this round is trained to its end."""
    state = store.run_state()
    return state is not None and state["step"] >= state["settings"]["total_steps"]


def refuse_changes(store: Store, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if a store's training was begun with other settings than these."""
    begun = (store.run_state() or {}).get("settings", {})
    if changed := [f"{k} {begun[k]} (now {v})" for k, v in settings.items() if k in begun and begun[k] != v]:
        raise ConfigError(
            f"{store.folder} was begun with {', '.join(changed)}; go on with the same settings or give a new --store"
        )


def update(store: Store, documents: Collection) -> Changes:
    """Take out of the store what is gone or changed; ``synthesize`` and :class:`cas.Trainer`, given the documents of
    :func:`learners`, then add and train what is new or changed. Nothing happens to all others.

    Returns: what differed. Raises: ConfigError while a training is unfinished.
    """
    found = changes(store, documents)
    new_round = begun(store)
    if found and new_round and not finished(store):
        raise ConfigError(
            f"{store.folder} is in training and its collection has changed ({found}); finish the training first"
        )
    if found and (new_round or found.changed or found.gone):
        with store.training():
            store.remove((*found.changed, *found.gone), new_round)
    return found


def learners(store: Store, documents: Collection) -> Collection:
    """Those of the documents that this round trains."""
    rows = store.rows()
    mine = tuple(d for d in documents.documents if d.id not in rows or rows[d.id].round == store.round)
    return replace(documents, documents=mine, questions=documents.questions_for(d.id for d in mine))


def stored(store: Store) -> Collection:
    """The documents as the store has them."""
    documents = tuple(Document(i, row.title, store.text(i)) for i, row in store.rows().items())
    return Collection(store.folder.name, documents, ())


def members(store: Store) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Ids of the cartridges that learn in this round, and of those that do not any more."""
    rows = store.rows().values()
    return tuple(r.id for r in rows if r.round == store.round), tuple(r.id for r in rows if r.round != store.round)


def guests_among(training: Training, frozen: int) -> int:
    """Read-only distractors: as set, but where earlier cartridges are there, as many as a conversation may see."""
    return max(training.guests, min(frozen, training.max_distractors if training.isolation < 1 else 0))
