"""Claim 3: many small cartridges against a monolithic one for the whole collection."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from cas.evaluation.recording import Prediction
from cas.selfstudy.conversations import Conversations
from experiments.claims.lab import BATCH, FIRST_TOKENS, Claim, ClaimContext, Criterion, main_of

K = 4


def run(lab: ClaimContext) -> list[Prediction]:
    """One cartridge of as many positions as four are retrieved, one of as many as all have, and the modular ones."""
    items = [replace(c, document="collection") for per in lab.conversations.by_document.values() for c in per]
    conversations, predictions = Conversations(items, {}), list[Prediction]()
    with lab.trained("joint") as store:
        predictions += lab.ask(store, "joint_", ["oracle", "loaded", f"retrieved{K}_hybrid"])
        span, total = store.layout.span, sum(row.p for row in store.rows().values())
    for name, tokens in (("monolithic", K * span), ("monolithic_total", total)):
        options = {"tokens": tokens, "initialisation": "first"}
        alone: dict[str, Any] = {**FIRST_TOKENS, "pool": 1, "targets": 1, "per_target": BATCH, "isolation": 1.0}
        with lab.trained(name, lab.collection.merged(), conversations, options=options, **alone) as store:
            predictions += lab.ask(store, f"{name}_", ["loaded"])
    return predictions


CLAIM = Claim(
    name="modular",
    title="Modular against monolithic",
    paper=(
        "One cartridge per document answers 10 to 31 points more than one monolithic cartridge of the same size "
        "(2606.04557)."
    ),
    ours=(
        "A monolithic cartridge of four cartridges' positions against four retrieved, and one of all their positions "
        "against all loaded. The monolithic ones start as first tokens, since self-study about many documents gives no "
        "attention to match, and so get ten passes over the same conversations in place of three."
    ),
    run=run,
    table=[
        ("own cartridge", "joint_oracle"),
        ("4 retrieved", "joint_retrieved4_hybrid"),
        ("all loaded", "joint_loaded"),
        ("monolithic, of 4", "monolithic_loaded"),
        ("monolithic, of all", "monolithic_total_loaded"),
    ],
    compare=[("joint_retrieved4_hybrid", "monolithic_loaded"), ("joint_loaded", "monolithic_total_loaded")],
    criteria=[
        Criterion(
            "four retrieved answer at least 10 points more than one of their size",
            "joint_retrieved4_hybrid_minus_monolithic_loaded",
            "least",
            10,
        ),
        Criterion(
            "all loaded answer at least 10 points more than one of their size",
            "joint_loaded_minus_monolithic_total_loaded",
            "least",
            10,
        ),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
