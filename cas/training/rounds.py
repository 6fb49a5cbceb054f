"""A collection that changes is trained in rounds: every round trains what is new or changed, and nothing else.

New and changed documents get cartridges, self-study and training of their own, among the cartridges of earlier rounds
as read-only distractors. Those stay the same bit for bit, and a round costs what its own documents cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from cas.data.collection import Collection, Document
from cas.errors import ConfigError
from cas.store.store import Store


@dataclass(frozen=True)
class Round:
    """A round of training; all fields are ids of documents except the last two.

    Attributes:
        learners: whose cartridges it trains. frozen: whose cartridges stay as they are and only distract.
        added, changed, gone: how the collection differs from the store.
        new: training of an earlier round is finished, so this one is to begin.
        postponed: an earlier round has to be finished first; the differences wait.
    """

    learners: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    new: bool = False
    postponed: bool = False

    @property
    def differs(self) -> bool:
        """Whether the collection differs from the store."""
        return bool(self.added or self.changed or self.gone)

    @property
    def differences(self) -> str:
        """The same in words."""
        parts = ((self.added, "new"), (self.changed, "changed"), (self.gone, "gone"))
        return ", ".join(f"{len(ids)} {what}" for ids, what in parts if ids)

    def lines(self) -> list[str]:
        """For the user, above the plan."""
        if self.postponed:
            return [f"collection  {self.differences}: first the training that was begun without them"]
        if self.new:
            return [f"collection  {self.differences}; the other {len(self.frozen)} cartridges stay as they are"]
        return []


def current_round(store: Store) -> Round:
    """The round that a store is in, whatever became of its collection."""
    rows = store.rows().values()
    return Round(
        learners=tuple(r.id for r in rows if r.round == store.round),
        frozen=tuple(r.id for r in rows if r.round != store.round),
    )


def plan_round(store: Store | None, documents: Collection) -> Round:
    """What training these documents means for a store (None: for a new one)."""
    if store is None:
        return Round(tuple(d.id for d in documents.documents))
    rows, hashes = store.rows(), {d.id: d.hash for d in documents.documents}
    added = tuple(i for i in hashes if i not in rows)
    changed = tuple(i for i, h in hashes.items() if i in rows and rows[i].hash != h)
    gone = tuple(i for i in rows if i not in hashes)
    new = bool(added or changed or gone) and begun(store)
    if new and not finished(store):
        return replace(current_round(store), added=added, changed=changed, gone=gone, postponed=True)
    old = {i for i in rows if new or rows[i].round != store.round}.difference(changed, gone)
    return Round(
        learners=tuple(i for i in hashes if i not in old),
        frozen=tuple(i for i in hashes if i in old),
        added=added,
        changed=changed,
        gone=gone,
        new=new,
    )


def begun(store: Store) -> bool:
    """Whether the current round has self-study or training already."""
    return store.run_state() is not None or any(store.conversations.glob("unit-*.parquet"))


def finished(store: Store) -> bool:
    """Whether the current round is trained to its end."""
    state = store.run_state()
    return state is not None and state["step"] >= state["settings"]["total_steps"]


def end_untrained(store: Store) -> None:
    """End a round about whose documents there are no conversations: their cartridges stay as initialized."""
    with store.training():
        run = {"step": 0, "pool": (), "guests": (), "settings": {"total_steps": 0}}
        store.commit(store.rows(), run)


def ended_untrained(store: Store) -> bool:
    """Whether :func:`end_untrained` ended the current round."""
    return (store.run_state() or {}).get("settings") == {"total_steps": 0}


def learning_documents(round: Round, store: Store | None, documents: Collection) -> Collection:
    """The documents that a round trains; those of the store if the given ones have to wait."""
    if round.postponed:
        assert store is not None
        rows = store.rows().values()
        documents = Collection(store.folder.name, tuple(Document(r.id, r.title, store.text(r.id)) for r in rows))
    learners = set(round.learners)
    chosen = tuple(d for d in documents.documents if d.id in learners)
    return replace(documents, documents=chosen, questions=documents.questions_for(learners))


def begin_round(store: Store, round: Round) -> None:
    """Remove from the store what is gone or changed. Raises: ConfigError for a postponed round."""
    if round.postponed:
        raise ConfigError(
            f"{store.folder} is in training and its collection has changed ({round.differences}); "
            "finish the training first"
        )
    if round.new or round.changed or round.gone:
        with store.training():
            store.remove((*round.changed, *round.gone), round.new)


def update(store: Store, documents: Collection) -> Round:
    """Begin the round that these documents make necessary, if any. ``synthesize`` and :class:`cas.Trainer`, given its
    :func:`learning_documents`, then add and train what is new or changed.

    Returns: the round. Raises: ConfigError while a training is unfinished.
    """
    round = plan_round(store, documents)
    begin_round(store, round)
    return round
