"""Claim 8: the order of loading changes nothing, and without the right cartridge there is nothing to answer from."""

from __future__ import annotations

import sys

from cas.evaluation.recording import Prediction
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of

POLICIES = ("fixed", "offset", "sequential")


def run(lab: ClaimContext) -> list[Prediction]:
    """Ten loaded, and without the own one; a training under every policy of positions, and another order where it can
    matter."""
    predictions: list[Prediction] = []
    for policy in POLICIES:
        options = {"positions": policy} if policy != "fixed" else {}
        with lab.trained("joint" if policy == "fixed" else policy, options=options) as store:
            predictions += lab.ask(store, f"{policy}_", ["oracle", "loaded10"])
            if policy == "sequential":
                predictions += lab.ask(store, f"{policy}_", ["loaded10_reversed"])
            if policy == "fixed":
                predictions += lab.ask(store, "", ["absent10", "no_context"])
    return predictions


CLAIM = Claim(
    name="order",
    title="Order of loading; the right cartridge absent",
    paper=(
        "All 20 loaded answer the same in any order; target present 78 to 87, target absent 27 to 31, no context 37.5 "
        "(2606.04557)."
    ),
    ours=(
        "Under `fixed` and `offset` a set of cartridges is a set, by construction: no other order is asked. Under "
        "`sequential` keys are shifted to where they stand. Ten others without the own one, against nothing loaded."
    ),
    run=run,
    table=[
        *(
            (f"{policy}, {label}", f"{policy}_{arm}")
            for policy in POLICIES
            for arm, label in (
                ("oracle", "own cartridge"),
                ("loaded10", "ten loaded"),
            )
        ),
        ("sequential, reversed", "sequential_loaded10_reversed"),
        ("ten loaded, own absent", "absent10"),
        ("no context", "no_context"),
    ],
    compare=[
        ("sequential_loaded10", "sequential_loaded10_reversed"),
        ("absent10", "no_context"),
        ("fixed_loaded10", "offset_loaded10"),
        ("fixed_loaded10", "sequential_loaded10"),
    ],
    criteria=[
        Criterion(
            "`sequential`: no order is better",
            "sequential_loaded10_minus_sequential_loaded10_reversed",
            "most",
            0.5,
        ),
        Criterion("others alone answer at most 5 points more than nothing", "absent10_minus_no_context", "most", 5),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
