"""Claim 12: how many different questions about a chunk are worth writing."""

from __future__ import annotations

import sys
from random import Random

from cas.evaluation.recording import Prediction
from cas.selfstudy.conversations import Conversations
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of

SHARES = (8, 4, 2, 1)  # one in so many of all conversations


def run(lab: ClaimContext) -> list[Prediction]:
    """A share of every document's conversations, in as many steps."""
    predictions: list[Prediction] = []
    for share in SHARES:
        chosen = []
        for name, items in lab.conversations.by_document.items():
            places = Random(f"{lab.seed}/{name}").sample(range(len(items)), max(1, len(items) // share))
            chosen += [items[i] for i in sorted(places)]
        conversations = lab.conversations if share == 1 else Conversations(chosen, {})
        epochs = lab.config.epochs * len(lab.conversations) / len(conversations)
        name = "joint" if share == 1 else f"one_in_{share}"
        with lab.trained(name, conversations=conversations, epochs=epochs) as store:
            predictions += lab.ask(store, f"{name}_", ["oracle", "loaded10"])
        counts = {i: len(c) for i, c in conversations.by_document.items()}
        lab.measure(f"{name}.conversations", list(counts.values()), list(counts))
    return predictions


def _names() -> list[tuple[str, str]]:
    return [("all" if s == 1 else f"one in {s}", "joint" if s == 1 else f"one_in_{s}") for s in SHARES]


CLAIM = Claim(
    name="questions_per_chunk",
    title="Questions per chunk",
    paper="About 20 questions are written in one call per chunk (2606.04557, second hand).",
    ours=(
        "Documents are one chunk each. All its questions, or one in 2, 4, 8, in as many steps from the same "
        "initialization."
    ),
    run=run,
    table=[
        *((f"{label}: conversations a document", f"{name}.conversations") for label, name in _names()),
        *(
            (f"{label}, {'own cartridge' if arm == 'oracle' else 'ten loaded'}", f"{name}_{arm}")
            for label, name in _names()
            for arm in ("oracle", "loaded10")
        ),
    ],
    compare=[("joint_oracle", f"one_in_{s}_oracle") for s in SHARES if s > 1],
    criteria=[
        Criterion("all are better than one in 8", "joint_oracle_minus_one_in_8_oracle", "least", 0),
        Criterion("one in 2 loses at most 2 points", "joint_oracle_minus_one_in_2_oracle", "most", 2),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
