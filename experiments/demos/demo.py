"""Joint training against isolated training on fictional documents, on two cores in minutes.

``python -m experiments.demo --output runs/demo`` trains cartridges on documents of ``million_tokens`` with the embedded
reader, and a sample of them again in isolation: with the same initialization, and as in the paper (first tokens,
``offset`` positions, 2606.04557). A table compares them, loaded with nine others, with no context, the whole document
and RAG. The same command resumes an interrupted run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cas import console
from cas.errors import ConfigError
from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm
from cas.options import Initialization, TrainConfig, Training, parse
from experiments import common

if TYPE_CHECKING:
    from cas.data.collection import Collection
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.store.store import Store

TEXT = (NO_CONTEXT, FULL_DOCUMENT, Arm("rag", retriever="hybrid"))
TEN_LOADED = Arm("loaded", 10)
JOINT = (ORACLE, TEN_LOADED, Arm("retrieved", 4, retriever="hybrid"))
# Isolated trainings of the sample: positions, initialization, and what cartridges from first tokens need to learn as much
# alone (log, 2026-12-01), else the training's own.
ISOLATED: dict[str, tuple[str, Initialization, dict[str, Any]]] = {
    "isolated": ("fixed", "matched", {}),
    "isolated_paper": ("offset", "first", {"epochs": 10.0, "lr": 0.1}),
}
SAMPLE = 16


@dataclass(frozen=True)
class DemoConfig:
    """Train on fictional documents, jointly and in isolation, and measure; prints a table."""

    output: str = "runs/demo"
    """The store, with summary.json and the results beside it."""
    documents: int = 30
    """Documents of million_tokens, at least 20."""
    conversations: int = 2400
    """Conversations of self-study."""
    epochs: float = 4.0
    """Passes over the self-study; cartridges from first tokens get ten."""
    lr: float = 5e-2
    """Peak learning rate; of cartridges from first tokens 0.1."""
    seed: int = 0
    """Seed of everything random."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit status."""
    return console.run(lambda: demo(parse(DemoConfig, "python -m experiments.demo", arguments)))


