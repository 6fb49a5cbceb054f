"""Claim 16: a corpus that is longer than the model's window."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from cas.data.worlds import world
from cas.evaluation.recording import Prediction
from cas.model.decoding import Prompt
from cas.model.positions import Layout
from cas.selfstudy.conversations import Conversations
from experiments.claims.lab import BATCH, FIRST_TOKENS, SMALL, Claim, ClaimContext, Criterion, main_of
from retrieval import with_title


def run(lab: ClaimContext) -> list[Prediction]:
    """All cartridges of it loaded, one monolithic cartridge, and the text as far as it fits."""
    window = lab.model.geometry.max_positions
    documents = 2 * (window // 350)  # about twice the window
    long = lab.with_collection("long", world(300 + lab.seed, documents, name="long_corpus", shape=SMALL))
    predictions: list[Prediction] = []
    with long.trained("joint", targets=16) as store:
        predictions += long.ask(store, "", ["no_context"])
        predictions += long.ask(store, "joint_", ["oracle", "loaded"])
        rows = store.rows().values()
        total = sum(r.p for r in rows)
        lab.measure("corpus.windows", [sum(r.tokens for r in rows) / window])
        lab.measure("loaded.positions", [total])
    items = [replace(c, document="collection") for per in long.conversations.by_document.values() for c in per]
    alone: dict[str, Any] = {**FIRST_TOKENS, "pool": 1, "targets": 1, "per_target": BATCH, "isolation": 1.0}
    options = {"tokens": total, "initialisation": "first"}
    with long.trained(
        "monolithic", long.collection.merged(), Conversations(items, {}), options=options, **alone
    ) as store:
        predictions += long.ask(store, "monolithic_", ["loaded"])
    text = "\n\n".join(with_title(d.title, d.text) for d in long.collection.documents)
    header, model = lab.model.layout_header, lab.model
    ids = model.encode(text)[: window - header - 128]
    kv = model.prefill([*model.template.header_ids, *ids])[:, :, :, header:]
    prompts = [Prompt(lab.question_tokens(q), ("text",)) for q in long.questions]
    layout = Layout("offset", header, 0)
    return predictions + lab.answer("truncated", long.questions, prompts, {"text": kv}, layout)


CLAIM = Claim(
    name="long_corpus",
    title="A corpus longer than the window",
    paper=(
        "A 484,000-token book is learned by a model of a 128,000-token window, and its cartridge beats the truncated "
        "text (2506.06266)."
    ),
    ours=(
        "Documents of about twice the reader's window of 8,192. All their cartridges loaded, one monolithic cartridge "
        "of the same size, from first tokens in ten passes in place of three, and the text, cut at the window."
    ),
    run=run,
    table=[
        ("corpus, windows", "corpus.windows"),
        ("positions of all cartridges", "loaded.positions"),
        ("no context", "no_context"),
        ("text, cut at the window", "truncated"),
        ("monolithic cartridge", "monolithic_loaded"),
        ("all cartridges loaded", "joint_loaded"),
        ("own cartridge", "joint_oracle"),
    ],
    compare=[("joint_loaded", "truncated"), ("monolithic_loaded", "truncated"), ("joint_loaded", "monolithic_loaded")],
    criteria=[
        Criterion(
            "the monolithic cartridge is better than the truncated text",
            "monolithic_loaded_minus_truncated",
            "least",
            0,
        ),
        Criterion("all cartridges loaded are too", "joint_loaded_minus_truncated", "least", 0),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
