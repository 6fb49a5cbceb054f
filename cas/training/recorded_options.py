"""The options that a store was made with, in its ``config.yaml``, and whether a collection is the one it was trained on."""

from __future__ import annotations

import os
from dataclasses import asdict, fields, replace
from typing import Any

import yaml

from cas import console
from cas.data.collection import Collection, resolve_source, same_source
from cas.errors import ConfigError, StoreMismatch
from cas.options import CartridgeOptions, SelfStudy, TrainConfig, Training
from cas.store.files import write_atomically
from cas.store.store import Store
from cas.training.rounds import Round, finished

# Options that say which documents are trained.
_SOURCE = ("collection", "include", "exclude", "collection_seed", "documents", "merge")


def save_config(config: TrainConfig, store: Store) -> None:
    """Write the options, so that ``--config`` can give them again."""
    options = asdict(replace(config, config=None, prune=False))
    values = {k: _plain(v) for k, v in options.items()}
    values["collection"] = resolve_source(str(config.collection))  # the same from whatever directory it is read
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_atomically(store.folder / "config.yaml", text.encode())


def records_collection(config: TrainConfig, store: Store) -> bool:
    """Whether ``config.yaml`` names this collection."""
    return bool(_recorded(store).get("collection") == resolve_source(str(config.collection)))


def nothing_to_train(config: TrainConfig, store: Store, round: Round) -> bool:
    """Whether the round is trained to its end, of these documents and with these options: then self-study, which goes over
    all its units, need not even be planned. Other options are for those to judge who plan with them."""
    if round.change or round.differs or round.postponed or not finished(store) or store.pending():
        return False
    now, recorded = asdict(config), _recorded(store)
    same = all(
        field.name in recorded and recorded[field.name] == _plain(now[field.name])
        for part in (CartridgeOptions, SelfStudy, Training)
        for field in fields(part)
    )
    return same and all(row.initialized for row in store.rows().values())


def _refuse_compacted(config: TrainConfig, store: Store, round: Round) -> None:
    """Raise ConfigError where other options are given for cartridges that learn no more, since they were compacted."""
    values = store.meta.get("values")
    nothing_new = not (round.learners or round.change or round.differs)
    if values and nothing_new and not nothing_to_train(config, store, round):
        raise ConfigError(
            f"{store.folder} was compacted to {values} values and its cartridges learn no more; new documents train beside "
            "them, but for other options give a new --store"
        )


def _plain(value: Any) -> Any:
    """As YAML has it."""
    return list(value) if isinstance(value, tuple) else value


def refuse_other_collection(config: TrainConfig, store: Store, documents: Collection, round: Round) -> None:
    """Raise StoreMismatch if other documents were named than those that the store was trained on, ConfigError if it was
    compacted and other options are given. Documents that only add to them are welcome."""
    _refuse_compacted(config, store, round)
    lacking = bool(round.changed or round.missing)
    if not (lacking or round.unreadable):  # files that cannot be read may be another project's of the same names
        return
    before = {"include": [], "exclude": [], **_recorded(store)}  # which older stores do not record
    now = {k: _plain(getattr(config, k)) for k in _SOURCE}
    recorded, given = before.get("collection"), str(config.collection)
    if recorded is None:
        if not store.rows() or _overlap(store, documents):
            return
        same = False
    elif recorded == resolve_source(given):
        same = True
    else:  # recorded by a relative path, as older stores do, which may mean another project's folder; or moved since
        moved = os.path.isabs(recorded) and not os.path.exists(recorded)
        same = (moved or same_source(recorded, given)) and _overlap(store, documents)
    before["collection"] = now["collection"] if same else None
    changed = [k for k in _SOURCE if before.get(k) != now[k] and (lacking or k == "collection")]
    differ = [k for k in changed if not _only_adds(k, before.get(k), now[k])]
    if differ:
        missing, what = len(round.missing) + len(round.unreadable), "what it was trained on"
        if recorded is not None and "collection" in differ:
            what += f" (--collection {console.harmless(recorded)})"
        raise StoreMismatch(
            f"{store.folder} was trained with another {', '.join(f'--{k}'.replace('_', '-') for k in differ)}: {missing} of "
            f"its documents are missing here and {len(round.changed)} differ; give {what}, or a new --store"
        )


def _only_adds(option: str, before: Any, now: Any) -> bool:
    """Whether a choice of files takes in all that it took in before."""
    if option == "exclude":
        return {*now} <= {*before}
    return option == "include" and (not now or (bool(before) and {*before} <= {*now}))


def _overlap(store: Store, documents: Collection) -> bool:
    """Whether at least a third of the documents, of the store or given, are in both with the same text."""
    rows = store.rows() | store.old_rows()
    same = sum(d.id in rows and rows[d.id].hash == d.hash for d in documents.documents)
    return same > 0 and 3 * same >= min(len(rows), len(documents))


def _recorded(store: Store) -> dict[str, Any]:
    file = store.folder / "config.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.exists() else {}