def demo(config: DemoConfig) -> int:
    """Train, measure, print, and write ``summary.json``."""
    from cas.answering.answerer import Answerer
    from cas.data.collection import Collection
    from cas.evaluation.answers import CachingEmbedder, run_arms, unseen_questions
    from cas.evaluation.machine import PeakMemory
    from cas.evaluation.recording import flags, table, write_run
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.store.store import Store
    from cas.train import train
    from retrieval import SentenceEmbedder

    if config.documents < SAMPLE + 4:
        raise ConfigError(f"--documents {config.documents}: at least {SAMPLE + 4}")
    started = time.monotonic()
    folder = Path(config.output)
    settings = TrainConfig(
        collection="million_tokens",
        documents=config.documents,
        conversations=config.conversations,
        store=config.output,
        initialization="matched",
        pool=config.documents // 10,
        targets=min(4, config.documents // 10),
        guests=9,
        isolation=0.5,
        epochs=config.epochs,
        lr=config.lr,
        seed=config.seed,
    )
    command = "python -m experiments.demo " + flags(config)
    with PeakMemory() as memory:
        if status := train(settings, command.replace("DIR", config.output)):
            return status
        model = FrozenModel.from_pretrained("reader")
        collection = Collection.load("million_tokens").select(config.documents)
        conversations = Conversations.load(folder / "conversations")
        sample = collection.select(sorted(Random(config.seed).sample([d.id for d in collection.documents], SAMPLE)))
        isolated = {name: isolated_store(config, settings, model, sample, conversations, name) for name in ISOLATED}
        trained = time.monotonic()
        store = Store.open(folder)
        questions = unseen_questions(collection.questions, conversations)
        embedder = CachingEmbedder(SentenceEmbedder())
        answer = partial(run_arms, model, embedder=embedder, seed=config.seed, progress=common.log_arm)
        predictions = answer(store, collection, questions, TEXT)
        predictions += answer(store, collection, questions, JOINT, prefix="joint_")
        # The sample's questions, each with the same nine others, under every training.
        of_sample = [q for q in questions if {*q.document_ids} <= {d.id for d in sample.documents}]
        for name, its_store in isolated.items():
            predictions += answer(its_store, sample, of_sample, [ORACLE, TEN_LOADED], prefix=f"{name}_")
        joint = {d.id: store.cartridge(d.id) for d in sample.documents}
        arguments = (isolated["isolated"], sample, of_sample, [ORACLE, TEN_LOADED])
        predictions += answer(*arguments, cartridges=joint, prefix="sample_joint_")
    run = write_run(
        folder / "results",
        name="demo",
        command=command,
        seeds=[config.seed],
        model="embedded reader",
        collection={"name": "million_tokens", "sha256": collection.hash},
        settings={k: v for k, v in asdict(settings).items() if k != "store"},
        predictions=predictions,
        compare=[
            ("joint_loaded10", "no_context"),
            ("full_document", "joint_oracle"),
            ("joint_retrieved4_hybrid", "rag_hybrid"),
            *(("sample_joint_loaded10", f"{arm}_loaded10") for arm in ISOLATED),
            *((f"{arm}_oracle", f"{arm}_loaded10") for arm in ("sample_joint", *ISOLATED)),
        ],
        metric_names=["exact_match"],
        extra_metrics={
            "self_study_and_training_s": common.single_measurement(trained - started),
            "wall_s": common.single_measurement(time.monotonic() - started),
            "peak_anonymous_bytes": common.single_measurement(memory.peak),
        },
        keep_answers=True,
    )
    print()
    print(table(run, [*map(str, TEXT), *(f"joint_{arm}" for arm in JOINT)], ["exact_match"]))
    print(f"\n{SAMPLE} of the documents, alone (oracle) and loaded with nine others:\n")
    trainings = ("sample_joint", *ISOLATED)
    pairs = [f"sample_joint_loaded10_minus_{arm}_loaded10" for arm in ISOLATED]
    shown = [f"{training}_{arm}" for training in trainings for arm in (ORACLE, TEN_LOADED)]
    print(table(run, [*shown, *pairs], ["exact_match"]))
    print()
    common.show_answers(Answerer(model, store, embedder), questions)
    arms = dict.fromkeys(p["arm"] for p in predictions)
    common.write_summary(
        folder,
        {
            "documents": len(collection),
            "tokens": sum(row.tokens for row in store.rows().values()),
            "pool": settings.pool,
            "cartridge_tokens": store.layout.span,
            "wall_s": round(time.monotonic() - started, 1),
            "peak_anonymous_bytes": memory.peak,
            "questions": len(questions),
            "accuracy": {arm: run["metrics"][f"{arm}.exact_match"]["mean"] for arm in arms},
        },
    )
    return 0


def isolated_store(
    config: DemoConfig,
    settings: TrainConfig,
    model: FrozenModel,
    sample: Collection,
    conversations: Conversations,
    name: str,
) -> Store:
    """The sample's cartridges, each trained on the joint training's conversations with no other visible."""
    from cas.selfstudy.conversations import Conversations
    from cas.training.trainer import Trainer

    positions, initialization, rate = ISOLATED[name]
    folder = Path(config.output) / name
    options = {"ratio": 16.0, "positions": positions, "initialisation": initialization, "seed": config.seed}
    store = common.open_store(folder, model, **options)
    store.add_documents(sample, model.count_tokens)
    its_conversations = Conversations(
        [c for d in sample.documents for c in conversations.by_document.get(d.id, ())], {}
    )
    training = replace(settings.part(Training), isolation=1.0, guests=0, **rate)
    common.train(Trainer(model, store, its_conversations, training), name)
    return store


if __name__ == "__main__":
    sys.exit(main())
