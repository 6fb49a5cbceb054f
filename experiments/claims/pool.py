"""Claim 7: a small pool that rotates trains as well as all cartridges at once."""

from __future__ import annotations

import sys
from typing import Any

from cas.evaluation.recording import Prediction
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of

POOLS: dict[str, dict[str, Any]] = {  # as many conversations a step under all
    "pool6": {"pool": 6, "targets": 6, "per_target": 11},
    "pool12": {"pool": 12, "targets": 12, "per_target": 5},
    "pool12_every2": {"pool": 12, "targets": 12, "per_target": 5, "rotate_every": 2},
    "pool12_every40": {"pool": 12, "targets": 12, "per_target": 5, "rotate_every": 40},
    "pool24": {"pool": 24, "targets": 16, "per_target": 4},
}
LABELS = {
    "pool6": "6 resident, rotated every 10 steps",
    "pool12": "12, every 10",
    "pool12_every2": "12, every 2",
    "pool12_every40": "12, every 40",
    "pool24": "all 24",
}


def run(lab: ClaimContext) -> list[Prediction]:
    """A training for every pool and rotation."""
    predictions: list[Prediction] = []
    for name, settings in POOLS.items():
        with lab.trained(name, **settings) as store:
            predictions += lab.ask(store, f"{name}_", ["oracle", "loaded10"])
    return predictions


CLAIM = Claim(
    name="pool",
    title="Size of the pool, and rotation",
    paper="A pool of 20 of hundreds, half of it exchanged every 10 steps, trains them all (2606.04557).",
    ours=(
        "Pools of 6, 12 and all 24; half is exchanged every 2, 10 or 40 steps. The same number of conversations a step "
        "and in all."
    ),
    run=run,
    table=[
        (f"{LABELS[name]}; {'own cartridge' if arm == 'oracle' else 'ten loaded'}", f"{name}_{arm}")
        for name in POOLS
        for arm in ("oracle", "loaded10")
    ],
    compare=[
        (f"{name}_{arm}", f"pool24_{arm}") for name in POOLS if name != "pool24" for arm in ("oracle", "loaded10")
    ],
    criteria=[
        Criterion(
            "half the cartridges in the pool lose at most 2 points, ten loaded",
            "pool12_loaded10_minus_pool24_loaded10",
            "least",
            -2,
        ),
        Criterion("and alone", "pool12_oracle_minus_pool24_oracle", "least", -2),
        Criterion("a quarter too, ten loaded", "pool6_loaded10_minus_pool24_loaded10", "least", -2),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
