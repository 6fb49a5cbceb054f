"""Claim 4: isolated cartridges collapse with the number loaded; joint training rescues as far as it saw distractors."""

from __future__ import annotations

import sys
from typing import Any

from cas.evaluation.recording import Prediction
from experiments.claims.lab import FIRST_TOKENS, Claim, ClaimContext, Criterion, main_of

SEEN = (0, 2, 5, 10, 20)  # most distractors in training; 0 is isolated training
LOADED = (2, 5, 10, 20)


def run(lab: ClaimContext) -> list[Prediction]:
    """A training from first tokens, as in the paper, for every maximum number of distractors."""
    predictions: list[Prediction] = []
    for most in SEEN:
        seen: dict[str, Any] = {"max_distractors": most, "pool": 24, "targets": 16, "isolation": 0.5 if most else 1.0}
        with lab.trained(
            f"first_distractors{most}", options={"initialisation": "first"}, **FIRST_TOKENS | seen
        ) as store:
            predictions += lab.ask(
                store, f"seen{most}_", ["oracle", *(f"loaded{k}" for k in LOADED if k <= len(store.rows()))]
            )
    return predictions


CLAIM = Claim(
    name="loaded",
    title="Collapse and rescue against the number loaded",
    paper=(
        "Isolated: 73.6 alone, 26.0 with 20 loaded. Joint: 79.0 and 77.8. Trained with 10 distractors and loaded with "
        "20: 56.4; trained with 20: 77.8 (2606.04557)."
    ),
    ours=(
        "Training from first tokens with at most 0 (isolated), 2, 5, 10 or 20 distractors; the own cartridge among 1 "
        "to 20 loaded."
    ),
    run=run,
    table=[
        (
            f"trained with {most}, {'own alone' if arm == 'oracle' else arm.removeprefix('loaded') + ' loaded'}",
            f"seen{most}_{arm}",
        )
        for most in SEEN
        for arm in ("oracle", *(f"loaded{k}" for k in LOADED))
    ],
    compare=[
        *((f"seen{most}_oracle", f"seen{most}_loaded20") for most in SEEN),
        *((f"seen{most}_loaded20", "seen0_loaded20") for most in SEEN[1:]),
        ("seen20_loaded20", "seen10_loaded20"),
        ("seen20_loaded20", "seen2_loaded20"),
    ],
    criteria=[
        Criterion(
            "isolated cartridges lose at least 20 points with 20 loaded",
            "seen0_oracle_minus_seen0_loaded20",
            "least",
            20,
        ),
        Criterion(
            "joint training with 20 recovers at least 20",
            "seen20_loaded20_minus_seen0_loaded20",
            "least",
            20,
        ),
        Criterion("and loses at most 3 itself", "seen20_oracle_minus_seen20_loaded20", "most", 3),
        Criterion(
            "trained with 20 is better than with 2 when 20 are loaded",
            "seen20_loaded20_minus_seen2_loaded20",
            "least",
            0,
        ),
        Criterion("and than with 10", "seen20_loaded20_minus_seen10_loaded20", "least", 0),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
