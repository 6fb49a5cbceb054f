"""Whether joint training rescues co-loaded cartridges: joint and isolated training on equal tokens, each at its best
rate.

Both arms train the same documents on the same conversations for the same number of steps; ``isolated`` always shows a
cartridge alone. Learning rates are chosen on self-study conversations held out from training, never on test questions.

    python -m experiments.joint_vs_isolated --collection fairytaleqa --prefix val/ --shortest 8 --ratio 8 --output DIR

Every part resumes; ``--train joint`` (or ``isolated``) runs the training of that arm alone, so that two processes can
share a machine, and the command without it measures.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cas import console
from cas.errors import ConfigError
from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm
from cas.options import Flag, parse
from experiments import common

if TYPE_CHECKING:
    from cas.data.collection import Collection, Document, Question
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.training.trainer import Trainer

ARMS = (ORACLE, Arm("loaded"), Arm("retrieved", 4))
TEXT_ARMS = (NO_CONTEXT, FULL_DOCUMENT, Arm("rag"))


@dataclass(frozen=True)
class Config:
    """Joint against isolated training on one collection."""

    output: str = "runs/joint_vs_isolated"
    """Folder of stores and results."""
    collection: str = "fairytaleqa"
    """The collection, with questions."""
    prefix: str = ""
    """Only documents whose id starts with this."""
    shortest: int = 8
    """How many of these, the shortest first."""
    excerpt_words: int | None = None
    """Of each document only its first paragraphs, up to this number of words, with the questions about them."""
    ratio: float = 8.0
    """Document tokens per cartridge position."""
    conversations: int = 1400
    """Self-study conversations; a tenth is held out to choose the learning rate."""
    lrs: tuple[float, ...] = (1e-2, 2e-2, 4e-2)
    """Learning rates to choose from."""
    search_epochs: float = 2.0
    """Passes of a trial."""
    epochs: float = 8.0
    """Passes of the training."""
    isolation: float = 0.5
    """Of the joint arm."""
    positions: Literal["fixed", "offset", "sequential"] = "fixed"
    """Positions of both arms."""
    pool: int = 4
    """Cartridges in training at a time."""
    targets: int = 4
    """Cartridges that one step trains."""
    per_target: int = 6
    """Conversations of each."""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """The frozen model."""
    seed: int = 0
    """Seed of everything random."""
    train: Literal["joint", "isolated", "both", "none"] = "both"
    """Which arm to train now; joint and isolated alone do not measure."""
    only_lr: float | None = None
    """Skip the search and train with this rate."""
    keep_answers: Flag = False
    """Record the answers too; only for texts that may be published."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment. Returns the exit status."""
    return console.run(lambda: experiment(parse(Config, "python -m experiments.joint_vs_isolated", arguments)))


def experiment(config: Config) -> int:
    """Self-study, search, training, measurement."""
    from cas.data.collection import Collection
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.synthesize import SelfStudy, synthesize

    documents = shortest(Collection.load(config.collection), config.shortest, config.prefix)
    if config.excerpt_words is not None:
        documents = excerpts(documents, config.excerpt_words)
    model = FrozenModel.from_pretrained(config.model)
    base = Path(config.output) / "base"
    store = common.open_store(base, model, ratio=config.ratio, positions=config.positions, seed=config.seed)
    everything = synthesize(
        model,
        documents,
        store,
        SelfStudy(conversations=config.conversations, seed=config.seed, keep_going=True),
        progress=lambda done, total: print(f"self-study  {done}/{total}", file=sys.stderr, flush=True),
    )
    store.close()
    training, held_out = split(everything)
    arms = {"joint": ("joint",), "isolated": ("isolated",), "both": ("joint", "isolated"), "none": ()}[config.train]
    for arm in arms:
        train(config, model, documents, training, held_out, arm)
    return measure(config, model, documents, everything) if config.train in ("both", "none") else 0


