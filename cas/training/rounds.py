"""A collection that changes is trained in rounds: every round trains what is new or changed, and nothing else.

New and changed documents get cartridges, self-study and training of their own, among the cartridges of earlier rounds
as read-only distractors. Those stay the same bit for bit, and a round costs what its own documents cost. Until a round
has ended, a changed document answers with the cartridge that it had.

What a store is to become follows from the store and the collection alone, so an interrupted change, or one that was
overtaken by the next, ends in the same state as any other:

- A document that is not in the collection stays as it is, unless it is to be pruned. One that has another document's
  text under a new id is that document, renamed.
- If a round is in training, what has changed again since leaves it, and the others go on. What else is different waits
  for the next round. If nothing is left to train, the next round begins at once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256

import pyarrow.parquet

from cas.data.collection import Collection, Document, split_long
from cas.data.folder import names
from cas.errors import ConfigError
from cas.store.changes import Change, ends_round
from cas.store.records import Row
from cas.store.store import Store
from cas.training.erase import erase

# Files that say nothing of their own, and those that are not wanted.
_NO_DOCUMENT = ("with the text of another", "with the name of another", "by --exclude", "not in --include")


@dataclass(frozen=True)
class Round:
    """A round of training. What it names are ids of documents.

    Attributes:
        learners: whose cartridges it trains. frozen: whose cartridges stay as they are and only distract.
        added, changed, gone: how the collection differs from the store; ``gone`` are those to be pruned.
        renamed: {old id: new id}. missing: not in the collection. unreadable: left out of it, though there is a file.
        change: what it takes to begin, or to go on.
        new: training of an earlier round is over, so this one is to begin.
        going_on: this round has begun already, with the texts that the store has.
        postponed: it has to be finished first; the (other) differences wait.
    """

    learners: tuple[str, ...]
    frozen: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unreadable: tuple[str, ...] = ()
    change: Change = field(default_factory=Change)
    new: bool = False
    going_on: bool = False
    postponed: bool = False

    @property
    def differs(self) -> bool:
        """Whether the collection differs from the store in anything that is to be changed there."""
        return bool(self.added or self.changed or self.gone or self.renamed)

    @property
    def differences(self) -> str:
        """The same in words."""
        parts = ((self.added, "new"), (self.changed, "changed"), (self.renamed, "renamed"), (self.gone, "gone"))
        return ", ".join(f"{len(ids)} {what}" for ids, what in parts if ids) or "as it was again"

    def lines(self) -> list[str]:
        """For the user, above the plan."""
        lines = []
        if self.postponed:
            left = f"; {len(self.change.withdraw)} leave it" if self.change.withdraw else ""
            lines = [f"collection  {self.differences}: first the training that was begun without them{left}"]
        elif self.new and self.differs:
            others = len(self.frozen)
            stay = (
                f"the other {others} cartridges stay as they are"
                if others != 1
                else "the other cartridge stays as it is"
            )
            lines = [f"collection  {self.differences}; {stay}"]
        if self.gone:
            lines.append(f"pruned      {len(self.gone)} ({names(self.gone)})")
        if kept := [i for i in self.missing if i not in self.gone]:
            lines.append(f"missing     {len(kept)} ({names(kept)}): cartridges stay; --prune drops them")
        if self.unreadable:
            lines.append(f"not read    {len(self.unreadable)} ({names(self.unreadable)}): cartridges stay")
        return lines


def current_round(store: Store) -> Round:
    """The round that a store is in, whatever became of its collection."""
    rows = store.rows().values()
    return Round(
        learners=tuple(r.id for r in rows if r.round == store.round),
        frozen=tuple(r.id for r in rows if r.round != store.round),
    )


def plan_round(store: Store | None, documents: Collection, prune: bool = False) -> Round:
    """What training these documents means for a store (None: for a new one). ``prune``: drop what is missing."""
    if store is None:
        return Round(tuple(d.id for d in documents.documents))
    found = _Differences(store, documents, prune)
    unfinished = begun(store) and not finished(store)
    if unfinished and not found.nothing_to_save():
        return found.go_on()
    return found.begin(new=unfinished or (begun(store) and found.any()))


class _Differences:
    """A store and a collection, compared. Ids in the order of the store or the collection."""

    def __init__(self, store: Store, documents: Collection, prune: bool) -> None:
        self.store, self.rows, self.old = store, store.rows(), store.old_rows()
        self.given = given = {d.id: d for d in documents.documents}
        known = self.old | self.rows
        self.renamed = _renamed(store, self.rows, given)
        self.taken = {d.id for d in self.renamed.values()}
        unknown = [i for i in given if i not in self.taken]
        self.added = [i for i in unknown if i not in known or i in self.renamed]
        stale = [i for i in unknown if i in known and i not in self.renamed]
        stale = [i for i in stale if i not in self.rows or _other(self.rows[i], given[i])]
        # Of these, the restored ones are what they were before this round.
        self.restored = [i for i in stale if i in self.old and not _other(self.old[i], given[i])]
        bases = {_base(d.id, d.title) for d in given.values()}
        absent = [i for i in known if i not in given and i not in self.renamed]
        # A document that is split otherwise than before: its parts are what has changed.
        replaced = {i for i in absent if _base(i, known[i].title) in bases}
        self.stale = dict.fromkeys([*stale, *replaced])
        restored = set(self.restored)
        self.changed = [i for i in self.stale if i not in restored]
        left_out = [item for item in documents.left_out if item.kind not in _NO_DOCUMENT]
        there = {item.id for item in left_out}
        places = [item.where.rstrip("/") for item in left_out if item.id is None]  # such as a link that leads nowhere
        there |= {id for place in places for id in (place, place.removesuffix(".md"), place.removesuffix(".txt"))}
        folders = tuple(f"{place}/" for place in places)
        absent = [i for i in absent if i not in replaced]
        unreadable = {i for i in absent if {i, _base(i, known[i].title)} & there or i.startswith(folders)}
        self.unreadable = [i for i in absent if i in unreadable]
        self.missing = dict.fromkeys(i for i in absent if i not in unreadable)
        self.gone = self.missing if prune else {}
        self.learning = [i for i, row in self.rows.items() if row.round == store.round]

    def any(self) -> bool:
        """Whether there is anything to do but to train on."""
        waiting = self.store.pending() or self.store.withdrawn()
        return bool(self.added or self.stale or self.renamed or self.gone or waiting)

    def leaving(self) -> list[str]:
        """Documents in training whose text is no longer that of the collection, or that are to be pruned."""
        replaced = {*self.stale, *self.gone, *self.taken}.difference(self.renamed)
        return [i for i in self.learning if i in replaced]

    def nothing_to_save(self) -> bool:
        """Whether the round that is in training has nothing that is wanted."""
        leaving = set(self.leaving())
        stay = [i for i in self.learning if i not in leaving]
        if not any(self.rows[i].initialized or i not in self.missing for i in stay):
            return True
        return bool(self.added or self.stale) and self.store.run_state() is None and not _conversations(self.store)

    def go_on(self) -> Round:
        """The round that is in training, without the documents that have changed again."""
        leaving, before = self.leaving(), self._by_base(self.old)
        delete, leave, restore = list[str](), list[str](), dict[str, None]()
        for name in [i for i in leaving if i not in self.gone]:
            if old := [i for i in before.get(self._base(name), ()) if i not in self.gone]:
                delete.append(name)
                restore |= dict.fromkeys(old)
            else:
                (leave if self.rows[name].initialized else delete).append(name)
        left = set(leaving)
        drop = [i for i in self.gone if i in left or i not in self.rows]
        learners = [i for i in self.learning if i not in left]
        others = {*self.rows, *restore}.difference(learners, drop, set(delete).difference(restore))
        return self._round(
            learners,
            sorted(others),
            Change(
                withdraw=tuple(leaving),
                delete=tuple(delete),
                restore=tuple(restore),
                leave=tuple(leave),
                drop=tuple(drop),
            ),
            going_on=True,
            postponed=self.any() or bool(leaving),
        )

    def begin(self, new: bool) -> Round:
        """The next round, or the one that has not begun yet."""
        stale = [i for i in self.stale if i in self.rows]
        retire = dict.fromkeys(i for i in stale if self.rows[i].initialized and i not in self.old)
        learning = set(self.learning)
        empty = [i for i, row in self.rows.items() if not row.initialized and i not in self.gone]
        # Without a cartridge there is nothing to keep.
        nothing = (i for i in empty if i not in self.given and i not in self.old and i not in self.stale)
        drop = dict.fromkeys([*self.gone, *nothing])
        again = [i for i in empty if (i not in self.given or (new and i in learning)) and i not in drop]
        delete = dict.fromkeys([*(i for i in stale if i not in retire), *again])
        going = {*delete, *retire, *drop}
        live = dict.fromkeys(i for i in self.rows if i not in going)
        absent = [i for i in (*self.missing, *self.unreadable) if i in self.old and i not in live and i not in drop]
        restore = dict.fromkeys([*self.restored, *absent])
        stay = {*(self.renamed[i].id if i in self.renamed else i for i in live), *restore}
        learners = {i for i in self.given if i not in stay}
        if not new:
            learners |= {self.renamed[i].id if i in self.renamed else i for i in live if i in learning}
        # Of an old one all parts may be there under other names: then nothing is trained in its place.
        successors = {_base(i, self.given[i].title) for i in learners if i in self.given}
        outdated = dict.fromkeys(i for i in retire if self._base(i) not in successors)
        unused = [
            i
            for i, row in self.old.items()
            if i not in restore and i not in self.gone and _base(i, row.title) not in successors
        ]
        return self._round(
            sorted(learners),
            sorted(stay - learners),
            Change(
                delete=(*delete, *outdated),
                retire=tuple(i for i in retire if i not in outdated),
                restore=tuple(restore),
                forget=tuple(unused),
                drop=tuple(drop),
                rename={i: (d.id, d.title, d.hash) for i, d in self.renamed.items()},
                new_round=new,
            ),
            new=new,
        )

    def _base(self, name: str) -> str:
        return _base(name, self.rows[name].title)

    def _by_base(self, rows: Mapping[str, Row]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for i, row in rows.items():
            found.setdefault(_base(i, row.title), []).append(i)
        return found

    def _round(self, learners: Iterable[str], frozen: Iterable[str], change: Change, **about: bool) -> Round:
        return Round(
            learners=tuple(learners),
            frozen=tuple(frozen),
            added=tuple(self.added),
            changed=tuple(self.changed),
            gone=tuple(self.gone),
            renamed={i: d.id for i, d in self.renamed.items()},
            missing=tuple(self.missing),
            unreadable=tuple(self.unreadable),
            change=change,
            **about,
        )


def _other(row: Row, document: Document) -> bool:
    return row.hash != document.hash


def _base(id: str, title: str) -> str:
    """The id of the whole document, for a part of one that was split (:func:`cas.data.collection.split_long`)."""
    return re.sub(r"#\d+$", "", id) if re.search(r" \(part \d+ of \d+\)$", title) else id


def _renamed(store: Store, rows: Mapping[str, Row], given: Mapping[str, Document]) -> dict[str, Document]:
    """{id in the store: the document that has its text now}, of documents whose text stands under no id of theirs."""
    free = [i for i, row in rows.items() if row.initialized and (i not in given or _other(row, given[i]))]
    new = [d for i, d in given.items() if i not in rows or _other(rows[i], d)]
    if not free or not new:
        return {}
    texts: dict[bytes, list[str]] = {}
    for i in free:
        texts.setdefault(sha256(store.text(i).encode()).digest(), []).append(i)
    renamed: dict[str, Document] = {}
    for document in new:
        same = texts.get(sha256(document.text.encode()).digest(), [])
        if document.id not in same and same:  # else its title has changed
            renamed[same.pop(0)] = document
    return renamed


def _conversations(store: Store) -> int:
    """How many conversations the round has."""
    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in store.conversations.glob("unit-*.parquet"))


def split_as_stored(documents: Collection, store: Store, count_tokens: Callable[[str], int]) -> Collection:
    """The documents, those in parts that are too long for the store's largest cartridge; those that are stored whole stay
    whole."""
    span, ratio, stored = store.meta["span"], store.meta["ratio"], store.rows() | store.old_rows()
    if span is None or ratio is None:
        return documents
    whole = {d.text for d in documents.documents if d.id in stored and stored[d.id].hash == d.hash}
    return split_long(documents, int(span * ratio), lambda text: 0 if text in whole else count_tokens(text))


def begun(store: Store) -> bool:
    """Whether the current round has self-study or training already."""
    return store.run_state() is not None or any(store.conversations.glob("unit-*.parquet"))


def finished(store: Store) -> bool:
    """Whether the current round is trained to its end."""
    return ends_round(store.run_state())


def end_untrained(store: Store) -> None:
    """End a round about whose documents there are no conversations: their cartridges stay as initialized."""
    with store.training():
        run = {"step": 0, "pool": (), "guests": (), "settings": {"total_steps": 0}}
        store.commit(store.rows(), run)


def ended_untrained(store: Store) -> bool:
    """Whether :func:`end_untrained` ended the current round."""
    return (store.run_state() or {}).get("settings") == {"total_steps": 0}


def learning_documents(round: Round, store: Store | None, documents: Collection) -> Collection:
    """The documents of a round's self-study: those that it trains, and those that have left it since."""
    given = {} if round.going_on else {d.id: d for d in documents.documents}
    chosen = {i: given[i] for i in round.learners if i in given}
    if store is not None:
        rows, left = store.rows(), [] if round.new else [Document(*text) for text in store.withdrawn()]
        stored = [i for i in round.learners if i not in given] + list(round.change.withdraw)
        chosen |= {d.id: d for d in [*left, *(Document(i, rows[i].title, store.text(i)) for i in stored)]}
    return replace(documents, documents=tuple(chosen.values()), questions=documents.questions_for(chosen))


def begin_round(store: Store, round: Round) -> None:
    """Give the store the documents of a round, before its self-study; the last step of a rename or a deletion too."""
    with store.training():
        if not round.postponed:
            _erase(store)  # of an interrupted call
        if round.change:
            store.change(round.change)
        if not round.postponed:
            _erase(store)


def _erase(store: Store) -> None:
    if changes := store.pending():
        erase(store.folder, changes)
        store.clear_pending()


def update(store: Store, documents: Collection, prune: bool = False) -> Round:
    """Begin the round that these documents make necessary, if any. ``synthesize`` and :class:`cas.Trainer`, given its
    :func:`learning_documents`, then add and train what is new or changed.

    Returns: the round. Raises: ConfigError while a training is unfinished.
    """
    round = plan_round(store, documents, prune)
    if round.postponed:
        raise ConfigError(
            f"{store.folder} is in training and its collection has changed ({round.differences}); "
            "finish the training first"
        )
    begin_round(store, round)
    return round
