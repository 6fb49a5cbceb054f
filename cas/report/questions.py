"""What a report asks about: the documents as they were trained, the questions about them, and what has changed since."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import yaml

from cas.data.collection import Collection, Question
from cas.data.documents import Document
from cas.errors import ConfigError
from cas.report.config import Config
from cas.training.rounds import split_as_stored

if TYPE_CHECKING:
    from cas.model.frozen import FrozenModel
    from cas.store.store import Store

LEAST_QUESTIONS = 8


def load_questions(config: Config, model: FrozenModel, store: Store) -> tuple[Collection, list[str]]:
    """The store's documents, in the words that were trained, with the questions about them; and remarks for the user.

    Documents are read from the store, so both sides of the report have the same text. The collection gives the
    questions, and is compared with the store.

    Raises: ConfigError when the collection is unknown, holds none of the store's documents or has too few questions.
    """
    file = store.folder / "config.yaml"
    trained = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
    name = config.collection or trained.get("collection")
    if not name:
        raise ConfigError(f"{store.folder} does not say what it was trained on; give --collection")
    seed = trained.get("collection_seed", 0) if config.collection_seed is None else config.collection_seed
    include, exclude = (tuple(trained.get(key) or ()) for key in ("include", "exclude"))
    now = Collection.load(name, seed=seed, include=include, exclude=exclude)
    first = trained.get("documents")
    if first is not None and config.collection is None and first < len(now):
        now = now.select(first)
    now = split_as_stored(now, store, model.count_tokens)
    documents = tuple(Document(*text) for text in store.texts())
    if not documents:
        raise ConfigError(f"{store.folder} has no cartridges yet; go on with its training")
    hashes = {d.id: d.hash for d in now.documents}
    gone = [d.id for d in documents if d.id not in hashes]
    if len(gone) == len(documents):
        raise ConfigError(
            f"--collection {name} holds none of the documents of the store, such as {gone[0]}; "
            "give the one it was trained on"
        )
    changed = [d.id for d in documents if hashes.get(d.id, d.hash) != d.hash]
    trained_ids = {d.id for d in documents}
    questions = tuple(q for q in now.questions if trained_ids.issuperset(q.document_ids))
    remarks = list(now.skipped)
    if changed:
        remarks.append(f"changed since the training: {_named(changed)}; both sides read the text that was trained")
    if gone:
        remarks.append(f"no longer in {name}: {_named(gone)}; both sides read the text that was trained")
    if untrained := [i for i in hashes if i not in trained_ids]:
        remarks.append(f"not in the store: {_named(untrained)}; neither side reads them until cas.train adds them")
    if left_out := len(now.questions) - len(questions):
        remarks.append(f"questions left out, about documents that the store does not hold: {left_out}")
    if len(questions) < LEAST_QUESTIONS:
        raise ConfigError(
            f"{name} has {len(questions)} questions about the documents of the store; write at least {LEAST_QUESTIONS} "
            "into questions.jsonl beside them, a line each: "
            '{"id": "q1", "document_ids": ["…"], "question": "…", "answers": ["…"]}'
        )
    return Collection(now.name, documents, questions), remarks


def _named(ids: Sequence[str]) -> str:
    """How many documents, and the first of them."""
    some = ", ".join(ids[:3]) + (", …" if len(ids) > 3 else "")
    return f"{len(ids)} document{'s' * (len(ids) != 1)} ({some})"


def split(collection: Collection, config: Config) -> tuple[list[Question], list[Question]]:
    """Validation and test questions; no question is in both."""
    size = min(config.validation, len(collection.questions) // 4)
    shuffled = Random(f"validation/{config.seed}").sample(collection.questions, len(collection.questions))
    test = shuffled[size:] if config.questions is None else shuffled[size : size + config.questions]
    return shuffled[:size], sorted(test, key=lambda q: q.id)


def parts_folder(output: Path, model: FrozenModel, stores: Iterable[Store], collection: Collection) -> Path:
    """Where the parts of a report are kept: a folder for every state of model, cartridges, texts and questions, so that
    nothing computed about another state is used."""
    state: list[Any] = [model.describe()["fingerprint"], str(model.dtype)]
    state += [[[i, row.hash, row.kv_hash] for i, row in sorted(store.answering().items())] for store in stores]
    state += [[q.id, q.document_ids, q.question, q.answers, q.choices, q.kind] for q in collection.questions]
    return output / "parts" / hashlib.sha256(json.dumps(state).encode()).hexdigest()[:12]
