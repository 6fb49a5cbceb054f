"""The trainings of collapse_and_rescue: documents, stores, settings and learning rates."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cas.evaluation.arms import Arm
from cas.options import READER
from experiments import common

if TYPE_CHECKING:
    from cas.data.collection import Collection, Question
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.store.store import Store
    from cas.training.trainer import Trainer

K = 4  # cartridges that are retrieved
OTHERS = 10  # cartridges that are loaded together
SIXTEEN = 16  # documents of the smaller monolithic cartridge
MONOLITHIC = {"monolithic": K, "monolithic16": SIXTEEN}  # has the positions of this number of cartridges
# Of every training: positions, whether conversations see other cartridges too, and the initialization.
TRAININGS = {
    "joint": ("fixed", True, "matched"),
    "isolated": ("fixed", False, "matched"),
    "joint_first": ("fixed", True, "first"),
    "isolated_first": ("fixed", False, "first"),
    "paper": ("offset", False, "first"),
}


@dataclass(frozen=True)
class Config:
    """Collapse and rescue on fictional worlds."""

    output: str = "runs/collapse_and_rescue"
    """Folder of stores and results."""
    documents: int = 64
    """Documents of each world."""
    collection_seed: int = 0
    """World of seed 0; seed s has the world of this plus s."""
    seeds: tuple[int, ...] = (0,)
    """Seeds, each a world and a training of its own."""
    model: str = READER
    """The frozen model."""
    ratio: float = 16.0
    """Document tokens per cartridge position (rounded down to a multiple of 4)."""
    tokens: int | None = None
    """Positions of every cartridge; instead of --ratio."""
    conversations: int | None = None
    """Self-study conversations of a world; default as in cas.train."""
    epochs: float = 5.0
    """Passes over all conversations, from attention-matching initialization."""
    first_epochs: float = 10.0
    """Passes over all conversations, from the first tokens."""
    lrs: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Learning rates to choose from, on the first seed."""
    search_share: float = 0.125
    """Share of the passes for a trial of a learning rate."""
    isolation: float = 0.5
    """Share of conversations that see their own cartridge alone in joint training."""
    pool: int = 32
    """Cartridges in training at a time."""
    targets: int = 32
    """Cartridges of the pool that a step trains: many keep a GPU busy, and each sees the same conversations in all."""
    guests: int = 0
    """Frozen cartridges from outside the pool among the distractors."""
    questions: int | None = None
    """Test questions per seed; default all."""
    only: tuple[str, ...] = ()
    """Run only these parts and stop, so that several processes can share the work: text (arms that need no training),
    or names of trainings."""


def world_of(config: Config, seed: int) -> Collection:
    """The documents of a seed, with their test questions."""
    from cas.data.worlds import world

    collection = world(config.collection_seed + seed, config.documents)
    if config.questions is None:
        return collection
    chosen = Random(seed).sample(collection.questions, min(config.questions, len(collection.questions)))
    return replace(collection, questions=tuple(sorted(chosen, key=lambda q: q.id)))


def sixteen(collection: Collection) -> list[str]:
    """The documents of the smaller monolithic cartridge."""
    return [d.id for d in collection.documents[:SIXTEEN]]


def trainer_for(
    config: Config,
    model: FrozenModel,
    collection: Collection,
    conversations: Conversations,
    arm: str,
    lr: float,
    seed: int,
    share: float = 1.0,
) -> Trainer:
    """A trainer of one arm on a store of its own, whose cartridges are initialized. ``share``: of the passes."""
    from cas.training.trainer import Trainer, Training

    positions, joint, initialization = TRAININGS.get(arm, ("fixed", False, "first"))
    epochs = share * (config.epochs if initialization == "matched" else config.first_epochs)
    folder = Path(config.output) / f"seed-{seed}" / f"{arm}-lr{lr:g}-epochs{epochs:g}"
    many = MONOLITHIC.get(arm)
    options = store_options(config, seed, many * span(model, config, seed) if many else config.tokens)
    store = common.open_store(folder, model, positions=positions, initialisation=initialization, **options)
    store.add_documents(collection, model.count_tokens)
    if initialization == "matched":
        with base_store(config, model, seed) as base, store.training():
            rows = store.rows()
            for i in (i for i, row in rows.items() if row.version < 1):
                store.write_tensors(i, {"kv": base.cartridge(i)})
            store.commit(rows, None)
    pool = min(config.pool, len(collection))
    targets = min(config.targets, pool)
    settings = Training(
        epochs=epochs,
        lr=lr,
        pool=pool,
        targets=targets,
        per_target=8 * config.targets // targets,  # a monolithic cartridge gets all conversations of a step
        guests=config.guests if joint else 0,
        isolation=config.isolation if joint else 1.0,
        seed=seed,
    )
    return Trainer(model, store, conversations, settings)


def store_options(config: Config, seed: int, tokens: int | None) -> dict[str, Any]:
    """How stores are created: with ``tokens`` positions for every cartridge, or by ratio."""
    return {"ratio": None if tokens else config.ratio, "tokens": tokens or None, "seed": seed}


def span(model: FrozenModel, config: Config, seed: int) -> int:
    """Positions of the largest cartridge of a seed's collection."""
    with base_store(config, model, seed) as base:
        return base.layout.span


def base_store(config: Config, model: FrozenModel, seed: int) -> closing[Store]:
    """The store with the self-study of a seed and, once made, the attention-matching initialization."""
    folder = Path(config.output) / f"seed-{seed}" / "base"
    options = store_options(config, seed, config.tokens)
    return closing(common.open_store(folder, model, positions="fixed", initialisation="matched", **options))


def chosen_rate(
    config: Config,
    model: FrozenModel,
    collection: Collection,
    trained: Collection,
    conversations: Conversations,
    arm: str,
    questions: Sequence[Question],
    seed: int,
) -> float:
    """The learning rate of the most validation questions answered on the first seed, with ten loaded (or the only one),
    by short trainings on ``trained``."""
    from cas.evaluation.answers import run_arms
    from cas.evaluation.resume import write

    record = Path(config.output) / f"rates-{arm}.json"
    shares: dict[str, float] = json.loads(record.read_text()) if record.exists() else {}
    asked = [q for q in questions if arm != "monolithic16" or {*q.document_ids} <= {*sixteen(collection)}]
    for lr in config.lrs if len(config.lrs) > 1 else ():
        if f"{lr:g}" not in shares:
            assert seed == config.seeds[0]
            trainer = trainer_for(config, model, trained, conversations, arm, lr, seed, config.search_share)
            common.train(trainer, f"trial of {arm}, lr {lr:g}")
            loaded = Arm("loaded") if arm in MONOLITHIC else Arm("loaded", OTHERS)
            answers = run_arms(model, trainer.store, collection, asked, [loaded])
            trainer.store.close()
            shares[f"{lr:g}"] = sum(p["scores"]["exact_match"] for p in answers) / len(answers)
            write(record, shares)
            print(f"{arm}, lr {lr:g}: {shares[f'{lr:g}']:.3f} of validation questions", flush=True)
    return max(config.lrs, key=lambda lr: shares.get(f"{lr:g}", 0.0))
