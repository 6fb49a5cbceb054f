"""Not in the papers: a collection grows by a tenth, at a tenth of the training, and old documents lose nothing."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import Any

from cas.evaluation.recording import Prediction
from cas.evaluation.resume import cached_json
from cas.selfstudy.conversations import Conversations
from cas.training import rounds
from experiments.claims.lab import BATCH, Claim, ClaimContext, Criterion, main_of

OLD, NEW = 20, 2


def run(lab: ClaimContext) -> list[Prediction]:
    """Twenty trained, then two more among them; and all twenty-two at once."""
    before, after = lab.collection.select(OLD), lab.collection.select(OLD + NEW)
    fresh = [d.id for d in after.documents[OLD:]]
    old = [q for q in lab.questions if {*q.document_ids} <= {d.id for d in before.documents}]
    new = [q for q in lab.questions if {*q.document_ids} <= {*fresh}]
    asked = lab.folder / "grown-before.json"  # what can no longer be asked once the store has grown

    def first() -> dict[str, Any]:
        with lab.trained("grown", before) as store:
            answers = lab.ask(store, "before_old_", ["loaded10"], old, before)
            return {"answers": answers, "tokens": sum(row.trained_tokens for row in store.rows().values())}

    earlier = cached_json(asked, first)
    with closing(lab.initialized("grown", before)) as store:
        rounds.update(store, after)
    predictions: list[Prediction] = earlier["answers"]
    items = [c for i in fresh for c in lab.conversations.by_document[i]]
    with lab.trained("grown", after, Conversations(items, {}), pool=NEW, targets=NEW, per_target=BATCH // NEW) as store:
        rows = store.rows()
        lab.measure("cost.share", [sum(rows[i].trained_tokens for i in fresh) / earlier["tokens"]])
        predictions += lab.ask(store, "grown_old_", ["loaded10"], old, after)
        predictions += lab.ask(store, "grown_new_", ["oracle", "loaded10"], new, after)
    with lab.trained("whole", after) as store:
        predictions += lab.ask(store, "whole_old_", ["loaded10"], old, after)
        predictions += lab.ask(store, "whole_new_", ["oracle", "loaded10"], new, after)
    return predictions


CLAIM = Claim(
    name="growing",
    title="A collection that grows",
    paper="Not in the papers: 2606.04557 trains a fixed collection.",
    ours=(
        "20 documents trained, then 2 new ones among them, which stay frozen and so answer alone as before; against all "
        "22 trained at once. With ten loaded, old cartridges meet new ones that they never saw in training."
    ),
    run=run,
    table=[
        ("new documents' training, share of the old ones'", "cost.share"),
        ("old documents, before", "before_old_loaded10"),
        ("old documents, after", "grown_old_loaded10"),
        ("old documents, all at once", "whole_old_loaded10"),
        ("new documents, after", "grown_new_loaded10"),
        ("new documents, all at once", "whole_new_loaded10"),
        ("new documents alone, after", "grown_new_oracle"),
        ("new documents alone, all at once", "whole_new_oracle"),
    ],
    compare=[
        ("before_old_loaded10", "grown_old_loaded10"),
        ("whole_old_loaded10", "grown_old_loaded10"),
        ("whole_new_loaded10", "grown_new_loaded10"),
        ("whole_new_oracle", "grown_new_oracle"),
    ],
    criteria=[
        Criterion("a tenth more documents cost about a tenth", "cost.share", "most", 0.12),
        Criterion(
            "old documents lose at most 2 points with ten loaded",
            "before_old_loaded10_minus_grown_old_loaded10",
            "most",
            2,
        ),
        Criterion(
            "they lose at most 2 points to training all at once",
            "whole_old_loaded10_minus_grown_old_loaded10",
            "most",
            2,
        ),
        Criterion(
            "new documents lose at most 2 points to training all at once",
            "whole_new_loaded10_minus_grown_new_loaded10",
            "most",
            2,
        ),
    ],
)

if __name__ == "__main__":
    sys.exit(main_of(CLAIM))
