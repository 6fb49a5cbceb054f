"""Claim 2: the right cartridge answers nearly as well as the right document's text in context."""

from __future__ import annotations

import sys

from cas.evaluation.recording import Prediction
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of


def run(lab: ClaimContext) -> list[Prediction]:
    """The joint training, and the text."""
    with lab.trained("joint") as store:
        return [*lab.ask(store, "", ["no_context", "full_document"]), *lab.ask(store, "joint_", ["oracle"])]


CLAIM = Claim(
    name="oracle_vs_context",
    title="The right cartridge against the right text in context",
    paper=(
        "The oracle cartridge is within 2 to 6 points of full in-context learning (LongHealth 79.0 of 87.4) "
        "(2606.04557)."
    ),
    ours="The own cartridge of joint training at 16x, the document's text, and neither.",
    run=run,
    table=[
        ("no context", "no_context"),
        ("own cartridge", "joint_oracle"),
        ("document's text", "full_document"),
        ("text minus cartridge", "full_document_minus_joint_oracle"),
    ],
    compare=[("full_document", "joint_oracle"), ("joint_oracle", "no_context")],
    criteria=[
        Criterion("the text is at most 6 points better", "full_document_minus_joint_oracle", "most", 6),
        Criterion("the cartridge knows what the model does not", "joint_oracle_minus_no_context", "least", 20),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
