"""Eight documents, a 135M model, two cores: the full pipeline in one command, with a table at the end.

``python -m experiments.demo_real --output runs/demo_real`` trains cartridges on ``examples/harbour`` and compares them,
on questions whose wording no training conversation has, with no context and with the whole document in the prompt.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cas import console
from cas.errors import RunError
from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm
from cas.options import InitializationOption, TrainConfig, parse
from experiments import common

ARMS = (NO_CONTEXT, FULL_DOCUMENT, ORACLE, Arm("loaded"), Arm("retrieved", 4))


@dataclass(frozen=True)
class DemoConfig:
    """Train on the example documents and measure; prints a table."""

    output: str = "runs/demo_real"
    """The store, with summary.json and the results beside it."""
    conversations: int = 800
    """Self-study conversations."""
    epochs: float = 10.0
    """Passes over them."""
    lr: float = 4e-2
    """Peak learning rate."""
    initialization: InitializationOption = "matched"
    """Initialization of the cartridges."""
    seed: int = 0
    """Seed of everything random."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo. Returns the exit status."""
    return console.run(lambda: demo(parse(DemoConfig, "python -m experiments.demo_real", arguments)))


def demo(config: DemoConfig) -> int:
    """Train, evaluate, print, and write ``summary.json``."""
    from cas.answering.answerer import Answerer
    from cas.data.collection import Collection
    from cas.evaluation.answers import run_arms, unseen_questions
    from cas.evaluation.machine import PeakMemory
    from cas.evaluation.metrics import METRICS
    from cas.evaluation.recording import table, write_run
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.store.store import Store
    from cas.train import train

    started = time.monotonic()
    folder = Path(config.output)
    settings = TrainConfig(
        collection="examples",
        store=config.output,
        tokens=64,
        pool=3,
        targets=3,
        per_target=2,
        guests=5,
        max_distractors=7,
        isolation=0.5,
        conversations=config.conversations,
        keep_going=True,
        epochs=config.epochs,
        lr=config.lr,
        initialization=config.initialization,
        seed=config.seed,
        rotate_every=24,
    )
    again = " ".join(["python -m experiments.demo_real", *(f"--{k} {v}" for k, v in asdict(config).items())])
    command = again.replace(config.output, "DIR")  # a record names no folder of this machine
    with PeakMemory() as memory:
        status = train(settings, again)
        if status:
            return status
        trained = time.monotonic()
        model = FrozenModel.from_pretrained()
        store = Store.open(folder)
        collection = Collection.load("examples")
        questions = unseen_questions(collection.questions, Conversations.load(folder / "conversations"))
        print(
            f"questions   {len(questions)} of {len(collection.questions)}: the others' wording occurs in the self-study"
        )
        if len(questions) < 40:
            raise RunError(f"only {len(questions)} questions are left, too few to measure")
        predictions = run_arms(
            model,
            store,
            collection,
            questions,
            ARMS,
            seed=config.seed,
            progress=common.log_arm,
        )
    run = write_run(
        folder / "results",
        name="demo_real",
        command=command,
        seeds=[config.seed],
        model=model.source.name,
        collection={"name": "examples", "sha256": collection.hash},
        settings={k: v for k, v in asdict(settings).items() if k != "store"},
        predictions=predictions,
        compare=[("oracle", "no_context"), ("loaded", "no_context"), ("full_document", "oracle")],
        metric_names=list(METRICS),
        extra_metrics={
            "self_study_and_training_s": common.single_measurement(trained - started),
            "wall_s": common.single_measurement(time.monotonic() - started),
            "peak_anonymous_bytes": common.single_measurement(memory.peak),
        },
        keep_answers=True,
    )
    print("\n" + table(run, [str(arm) for arm in ARMS], ["contains", "f1", "log_perplexity"]) + "\n")
    common.show_answers(Answerer(model, store), questions)
    rows = store.rows().values()
    common.write_summary(
        folder,
        {
            "documents": len(rows),
            "tokens": sum(r.tokens for r in rows),
            "pool": settings.pool,
            "cartridge_tokens": settings.tokens,
            "wall_s": round(time.monotonic() - started, 1),
            "peak_anonymous_bytes": memory.peak,
            "questions": len(questions),
            "accuracy": {str(arm): run["metrics"][f"{arm}.contains"]["mean"] for arm in ARMS},
        },
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
