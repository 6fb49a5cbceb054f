"""Claim 14: keys route and hardly move, values hold the content."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor

from cas.data.worlds import world
from cas.evaluation.recording import Prediction
from cas.selfstudy.conversations import Conversation
from cas.store.store import Store
from cas.training.initialization import initialize
from cas.training.trainer import Trainer
from experiments.claims.lab import FIRST_TOKENS, SMALL, Claim, ClaimContext, Criterion, main_of

POSITIONS = 20  # the same for all, so that keys can be swapped


class ValuesOnly(Trainer):
    """Keys stay as they are: they get no gradient, and Adam moves nothing without one."""

    def loss(
        self, conversations: list[Conversation], visible: list[tuple[str, ...]], cartridges: Mapping[str, Tensor]
    ) -> tuple[Tensor, int]:
        frozen = {i: torch.stack([kv[:, 0].detach(), kv[:, 1]], dim=1) for i, kv in cartridges.items()}
        return super().loss(conversations, visible, frozen)


def run(lab: ClaimContext) -> list[Prediction]:
    """Keys and values trained; values alone over own keys; values alone over the keys of one unrelated text for all."""
    predictions: list[Prediction] = []
    options: dict[str, Any] = {"tokens": POSITIONS, "initialisation": "first"}

    def share_keys(store: Store) -> None:
        text = world(900 + lab.seed, 2, shape=SMALL).documents[0].text
        keys = initialize(lab.model, lab.model.encode(text), POSITIONS, "first", 0)[:, 0].cpu()
        with store.training():
            rows = store.rows()
            for i in rows:
                store.write_tensors(i, {"kv": torch.stack([keys, store.cartridge(i)[:, 1]], dim=1)})
            store.commit(rows, None)

    with (
        closing(lab.initialized("routers_start", **options)) as start,
        lab.trained("routers_both", options=options, **FIRST_TOKENS) as store,
    ):
        predictions += lab.ask(store, "both_", ["oracle", "loaded10"])
        before, after = ({i: s.cartridge(i) for i in store.rows()} for s in (start, store))
        for part, name in ((0, "keys"), (1, "values")):
            moved = [(after[i][:, part] - before[i][:, part]).norm() / before[i][:, part].norm() for i in after]
            lab.measure(f"{name}.drift", [float(m) for m in moved], list(after))
        ids = list(after)
        swapped = {
            i: torch.stack([after[other][:, 0], after[i][:, 1]], dim=1)
            for i, other in zip(ids, ids[1:] + ids[:1], strict=True)
        }
        predictions += lab.ask(store, "swapped_", ["oracle"], cartridges=swapped)
    settings: dict[str, Any] = {"options": options, "trainer": ValuesOnly, **FIRST_TOKENS}
    with lab.trained("routers_values", **settings) as store:
        predictions += lab.ask(store, "values_", ["oracle", "loaded10"])
    with lab.trained("routers_shared", prepare=share_keys, **settings) as store:
        predictions += lab.ask(store, "shared_", ["oracle", "loaded10"])
        same = {i: store.cartridge(i)[:, 0] for i in store.rows()}
        assert all(torch.equal(k, same[ids[0]]) for k in same.values())
        lab.measure("shared.memory", [(1 + 1 / len(same)) / 2])
    return predictions


CLAIM = Claim(
    name="routers",
    title="Keys as routers",
    paper=(
        "Keys stay near their initialization and route, values hold the content; keys swapped between tasks cost 4 to "
        "7 % (2508.17032)."
    ),
    ours=(
        "From first tokens, 20 positions each. Drift: how far keys and values moved, relative to their initialization. "
        "Every cartridge with the next document's trained keys. Values trained alone, over own keys and over one "
        "text's keys for all, which halves memory."
    ),
    run=run,
    table=[
        ("keys' drift", "keys.drift"),
        ("values' drift", "values.drift"),
        ("keys and values trained, own cartridge", "both_oracle"),
        ("with the next document's keys", "swapped_oracle"),
        ("values alone trained", "values_oracle"),
        ("values alone, keys shared by all", "shared_oracle"),
        ("ten loaded: keys and values", "both_loaded10"),
        ("ten loaded: values alone", "values_loaded10"),
        ("ten loaded: values alone, keys shared", "shared_loaded10"),
        ("memory with shared keys, as a share", "shared.memory"),
    ],
    compare=[
        ("both_oracle", "swapped_oracle"),
        ("both_oracle", "values_oracle"),
        ("both_oracle", "shared_oracle"),
        ("both_loaded10", "values_loaded10"),
        ("both_loaded10", "shared_loaded10"),
    ],
    criteria=[
        Criterion("keys move less than half of their size", "keys.drift", "most", 0.5),
        Criterion("another document's keys cost at most 7 points", "both_oracle_minus_swapped_oracle", "most", 7),
        Criterion("frozen keys cost at most 5 points", "both_oracle_minus_values_oracle", "most", 5),
        Criterion(
            "shared keys cost at most 5 points with ten loaded", "both_loaded10_minus_shared_loaded10", "most", 5
        ),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
