"""Claim 15: needles in a haystack, one key, many values, chains of variables."""

from __future__ import annotations

import sys

from cas.data.niah import MULTI_KEY, MULTI_VALUE, TRACKING, niah
from cas.evaluation.recording import Prediction
from experiments.claims.lab import Claim, ClaimContext, Criterion, main_of

KINDS = {"key": MULTI_KEY, "values": MULTI_VALUE, "chain": TRACKING}
WORDS = 300


def run(lab: ClaimContext) -> list[Prediction]:
    """Haystacks as documents: their text, the own cartridge, ten loaded."""
    hay = lab.with_collection("needles", niah(lab.seed, WORDS, lab.config.documents))
    predictions: list[Prediction] = []
    with hay.trained("joint") as store:
        for name, kind in KINDS.items():
            questions = [q for q in hay.questions if q.kind == kind]
            predictions += hay.ask(store, f"{name}_", ["no_context", "full_document", "oracle", "loaded10"], questions)
        rows = store.rows().values()
        lab.measure("needles.compression", [r.tokens / r.p for r in rows], [r.id for r in rows])
    return predictions


CLAIM = Claim(
    name="needles",
    title="Needles: one of many keys, many values, chains of variables",
    paper="RULER multi-key above 99 % at 92x; variable tracking beats the full KV cache at 45.9x (2506.06266).",
    ours=(
        "Haystacks of 300 words and more, after RULER: a number of one of 8 keys, all words of one key, all variables "
        "of a value; 16x."
    ),
    run=run,
    table=[
        (f"{kind}: {label}", f"{name}_{arm}")
        for name, kind in KINDS.items()
        for arm, label in (
            ("no_context", "no context"),
            ("full_document", "text"),
            ("oracle", "own cartridge"),
            ("loaded10", "ten loaded"),
        )
    ],
    compare=[(f"{name}_full_document", f"{name}_oracle") for name in KINDS],
    criteria=[
        Criterion("multi-key is found by at least 95 %", "key_oracle", "least", 95),
        Criterion("and costs at most 4 points to the text", "key_full_document_minus_key_oracle", "most", 4),
        Criterion(
            "variable tracking is at least as good as with the text",
            "chain_full_document_minus_chain_oracle",
            "most",
            0,
        ),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
