"""Claim 18: less memory a user, so more users and more tokens a second from the same memory."""

from __future__ import annotations

import sys

from cas.evaluation.recording import Prediction
from experiments.benchmarks.serving import decode_many
from experiments.benchmarks.work import Work
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of


def run(lab: ClaimContext) -> list[Prediction]:
    """Accuracy of text and cartridge, then decoding for as many users as fit, in turn."""
    predictions: list[Prediction] = []
    with lab.trained("joint") as store:
        predictions += lab.ask(store, "", ["full_document"])
        predictions += lab.ask(store, "joint_", ["oracle"])
        rows = store.rows().values()
        lab.measure("memory.ratio", [r.tokens / r.p for r in rows], [r.id for r in rows])
    for _, what, value in decode_many(Work("reader", lab.model, 32), 3, ratio=int(lab.config.ratio)):
        lab.measure(f"decode.{what}", [value])
    return predictions


CLAIM = Claim(
    name="throughput",
    title="KV memory and decoding throughput",
    paper="38.6x less memory and 26.4x the peak throughput of full context at its quality, on average (2506.06266).",
    ours=(
        "A cartridge of a sixteenth of its document. As many users as fit the memory of two with four documents' text "
        "each, every user with documents of their own, decode 32 tokens: as text, and as cartridges."
    ),
    run=run,
    table=[
        ("document's text", "full_document"),
        ("own cartridge", "joint_oracle"),
        ("KV memory, text over cartridge", "memory.ratio"),
        ("users in the same memory, ratio", "decode.users"),
        ("tokens a second, ratio", "decode.ratio"),
        ("tokens a second with cartridges", "decode.tokens_per_second"),
    ],
    compare=[("full_document", "joint_oracle")],
    criteria=[
        Criterion("at least 10 times less memory", "memory.ratio", "least", 10),
        Criterion("more tokens a second from the same memory", "decode.ratio", "least", 1),
        Criterion("at in-context quality (at most 4 points below)", "full_document_minus_joint_oracle", "most", 4),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
