"""How a store's documents change, each change in one transaction.

Beside the documents that are trained (``row/…``, ``text/…``, ``kv/…``, ``state/…``) a store has

- ``old/…``: what a changed document was. It goes on answering until the round that trains its successor has ended;
- ``withdrawn/…``: rows and texts of documents that left the round in mid-training. Its self-study was planned with them;
- ``pending``: ids that were renamed or dropped and still stand in conversations and logs (:mod:`cas.training.erase`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from cas.store.blobs import with_about
from cas.store.records import (
    OLD,
    PENDING,
    WITHDRAWN,
    Records,
    Row,
    blob_keys,
    checksum,
    record,
    row_key,
    text_key,
    under,
)

_MOVING = "moving/"  # within a transaction


@dataclass(frozen=True)
class Change:
    """What happens to documents, in this order; ids of documents.

    Attributes:
        withdraw: row and text are kept as withdrawn, whatever else happens to them.
        delete: the cartridge that is trained goes. retire: it becomes the old one. restore: the old one takes its place.
        forget: the old one goes.
        leave: it stays as it is and learns no more.
        drop: everything about the document goes.
        rename: {old id: (new id, title, hash)}; the cartridge stays the same bit for bit.
        new_round: the training so far is over; documents added from now on are trained among the others.
    """

    withdraw: tuple[str, ...] = ()
    delete: tuple[str, ...] = ()
    retire: tuple[str, ...] = ()
    restore: tuple[str, ...] = ()
    forget: tuple[str, ...] = ()
    leave: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    rename: Mapping[str, tuple[str, str, str]] = field(default_factory=dict)
    new_round: bool = False

    def __bool__(self) -> bool:
        return any(getattr(self, name) for name in vars(self))


def apply(records: Records, txn: Any, change: Change) -> None:
    """Everything of a change but the number of the round, inside a write transaction."""
    rows, old = records.rows(txn), records.rows(txn, OLD)
    for name in change.withdraw:
        plain = replace(rows[name], version=-1, kv_hash=None, state_hash=None)
        txn.put(row_key(name, WITHDRAWN), record(asdict(plain)))
        txn.put(text_key(name, WITHDRAWN), records.text(txn, rows[name]).encode())
    for name in change.delete:
        _delete(txn, rows[name])
    for name in change.retire:
        _move(txn, rows[name], rows[name], "", OLD)
    for name in change.restore:
        _move(txn, old[name], old[name], OLD, "")
    for name in change.forget:
        _delete(txn, old[name], OLD)
    for name in change.leave:
        txn.put(row_key(name), record(asdict(replace(rows[name], round=-1))))
    for name in change.drop:
        for space, found in (("", rows), (OLD, old)):
            if name in found:
                _delete(txn, found[name], space)
    _rename(txn, rows, change.rename)
    if change.rename or change.drop:
        new = {"rename": {i: to[0] for i, to in change.rename.items()}, "drop": change.drop}
        txn.put(PENDING, record({"changes": [*pending(records, txn), new]}))
    gone = {*change.withdraw, *change.delete, *change.drop}
    if change.new_round:
        txn.delete(b"run")
        clear(txn, WITHDRAWN)
    elif gone and (run := txn.get(b"run")) is not None:
        txn.put(b"run", record(_run_without(records.parse(run), gone)))


def pending(records: Records, txn: Any) -> list[dict[str, Any]]:
    """Renamed and dropped ids that files of the store still have, oldest first: {"rename": {old: new}, "drop": [id]}."""
    value = txn.get(PENDING)
    return [] if value is None else list(records.parse(value)["changes"])


def clear(txn: Any, space: str) -> None:
    """Delete everything in OLD or WITHDRAWN."""
    for key in [key for key, _ in under(txn, space.encode(), values=False)]:
        txn.delete(key)


def ends_round(run_state: Mapping[str, Any] | None) -> bool:
    """Whether a trainer with this state has reached its last step."""
    total = (run_state or {}).get("settings", {}).get("total_steps")
    return run_state is not None and total is not None and run_state["step"] >= total


def _run_without(run: Mapping[str, Any], gone: set[str]) -> dict[str, Any]:
    """A trainer's state from which documents have left: it goes on with the others."""
    pool = [name for name in run["pool"] if name not in gone]
    guests = [name for name in run["guests"] if name not in gone]
    settings, step = dict(run.get("settings", {})), run["step"]
    settings.pop("total_steps", None)  # by the number of conversations
    if run["pool"] and not pool and (every := settings.get("rotate_every")):
        step = -(-step // every) * every  # nothing can be trained before the next rotation
    return {**run, "pool": pool, "guests": guests, "settings": settings, "step": step}


def _delete(txn: Any, row: Row, space: str = "") -> None:
    for key in (row_key(row.id, space), text_key(row.id, space), *blob_keys(row.id, row.version, space)):
        txn.delete(key)


def _move(txn: Any, row: Row, to: Row, source: str, target: str) -> None:
    """A document's text and tensors to another id or space; ``to``: its new row."""
    text = txn.get(text_key(row.id, source))
    blobs = [txn.get(key) for key in blob_keys(row.id, row.version, source)]
    _delete(txn, row, source)
    if row.id != to.id and blobs[0] is not None and row.kv_hash == checksum(blobs[0]):
        blobs[0] = with_about(blobs[0], id=to.id, title=to.title)
        to = replace(to, kv_hash=checksum(blobs[0]))
    txn.put(row_key(to.id, target), record(asdict(to)))
    for key, value in zip((text_key(to.id, target), *blob_keys(to.id, to.version, target)), (text, *blobs)):
        if value is not None:  # else damage, which verify names
            txn.put(key, value)


def _rename(txn: Any, rows: Mapping[str, Row], names: Mapping[str, tuple[str, str, str]]) -> None:
    moved = {
        old: replace(rows[old], id=new, title=title, hash=text_hash) for old, (new, title, text_hash) in names.items()
    }
    targets = {to.id for to in moved.values()}
    taken = [old for old in moved if old in targets]  # in the way of another one
    for to in moved.values():
        if to.id in rows and to.id not in names:  # another file was put in its place
            _delete(txn, rows[to.id])
    for old in taken:
        _move(txn, rows[old], rows[old], "", _MOVING)
    for old, to in moved.items():
        _move(txn, rows[old], to, _MOVING if old in taken else "", "")
