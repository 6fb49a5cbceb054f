"""Claim 6: whether distractors learn too, and frozen distractors from outside the pool."""

from __future__ import annotations

import sys
from typing import Any

from cas.evaluation.recording import Prediction
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of


def run(lab: ClaimContext) -> list[Prediction]:
    """Gradients for distractors, on and off; a small pool with and without frozen distractors."""
    predictions: list[Prediction] = []
    small: dict[str, Any] = {"pool": 6, "targets": 6, "per_target": 11}
    for name, settings in (
        ("joint", {}),
        ("own_gradients", {"distractor_gradients": False}),
        ("pool6", small),
        ("pool6_guests10", small | {"guests": 10}),
    ):
        with lab.trained(name, **settings) as store:
            predictions += lab.ask(store, f"{name}_", ["oracle", "loaded10"])
    return predictions


CLAIM = Claim(
    name="distractors",
    title="Distractors that learn, and frozen distractors",
    paper=(
        "Accounts of 2606.04557 differ on whether distractors get gradients; a distractor set must be as large as what "
        "is loaded later."
    ),
    ours=(
        "A cartridge learns from every conversation that sees it, or only from those about its own document. A pool of 6 "
        "has at most 5 distractors; 10 frozen distractors are more."
    ),
    run=run,
    table=[
        (f"{label}, {'own cartridge' if arm == 'oracle' else 'ten loaded'}", f"{name}_{arm}")
        for name, label in (
            ("own_gradients", "only from its own conversations"),
            ("joint", "from every conversation that sees it"),
            ("pool6", "pool of 6"),
            ("pool6_guests10", "pool of 6 and 10 frozen distractors"),
        )
        for arm in ("oracle", "loaded10")
    ],
    compare=[
        ("joint_loaded10", "own_gradients_loaded10"),
        ("joint_oracle", "own_gradients_oracle"),
        ("pool6_guests10_loaded10", "pool6_loaded10"),
    ],
    criteria=[
        Criterion(
            "gradients of distractors help when ten are loaded",
            "joint_loaded10_minus_own_gradients_loaded10",
            "least",
            0,
        ),
        Criterion(
            "frozen distractors help a small pool when ten are loaded",
            "pool6_guests10_loaded10_minus_pool6_loaded10",
            "least",
            0,
        ),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