def shortest(collection: Collection, count: int, prefix: str = "") -> Collection:
    """The shortest documents whose ids begin with ``prefix``, at most ``count``. Raises: ConfigError if there are none."""
    wanted = (d for d in collection.documents if d.id.startswith(prefix))
    chosen = sorted(wanted, key=lambda d: (len(d.text), d.id))[:count]
    if not chosen:
        raise ConfigError(f"--prefix {prefix}: no document of {collection.name} has such an id")
    return collection.select([d.id for d in chosen])


def excerpts(collection: Collection, words: int) -> Collection:
    """Every document's first paragraphs (blank lines between), at most ``words`` words but at least one paragraph, and
    the questions about them.

    Where questions stand in the order of the paragraphs they ask about, as in SQuAD, those before the first whose
    answers do not stand in the excerpt are about it.
    """
    from cas.selfstudy.seed_prompts import normal

    documents: list[Document] = []
    questions: list[Question] = []
    for document in collection.documents:
        paragraphs: list[str] = []
        for paragraph in document.text.split("\n\n"):
            if paragraphs and len(" ".join([*paragraphs, paragraph]).split()) > words:
                break
            paragraphs.append(paragraph)
        documents.append(replace(document, text="\n\n".join(paragraphs)))
        excerpt = normal(documents[-1].text)
        questions += takewhile(
            lambda q, excerpt=excerpt: any(normal(a) in excerpt for a in q.answers),  # type: ignore[misc]
            (q for q in collection.questions if q.document_ids == (document.id,)),
        )
    return replace(collection, documents=tuple(documents), questions=tuple(questions))


def split(conversations: Conversations) -> tuple[Conversations, Conversations]:
    """Every tenth conversation of a document is held out."""
    from cas.selfstudy.conversations import Conversations

    items = [(i, c) for per in conversations.by_document.values() for i, c in enumerate(per)]
    return Conversations([c for i, c in items if i % 10], {}), Conversations([c for i, c in items if not i % 10], {})


def trainer_for(
    config: Config,
    model: FrozenModel,
    documents: Collection,
    training: Conversations,
    arm: str,
    lr: float,
    epochs: float,
) -> Trainer:
    """A trainer on this arm's own store."""
    from cas.training.trainer import Trainer, Training

    folder = Path(config.output) / f"{arm}-lr{lr:g}-epochs{epochs:g}"
    store = common.open_store(folder, model, ratio=config.ratio, positions=config.positions, seed=config.seed)
    store.add_documents(documents, model.count_tokens)
    settings = Training(
        epochs=epochs,
        lr=lr,
        pool=config.pool,
        targets=config.targets,
        per_target=config.per_target,
        guests=len(documents) - config.pool,
        isolation=config.isolation if arm == "joint" else 1.0,
        max_distractors=len(documents) - 1,
        seed=config.seed,
    )
    return Trainer(model, store, training, settings)


def train(
    config: Config,
    model: FrozenModel,
    documents: Collection,
    training: Conversations,
    held_out: Conversations,
    arm: str,
) -> None:
    """Choose the arm's learning rate by short trials, then train with it; writes ``<arm>.json``."""
    import torch

    from cas.evaluation.resume import write

    record = Path(config.output) / f"{arm}.json"
    trials: dict[str, dict[str, float]] = json.loads(record.read_text())["trials"] if record.exists() else {}
    rates = (config.only_lr,) if config.only_lr is not None else config.lrs
    for lr in rates if len(rates) > 1 else ():
        if f"{lr:g}" in trials:
            continue
        trainer = trainer_for(config, model, documents, training, arm, lr, config.search_epochs)
        common.train(trainer, f"{arm} trial lr {lr:g}")
        trials[f"{lr:g}"] = held_out_loss(trainer, held_out)
        trainer.store.close()
        write(record, {"trials": trials})
        print(f"{arm} lr {lr:g}: held-out loss {trials[f'{lr:g}']}", flush=True)
    # Chosen with all cartridges loaded, which is what is compared: the isolated arm too gets its best rate there.
    best = float(min(trials, key=lambda r: trials[r]["loaded"])) if trials else float(rates[0] or 0)
    trainer = trainer_for(config, model, documents, training, arm, best, config.epochs)
    cost = common.train(trainer, f"{arm} lr {best:g}")
    with torch.no_grad():
        final = held_out_loss(trainer, held_out)
    write(
        record,
        {
            "trials": trials,
            "lr": best,
            "store": trainer.store.folder.name,
            "held_out": final,
            "trained_tokens": cost["trained_tokens"],
            "steps": cost["steps"],
        },
    )
    print(f"{arm} lr {best:g}: {cost['trained_tokens']:,} tokens, held-out loss {final}", flush=True)
    trainer.store.close()


