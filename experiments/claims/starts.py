"""Claim 9: how to initialize cartridges."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from cas.data.worlds import world
from cas.evaluation.recording import Prediction
from cas.store.store import Store
from cas.training.initialization import initialize
from experiments.claims.lab import BATCH, FIRST_TOKENS, SMALL, Claim, ClaimContext, Criterion, main_of

INITIALIZATIONS = {
    "matched": "attention matching (ours)",
    "first": "first tokens",
    "sampled": "sampled chunks (SCI)",
    "unrelated": "first tokens of another text",
    "random": "noise",
}
QUARTERS = (0, 1, 2, 4)


def unrelated(lab: ClaimContext) -> Callable[[Store], None]:
    """Return a function that gives every cartridge the KV of an unrelated text."""

    def prepare(store: Store) -> None:
        text = world(900 + lab.seed, 2, shape=SMALL).documents[0].text
        rows, ids = store.rows(), lab.model.encode(text)
        with store.training():
            for i, row in rows.items():
                store.write_tensors(i, {"kv": initialize(lab.model, ids, row.p, "first", 0).cpu()})
            store.commit(rows, None)

    return prepare


def run(lab: ClaimContext) -> list[Prediction]:
    """Every initialization with the same training; answers after none, a quarter, half and all of it."""
    predictions: list[Prediction] = []
    for start in INITIALIZATIONS:
        settings: dict[str, Any] = {
            "options": {"initialisation": "first" if start == "unrelated" else start},
            **FIRST_TOKENS,
            "lr": 0.05,
        }
        settings["prepare"] = unrelated(lab) if start == "unrelated" else None
        name = f"start_{start}"
        steps = len(lab.conversations) * FIRST_TOKENS["epochs"] / BATCH
        for quarter in QUARTERS:
            with lab.trained(name, until=round(steps * quarter / 4) if quarter < 4 else None, **settings) as store:
                predictions += lab.ask(store, f"{start}_at{25 * quarter}_", ["oracle"])
        losses = [line["loss"] for line in lab.log(name)]
        for quarter in (1, 2, 4):
            end = len(losses) * quarter // 4
            lab.measure(f"{start}_at{25 * quarter}.loss", losses[max(0, end - max(1, len(losses) // 10)) : end])
    return predictions


CLAIM = Claim(
    name="starts",
    title="Initialization of cartridges",
    paper=(
        "First tokens 55.3, unrelated text 51.3, noise 29.9 (LongHealth, 2506.06266); sampled chunks converge faster "
        "than first tokens (2508.17032)."
    ),
    ours=(
        "Joint training at one learning rate (0.05) from every initialization; the own cartridge after 0, 25, 50 and "
        "100 % of it, and the loss."
    ),
    run=run,
    table=[
        *(
            (f"{label}, after {25 * q} %", f"{start}_at{25 * q}_oracle")
            for start, label in INITIALIZATIONS.items()
            for q in QUARTERS
        ),
        *((f"{label}, last loss (nats)", f"{start}_at100.loss") for start, label in INITIALIZATIONS.items()),
    ],
    compare=[
        ("first_at100_oracle", "unrelated_at100_oracle"),
        ("first_at100_oracle", "random_at100_oracle"),
        ("sampled_at25_oracle", "first_at25_oracle"),
        ("sampled_at100_oracle", "first_at100_oracle"),
        ("matched_at25_oracle", "first_at100_oracle"),
    ],
    criteria=[
        Criterion(
            "first tokens are better than unrelated text",
            "first_at100_oracle_minus_unrelated_at100_oracle",
            "least",
            0,
        ),
        Criterion(
            "and at least 10 points better than noise",
            "first_at100_oracle_minus_random_at100_oracle",
            "least",
            10,
        ),
        Criterion(
            "sampled chunks are better than first tokens after a quarter",
            "sampled_at25_oracle_minus_first_at25_oracle",
            "least",
            0,
        ),
        Criterion(
            "attention matching is better after a quarter than first tokens at the end",
            "matched_at25_oracle_minus_first_at100_oracle",
            "least",
            0,
        ),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
