"""Claim 1: what compression from 2x to 88x costs."""

from __future__ import annotations

import sys

from cas.evaluation.recording import Prediction
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of

RATIOS = (2, 4, 8, 16, 32, 88)  # the last leaves 4 positions, which is the least


def run(lab: ClaimContext) -> list[Prediction]:
    """A joint training of every size."""
    predictions: list[Prediction] = []
    for ratio in RATIOS:
        with lab.trained(f"ratio{ratio}", options={"ratio": float(ratio)}) as store:
            predictions += lab.ask(store, f"ratio{ratio}_", ["oracle", "loaded10"])
            rows = store.rows().values()
            lab.measure(f"ratio{ratio}.compression", [r.tokens / r.p for r in rows], [r.id for r in rows])
    return predictions


CLAIM = Claim(
    name="compression",
    title="Compression from 2x to 100x",
    paper=(
        "Answers hold on narrative text (81.1 at 2x, 77.3 at 100x) and fall on dense figures (FinQA 62.7 to 23.0) "
        "(2606.04557)."
    ),
    ours=(
        "Worlds are dense: every sentence a fact. Joint training at every size; the own cartridge alone, and ten "
        "loaded."
    ),
    run=run,
    table=[
        (f"{ratio}x, {label}", f"ratio{ratio}_{arm}")
        for arm, label in (("oracle", "own cartridge"), ("loaded10", "ten loaded"))
        for ratio in RATIOS
    ],
    compare=[
        ("ratio2_oracle", "ratio88_oracle"),
        ("ratio2_oracle", "ratio16_oracle"),
        ("ratio16_oracle", "ratio88_oracle"),
    ],
    criteria=[
        Criterion(
            "as on FinQA, 88x loses at least 20 points to 2x",
            "ratio2_oracle_minus_ratio88_oracle",
            "least",
            20,
        ),
        Criterion("16x loses at most 5 points to 2x", "ratio2_oracle_minus_ratio16_oracle", "most", 5),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
