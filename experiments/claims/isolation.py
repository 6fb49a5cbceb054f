"""Claim 5: how often a conversation should see its own cartridge alone."""

from __future__ import annotations

import sys

from cas.evaluation.recording import Prediction
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
NAME = {0.5: "joint", 1.0: "isolated"}


def run(lab: ClaimContext) -> list[Prediction]:
    """A training for every share."""
    predictions: list[Prediction] = []
    for share in SHARES:
        with lab.trained(NAME.get(share, f"isolation{share:g}"), isolation=share) as store:
            predictions += lab.ask(store, f"isolation{100 * share:.0f}_", ["oracle", "loaded10"])
    return predictions


CLAIM = Claim(
    name="isolation",
    title="How often a conversation sees its own cartridge alone",
    paper="With probability 0.75 alone, else among 1 to 10 distractors (2606.04557).",
    ours="0, 0.25, 0.5, 0.75 and 1 (isolated training), with attention-matching initialization.",
    run=run,
    table=[
        (f"{share:g}, {label}", f"isolation{100 * share:.0f}_{arm}")
        for arm, label in (("oracle", "own cartridge"), ("loaded10", "ten loaded"))
        for share in SHARES
    ],
    compare=[
        *((f"isolation{100 * share:.0f}_loaded10", "isolation100_loaded10") for share in SHARES[:-1]),
        *((f"isolation{100 * share:.0f}_oracle", "isolation100_oracle") for share in SHARES[:-1]),
        ("isolation75_loaded10", "isolation50_loaded10"),
        ("isolation75_loaded10", "isolation0_loaded10"),
    ],
    criteria=[
        Criterion(
            "at 0.75, ten loaded answer more than after isolated training",
            "isolation75_loaded10_minus_isolation100_loaded10",
            "least",
            0,
        ),
        Criterion(
            "at 0.75, the own cartridge alone loses at most 2 points",
            "isolation75_oracle_minus_isolation100_oracle",
            "least",
            -2,
        ),
        Criterion(
            "0.75 is at least as good as 0.5 with ten loaded",
            "isolation75_loaded10_minus_isolation50_loaded10",
            "least",
            0,
        ),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