def held_out_loss(trainer: Trainer, held_out: Conversations) -> dict[str, float]:
    """Distillation loss (nats per token) on held-out conversations, alone and with all cartridges loaded."""
    import torch

    names = list(trainer.store.rows())
    kv = {name: trainer.store.cartridge(name).to(trainer.model.device) for name in names}
    items = [c for per in held_out.by_document.values() for c in per]
    losses: dict[str, float] = {}
    for key in ("oracle", "loaded"):
        total = count = 0.0
        for start in range(0, len(items), 16):
            part = items[start : start + 16]
            with torch.no_grad():
                loss, _ = trainer.loss(part, [(c.document,) if key == "oracle" else tuple(names) for c in part], kv)
            rows = sum(len(c.answer) for c in part)
            total, count = total + float(loss) * rows, count + rows
        losses[key] = round(total / count, 5)
    return losses


def measure(config: Config, model: FrozenModel, documents: Collection, conversations: Conversations) -> int:
    """Answer the questions under every arm, write the results and print the tables."""
    from cas.evaluation.answers import run_arms, unseen_questions
    from cas.evaluation.metrics import METRICS
    from cas.evaluation.recording import flags, table, write_run
    from cas.store.store import Store

    records = {}
    for arm in ("joint", "isolated"):
        file = Path(config.output) / f"{arm}.json"
        records[arm] = json.loads(file.read_text()) if file.exists() else {}
        if "store" not in records[arm]:
            raise ConfigError(f"the {arm} arm is not trained yet; run the same command with --train {arm}")
    questions = unseen_questions(documents.questions, conversations)
    print(
        f"{len(questions)} of {len(documents.questions)} questions: the others' wording occurs in the self-study",
        flush=True,
    )
    predictions = []
    for arm, record in records.items():
        store: Store = Store.open(Path(config.output) / record["store"])
        run_questions = partial(run_arms, model, store, documents, questions, seed=config.seed, progress=common.log_arm)
        predictions += run_questions(TEXT_ARMS) if arm == "joint" else []
        predictions += run_questions(ARMS, prefix=f"{arm}_")
        store.close()
    run = write_run(
        Path(config.output) / "results",
        name="joint_vs_isolated",
        command="python -m experiments.joint_vs_isolated " + flags(config, "train"),
        seeds=[config.seed],
        model=model.source.name,
        collection={"name": config.collection, "sha256": documents.hash},
        settings={
            **asdict(replace(config, output="DIR")),
            "documents": [d.id for d in documents.documents],
            "arms": records,
        },
        predictions=predictions,
        metric_names=list(METRICS),
        keep_answers=config.keep_answers,
        compare=[
            ("joint_loaded", "isolated_loaded"),
            ("joint_oracle", "isolated_oracle"),
            ("joint_retrieved4", "isolated_retrieved4"),
            ("full_document", "no_context"),
            ("full_document", "joint_oracle"),
            ("joint_oracle", "joint_loaded"),
            ("joint_retrieved4", "rag"),
        ],
    )
    names = [*map(str, TEXT_ARMS), *(f"{training}_{arm}" for training in records for arm in ARMS)]
    print(table(run, names, ["f1", "contains", "log_perplexity"]))
    print(
        table(
            run,
            ["joint_loaded_minus_isolated_loaded", "full_document_minus_no_context"],
            ["f1", "contains", "log_perplexity"],
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
