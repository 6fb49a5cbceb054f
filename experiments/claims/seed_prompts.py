"""Claim 11: five kinds of seed prompt teach more than one."""

from __future__ import annotations

import sys

from cas.evaluation.recording import Prediction
from cas.selfstudy.conversations import Conversations
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of


def run(lab: ClaimContext) -> list[Prediction]:
    """All kinds, and plain questions alone, in as many steps; the initialization is fitted to all kinds in both."""
    predictions: list[Prediction] = []
    with lab.trained("joint") as store:
        predictions += lab.ask(store, "five_", ["oracle", "loaded10"])
    items = [c for per in lab.conversations.by_document.values() for c in per if c.kind == "question"]
    epochs = lab.config.epochs * len(lab.conversations) / len(items)
    with lab.trained("one_kind", conversations=Conversations(items, {}), epochs=epochs) as store:
        predictions += lab.ask(store, "one_", ["oracle", "loaded10"])
    return predictions


CLAIM = Claim(
    name="seed_prompts",
    title="Five seed prompts against one",
    paper="Five generic kinds of seed prompt are 4.8 to 7.9 points better than one (2506.06266).",
    ours=(
        "All five kinds, or the plain questions among them alone, in as many training steps from the same "
        "initialization."
    ),
    run=run,
    table=[
        (f"{label} kinds, {'own cartridge' if arm == 'oracle' else 'ten loaded'}", f"{name}_{arm}")
        for name, label in (("five", "five"), ("one", "one of the"))
        for arm in ("oracle", "loaded10")
    ],
    compare=[("five_oracle", "one_oracle"), ("five_loaded10", "one_loaded10")],
    criteria=[
        Criterion("five kinds are better, own cartridge", "five_oracle_minus_one_oracle", "least", 0),
        Criterion("and with ten loaded", "five_loaded10_minus_one_loaded10", "least", 0),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
