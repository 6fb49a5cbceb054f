"""What self-study records beside its conversations: what units were made with, and which documents have none."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection as Names
from collections.abc import Mapping
from typing import Any

from cas.data.collection import Collection
from cas.model.frozen import FrozenModel
from cas.options import SelfStudy
from cas.selfstudy.prompt_styles import PromptStyle
from cas.store.files import write_atomically
from cas.store.store import Store

# As they are given. What of the writer decides the text is recorded, and whether there is reconstruction.
_NOT_STORED = {"conversations", "effort", "keep_going", "reconstruction"}
_NOT_STORED |= {"writer", "writer_url", "writer_model", "writer_concurrency"}


def made_with(
    model: FrozenModel,
    documents: Collection,
    store: Store,
    settings: SelfStudy,
    style: PromptStyle,
    every_sentence: bool,
    reconstruction: bool,
    writer_model: str | None,
) -> str:
    """JSON of everything that must be the same for finished units to be used again. ``writer_model``: of the endpoint."""
    # The collection's own hash leaves ids out, but conversations are filed by id.
    texts = hashlib.sha256("\n".join(f"{d.id}\t{d.hash}" for d in documents.documents).encode()).hexdigest()
    fields = {name: value for name, value in vars(settings).items() if name not in _NOT_STORED}
    fields["questions_per_call"], fields["calls_per_unit"] = style.sizes(settings)
    if not style.every_sentence:
        fields["wordings"] = SelfStudy.wordings  # of the reader's questions alone
    if style.lists:
        fields["writer"] = "list"
    elif style.likeliest and every_sentence:
        fields["writer"] = "likeliest"
    if writer_model is not None:  # not its address: the same model may move to another one
        fields["writer_model"] = writer_model
    if reconstruction:  # units of earlier versions have no such key
        fields["reconstruction"] = True
    return json.dumps(
        {
            "model": store.meta["model"]["fingerprint"],
            "system": model.system,
            "documents": texts,
            "once": every_sentence,
            **fields,
        },
        sort_keys=True,
    )


def reconstructs(model: FrozenModel, settings: SelfStudy, recorded: Mapping[str, Any]) -> bool:
    """Whether the text of documents is part of the conversations: not for the embedded reader, which was never taught to
    repeat, nor in a folder whose units were begun without."""
    begun = bool(recorded.get("reconstruction", not recorded))
    return settings.reconstruction == "on" and begun and not model.reader


def record_without(store: Store, documents: Collection, having: Names[str]) -> list[str]:
    """Write the documents that have no conversation beside the store, {id: hash of the text}; those of earlier rounds
    stay. ``having``: ids of the others. Returns: their ids in this collection."""
    file = store.folder / "without_conversations.json"
    before = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    without = {d.id: d.hash for d in documents.documents if d.id not in having}
    now = {name: text for name, text in before.items() if name not in having} | without
    if now != before:
        write_atomically(file, json.dumps(now, ensure_ascii=False, sort_keys=True, indent=1).encode())
    return list(without)
