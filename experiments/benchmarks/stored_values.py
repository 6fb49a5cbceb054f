"""What ``cas compact --values`` loses: answers of a finished store in float32, and of copies in bfloat16 and int8.

python -m experiments.benchmarks.stored_values --store runs/demo

Prints, for the document's own cartridge and for that one and three others: exact match, how many answers differ from
those in float32, and what the log-perplexity of the right answers rises by.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from cas import console
from cas.commands import compact
from cas.errors import UserError
from cas.options import parse

if TYPE_CHECKING:
    from cas.evaluation.recording import Prediction


@dataclass(frozen=True)
class Config:
    """Measure what fewer bytes per number lose."""

    store: str = "runs/demo"
    """A finished store of a collection with questions; it is copied, not changed."""
    questions: int = 12
    """Questions of each document."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit status."""
    return console.run(lambda: run(parse(Config, "python -m experiments.benchmarks.stored_values", arguments)))


def run(config: Config) -> int:
    """Compact two copies, ask them what the store is asked, print the table."""
    from cas.data.collection import Collection
    from cas.evaluation.answers import run_arms
    from cas.evaluation.arms import Arm
    from cas.evaluation.metrics import interval, paired_difference
    from cas.model.frozen import FrozenModel
    from cas.store.store import Store

    source = Path(config.store)
    if not (source / "config.yaml").exists():
        raise UserError(f"{source} has no config.yaml, which names the collection of a store; give another --store")
    recorded = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
    with Store.open(source) as store:
        rows, model = store.rows(), FrozenModel.from_store(store)
    collection = Collection.load(recorded["collection"], None, recorded["collection_seed"])
    asked = [q for i in rows for q in [q for q in collection.questions if q.document_ids == (i,)][: config.questions]]
    clusters = [q.document_ids[0] for q in asked]
    arms, before = ("oracle", f"loaded{min(4, len(rows))}"), list["Prediction"]()
    print(f"{len(rows)} cartridges, {len(asked)} questions")
    with tempfile.TemporaryDirectory() as folder:
        for values in ("float32", "bfloat16", "int8"):
            copy = Path(folder) / values
            copy.mkdir()
            shutil.copy(source / "cartridges.lmdb", copy)
            if values != "float32":
                compact(str(copy), values=values)  # type: ignore[arg-type]
            with Store.open(copy) as store:
                found = run_arms(model, store, collection, asked, [Arm.parse(arm) for arm in arms])
            before = before or found
            for arm in arms:
                ours, theirs = ([p for p in answers if p["arm"] == arm] for answers in (found, before))
                exact = interval([p["scores"]["exact_match"] for p in ours], clusters)
                other = sum(a.get("answer") != b.get("answer") for a, b in zip(ours, theirs, strict=True))
                now, then = ([p["scores"]["log_perplexity"] for p in answers] for answers in (ours, theirs))
                rise = paired_difference(now, then, clusters)
                print(
                    f"{values:8} {arm:8} exact match {100 * exact.mean:.1f} [{100 * exact.low:.1f}, {100 * exact.high:.1f}] %, "
                    f"{other} other answers, log-perplexity {rise.mean:+.5f} [{rise.low:+.5f}, {rise.high:+.5f}]"
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
