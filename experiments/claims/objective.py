"""Claim 10: the teacher's probabilities teach more than its words."""

from __future__ import annotations

import sys

from cas.evaluation.recording import Prediction
from experiments.claims.lab import FIRST_TOKENS, Claim, ClaimContext, Criterion, main_of

OBJECTIVES = ("distillation", "next-token")


def run(lab: ClaimContext) -> list[Prediction]:
    """Both objectives, with first tokens, as in the paper, and with attention-matching initialization."""
    predictions: list[Prediction] = []
    for start in ("matched", "first"):
        for objective in OBJECTIVES:
            name = "joint" if (start, objective) == ("matched", "distillation") else f"{start}_{objective}"
            settings = FIRST_TOKENS if start == "first" else {}
            with lab.trained(name, options={"initialisation": start}, objective=objective, **settings) as store:
                predictions += lab.ask(store, f"{start}_{objective}_", ["oracle", "loaded10"])
    return predictions


CLAIM = Claim(
    name="objective",
    title="Distillation against next-token prediction",
    paper="Context distillation is 3.7 to 8.6 points better than the next-token loss (2506.06266).",
    ours=(
        "Joint training on the same conversations with either loss, with first tokens and with attention-matching "
        "initialization."
    ),
    run=run,
    table=[
        (f"{start}, {objective}, {label}", f"{start}_{objective}_{arm}")
        for start in ("first", "matched")
        for objective in OBJECTIVES
        for arm, label in (("oracle", "own cartridge"), ("loaded10", "ten loaded"))
    ],
    compare=[
        (f"{start}_distillation_{arm}", f"{start}_next-token_{arm}")
        for start in ("first", "matched")
        for arm in ("oracle", "loaded10")
    ],
    criteria=[
        Criterion(
            f"distillation is better, initialized with {label}",
            f"{start}_distillation_oracle_minus_{start}_next-token_oracle",
            "least",
            0,
        )
        for start, label in (("first", "first tokens"), ("matched", "attention matching"))
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
