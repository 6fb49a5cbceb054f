"""Joint training against isolated training on fictional documents, on two cores in minutes.

``python -m experiments.demo --output runs/demo`` trains cartridges on documents of ``million_tokens`` with the embedded reader, and a
sample of them again in isolation: from the same starts, and as the paper has it (first tokens, ``offset`` positions,
2606.04557). A table compares them, loaded with nine others, with no context, the whole document and RAG. The same command goes on where it
was stopped.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cas import console
from cas.config import TrainConfig, Training, parse
from cas.errors import ConfigError

if TYPE_CHECKING:
    from cas.answering.answerer import Answerer
    from cas.data.collection import Collection, Question
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.store.store import Store

TEXT = ("no_context", "full_document", "rag_hybrid")
JOINT = ("oracle", "loaded10", "retrieved4_hybrid")
# Isolated trainings of the sample: positions and start.
ISOLATED = {"isolated": ("fixed", "matched"), "isolated_paper": ("offset", "first")}
SAMPLE = 16


@dataclass(frozen=True)
class DemoConfig:
    """Train on fictional documents, jointly and in isolation, and measure; prints a table."""

    output: str = "runs/demo"
    """The store, with summary.json and the results beside it."""
    documents: int = 30
    """Documents of million_tokens, at least 20."""
    epochs: float = 3.0
    """Passes over the self-study, of every training."""
    lr: float = 5e-2
    """Peak learning rate."""
    seed: int = 0
    """Seed of everything random."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit status."""
    return console.run(lambda: demo(parse(DemoConfig, "python -m experiments.demo", arguments)))


def demo(config: DemoConfig) -> int:
    """Train, measure, print, and write ``summary.json``."""
    from cas.answering.answerer import Answerer
    from cas.data.collection import Collection
    from cas.evaluation.arms import CachingEmbedder, PeakMemory, run_arms, unseen
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
        isolated = {arm: isolated_store(config, settings, model, sample, conversations, arm) for arm in ISOLATED}
        trained = time.monotonic()
        store = Store.open(folder)
        questions = unseen(collection.questions, conversations)
        embedder = CachingEmbedder(SentenceEmbedder())
        told: dict[str, Any] = {"embedder": embedder, "seed": config.seed, "progress": measured}
        predictions = run_arms(model, store, collection, questions, TEXT, **told)
        predictions += run_arms(model, store, collection, questions, JOINT, prefix="joint_", **told)
        # The sample's questions, each with the same nine others, under every training.
        few = [q for q in questions if {*q.document_ids} <= {d.id for d in sample.documents}]
        for arm, its_store in isolated.items():
            predictions += run_arms(model, its_store, sample, few, ["loaded10"], prefix=f"{arm}_", **told)
        told["cartridges"] = {d.id: store.cartridge(d.id) for d in sample.documents}
        predictions += run_arms(model, isolated["isolated"], sample, few, ["loaded10"], prefix="sample_joint_", **told)
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
        ],
        metric_names=["exact_match"],
        extra_metrics={
            "self_study_and_training_s": single_measurement(trained - started),
            "wall_s": single_measurement(time.monotonic() - started),
            "peak_anonymous_bytes": single_measurement(memory.peak),
        },
        keep_answers=True,
    )
    print()
    print(table(run, [*TEXT, *(f"joint_{arm}" for arm in JOINT)], ["exact_match"]))
    print(f"\n{SAMPLE} of the documents, loaded with nine others:\n")
    pairs = [f"sample_joint_loaded10_minus_{arm}_loaded10" for arm in ISOLATED]
    print(table(run, ["sample_joint_loaded10", *(f"{arm}_loaded10" for arm in ISOLATED), *pairs], ["exact_match"]))
    print()
    show_answers(Answerer(model, store, embedder), questions)
    arms = dict.fromkeys(p["arm"] for p in predictions)
    summarize(
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
    arm: str,
) -> Store:
    """The sample's cartridges, each trained on the joint training's conversations with no other visible."""
    from cas.selfstudy.conversations import Conversations
    from cas.store.store import Store
    from cas.training.trainer import Trainer
    from experiments.claims.joint_vs_isolated import progress

    positions, start = ISOLATED[arm]
    folder = Path(config.output) / arm
    if Store.exists(folder):
        store = Store.open(folder, write=True)
    else:
        store = Store.create(folder, model, ratio=16.0, positions=positions, initialisation=start, seed=config.seed)
    store.add_documents(sample, model.count_tokens)
    about = Conversations([c for d in sample.documents for c in conversations.by_document.get(d.id, ())], {})
    training = replace(settings.part(Training), isolation=1.0, guests=0)
    progress(Trainer(model, store, about, training), arm)
    return store


def show_answers(answerer: Answerer, questions: Sequence[Question]) -> None:
    """Print three questions, what is right, the answer from four retrieved cartridges, and their shares of the attention."""
    from cas.answering.prompts import brief

    for question in questions[:: max(1, len(questions) // 3)][:3]:
        answer = answerer.ask(question.question + brief(answerer.model), k=4, max_new_tokens=48)
        shares = ", ".join(f"{c.id} ({c.attention:.1%})" for c in answer.cartridges)
        print(f"{question.question}  (right: {' or '.join(question.answers)})\n  {answer.text}\n  from {shares}\n")


def summarize(folder: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json`` whole, and say where it is, how long all took and how much memory."""
    from cas.evaluation.resume import write

    write(folder / "summary.json", summary)
    took, peak = summary["wall_s"], summary["peak_anonymous_bytes"] / 2**30
    print(f"{took:.0f} s, at most {peak:.1f} GiB; written: {folder}/summary.json, {folder}/results")


def measured(arm: str) -> None:
    """Tell that an arm is measured."""
    print(f"measured    {arm}", flush=True)


def single_measurement(value: float) -> dict[str, float]:
    """A figure that was measured one time."""
    return {"mean": round(value, 1), "low": round(value, 1), "high": round(value, 1), "n": 1}


if __name__ == "__main__":
    sys.exit(main())
