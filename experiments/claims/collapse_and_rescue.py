"""Isolated cartridges collapse when they are loaded together, joint training rescues them: the claims of 2606.04557, on worlds.

    python -m experiments.collapse_and_rescue --documents 64 --seeds 0 1 2 --output DIR

For every seed, a world of its own and everything trained anew, each at the learning rate that serves it best on validation
questions, from one self-study. ``joint_first`` and ``isolated_first``: cartridges that start as the document's first tokens, as in the
paper, on equal tokens; ``paper``, the isolated ones at ``offset`` positions. ``joint`` and ``isolated``: the same from matched starts
(``cas/matching.py``) on fewer tokens, equal again; ``start``: these starts untrained. ``monolithic``, one cartridge of as
many positions as four; and ``monolithic16``, one for sixteen documents that has as many positions as their sixteen. Validation
questions are such as no test question asks, of all kinds. Every part resumes by the same command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cas import console
from cas.config import READER, parse
from cas.errors import ConfigError

if TYPE_CHECKING:
    from cas.data.collection import Collection, Question
    from cas.evaluation.recording import Prediction
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.store.store import Store
    from cas.training.trainer import Trainer
    from retrieval import Embedder

K = 4  # cartridges that are retrieved
OTHERS = 10  # cartridges that are loaded together
SIXTEEN = 16  # documents of the smaller monolithic cartridge
MONOLITHIC = {"monolithic": K, "monolithic16": SIXTEEN}  # and as many positions as so many cartridges
# What is trained: positions, whether conversations see others too, and the start.
TRAININGS = {
    "joint": ("fixed", True, "matched"),
    "isolated": ("fixed", False, "matched"),
    "joint_first": ("fixed", True, "first"),
    "isolated_first": ("fixed", False, "first"),
    "paper": ("offset", False, "first"),
}
# Arms of a training, and those of the text. The same questions are asked under all.
ASKED = {
    "start": ("oracle", "loaded10"),
    "joint": (
        *("oracle", "loaded10", "loaded10_nearest", "loaded10_reversed", "absent10"),
        *("retrieved4_hybrid", "retrieved4"),
    ),
    "isolated": ("oracle", "loaded10", "loaded10_nearest", "retrieved4_hybrid"),
    "joint_first": ("oracle", "loaded10", "loaded10_nearest", "retrieved4_hybrid"),
    "isolated_first": ("oracle", "loaded10", "loaded10_nearest", "retrieved4_hybrid"),
    "paper": ("oracle", "loaded10"),
}
TEXT = ("no_context", "full_document")
TEXTS = "text"  # the name of that part of the work
# Ends of the names of arms that hold some questions alone, and the arms that are looked at so.
PARTS = ("_lookup", "_indirect", "_whole_document", "_two_documents", "_thirds", "_sixteen")
IN_PARTS = ("joint_retrieved4", "rag")
# What must be shown, on the bound of the 95 % interval: the least of a figure, or the most.
CLAIMS: tuple[tuple[str, str, float], ...] = (
    ("full_document", "least", 85),
    ("no_context", "most", 10),
    ("joint_first_loaded10_minus_isolated_first_loaded10", "least", 20),
    ("joint_loaded10_minus_isolated_loaded10", "least", 20),
    ("joint_oracle_minus_isolated_oracle", "least", -3),
    ("joint_oracle_minus_joint_loaded10", "most", 3),
    ("full_document_minus_joint_oracle", "most", 4),
    ("joint_retrieved4_minus_monolithic", "least", 10),
    ("joint_retrieved4_sixteen_minus_monolithic16", "least", 10),
    ("joint_retrieved4_minus_rag", "least", -2),
    ("joint_retrieved4_thirds_minus_rag_thirds", "least", -2),
    ("joint_absent10_minus_no_context", "most", 5),
)


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
    """Passes over all conversations, from matched starts."""
    first_epochs: float = 10.0
    """Passes from the first tokens."""
    lrs: tuple[float, ...] = (0.02, 0.05, 0.1)
    """Learning rates to choose from, on the first seed."""
    search_share: float = 0.125
    """Share of a training's passes that a trial has."""
    isolation: float = 0.5
    """Share of conversations that see their own cartridge alone in joint training."""
    pool: int = 32
    """Cartridges in training at a time."""
    targets: int = 32
    """Of these, cartridges that a step trains: many keep a GPU busy, and what each is shown stays the same."""
    guests: int = 0
    """Read-only cartridges among the distractors."""
    questions: int | None = None
    """Ask so many test questions a seed; default all."""
    only: tuple[str, ...] = ()
    """Do these parts of the seeds' work alone and stop, so that several processes can share it: text (arms that need no
    training), or names of trainings."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment. Returns the exit status."""
    return console.run(lambda: experiment(parse(Config, "python -m experiments.collapse_and_rescue", arguments)))


def experiment(config: Config) -> int:
    """Train and ask under every arm, seed by seed; write the results, print tables and verdicts."""
    from cas.evaluation.recording import flags, table, write_run
    from cas.evaluation.resume import check_settings
    from cas.model.frozen import FrozenModel

    if config.documents < 2 * OTHERS or config.documents % 2:
        raise ConfigError(f"--documents {config.documents}: an even number of at least {2 * OTHERS}")
    if unknown := sorted({*config.only} - {TEXTS, *TRAININGS, *MONOLITHIC}):
        raise ConfigError(f"--only {' '.join(unknown)}: choose from {', '.join([TEXTS, *TRAININGS, *MONOLITHIC])}")
    check_settings(Path(config.output), settings_of(config))
    model = FrozenModel.from_pretrained(config.model)
    predictions: list[Prediction] = []
    trained: dict[str, Any] = {}
    for seed in config.seeds:
        trained[str(seed)], found = one_seed(config, model, seed)
        predictions += found
    if config.only:
        return 0
    arms = list(dict.fromkeys(p["arm"] for p in predictions))
    plain = [arm for arm in arms if not arm.endswith(PARTS)]
    pairs = [(a, b) for a, minus, b in (name.partition("_minus_") for name, _, _ in CLAIMS) if minus]
    pairs += [(f"joint_retrieved4{part}", f"rag{part}") for part in PARTS]
    pairs += [("joint_loaded10", "joint_loaded10_reversed")]
    run = write_run(
        Path(config.output) / "results",
        name="collapse_and_rescue",
        command="python -m experiments.collapse_and_rescue " + flags(config),
        seeds=list(config.seeds),
        model="embedded reader" if config.model == READER else model.source.name,
        collection={"name": "million_tokens", "sha256": world_of(config, config.seeds[0]).hash},
        settings={k: v for k, v in asdict(config).items() if k not in ("output", "only")} | {"trained": trained},
        predictions=predictions,
        metric_names=["exact_match"],
        compare=list(dict.fromkeys(pairs)),
        keep_answers=config.model == READER,
    )
    print(table(run, plain, ["exact_match"]))
    print(table(run, [f"{arm}{part}" for part in PARTS for arm in ("joint_retrieved4", "rag")], ["exact_match"]))
    for name, side, limit in CLAIMS:
        figure = run["metrics"][f"{name}.exact_match"]
        bound = figure["low" if side == "least" else "high"]
        met = bound >= limit if side == "least" else bound <= limit
        interval = f"{figure['mean']:.1f} [{figure['low']:.1f}, {figure['high']:.1f}]"
        print(f"{'shown    ' if met else 'NOT SHOWN'}  {name}: {interval}, at {side} {limit:g}")
    return 0


def settings_of(config: Config) -> dict[str, Any]:
    """What must stay the same in a folder; more seeds may come later, but rates are chosen on the first."""
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "seeds", "only")}
    return settings | {"first_seed": config.seeds[0]}


def world_of(config: Config, seed: int) -> Collection:
    """The documents of a seed, with their test questions."""
    from cas.data.worlds import world

    found = world(config.collection_seed + seed, config.documents)
    if config.questions is None:
        return found
    some = Random(seed).sample(found.questions, min(config.questions, len(found.questions)))
    return replace(found, questions=tuple(sorted(some, key=lambda q: q.id)))


def validation(config: Config, seed: int, most: int = 256) -> list[Question]:
    """Questions that no test question of this world asks, whatever the words, in wordings of test questions; of every kind as
    large a share as in the tests."""
    from cas.data.collection import Question
    from cas.data.worlds import INDIRECT, LOOKUP, TWO, WHOLE, Shape, make_records, single, two, whole

    number = config.collection_seed + seed
    tested = {
        (i, q.question) for q in world_of(replace(config, questions=None), seed).questions for i in q.document_ids
    }
    random, found = Random(f"validation/{seed}"), dict[str, list[Question]]()
    for group in range(config.documents // 2):
        records = list(make_records(f"world/{number}", group, Shape()))
        for record, other in zip(records, reversed(records), strict=True):
            i = record.document.id
            for n, asked in enumerate([*single(record), *whole(record, random), *two(record, other)]):
                if not any((i, wording) in tested for wording in asked.tests):
                    ids = (i, other.document.id) if asked.kind == TWO else (i,)
                    wording = asked.tests[n % len(asked.tests)]
                    question = Question(f"{i}/v{n:02d}", ids, wording, (asked.answer,), None, asked.kind)
                    found.setdefault(asked.kind, []).append(question)
    shares = {LOOKUP: most // 2, INDIRECT: most // 4, WHOLE: most // 8, TWO: most // 8}
    return [q for kind, share in shares.items() for q in random.sample(found[kind], min(share, len(found[kind])))]


def one_seed(config: Config, model: FrozenModel, seed: int) -> tuple[dict[str, Any], list[Prediction]]:
    """What was trained for a seed, and the answers under every arm."""
    from cas.evaluation.arms import CachingEmbedder, run_arms, unseen
    from cas.evaluation.resume import cached_json, write
    from cas.selfstudy.conversations import Conversations
    from cas.selfstudy.synthesize import SelfStudy, synthesize
    from cas.training.initialization import initialize_cartridges
    from experiments.claims.joint_vs_isolated import log_arm
    from retrieval import SentenceEmbedder

    folder = Path(config.output) / f"seed-{seed}"
    answers = folder / "predictions.json"
    record = folder / "trained.json"
    if answers.exists():
        return json.loads(record.read_text()), json.loads(answers.read_text())
    collection, checked = world_of(config, seed), validation(config, seed)
    study = SelfStudy(conversations=config.conversations, seed=seed)
    with base_store(config, model, seed) as base:
        conversations = synthesize(model, collection, base, study, progress=shown("self-study"))
        questions, embedder = unseen(collection.questions, conversations), CachingEmbedder(SentenceEmbedder())
        asking = partial(run_arms, model, embedder=embedder, seed=seed, progress=log_arm)
        initialize_cartridges(model, base, conversations, progress=shown("starts"))
        found: dict[str, Any] = {"conversations": len(conversations), "documents": len(collection)}
        predictions: list[Prediction] = []
        if not config.only or TEXTS in config.only:
            best, scores = cached_json(
                folder / "rag.json", partial(best_chunks, model, base, collection, checked, embedder)
            )
            found["rag"] = {"best": best, "validation": scores}
            predictions += cached_json(
                folder / "text.json", partial(asking, base, collection, questions, [*TEXT, best])
            )
            starts = partial(asking, base, collection, questions, ASKED["start"], prefix="start_")
            predictions += cached_json(folder / "start.json", starts)

    def trained_and_asked(arm: str) -> dict[str, Any]:
        """What training an arm took, and its answers."""
        about, told, some, arms = collection, conversations, questions, ASKED.get(arm, ("loaded",))
        if arm in MONOLITHIC:
            about = collection if arm == "monolithic" else collection.select(sixteen(collection))
            items = [c for d in about.documents for c in conversations.by_document.get(d.id, ())]
            told = Conversations([replace(c, document="collection") for c in items], {})
            some = [q for q in questions if {*q.document_ids} <= {d.id for d in about.documents}]
            about = about.merged()
        lr = chosen_rate(config, model, collection, about, told, arm, checked, seed)
        trainer = trainer_for(config, model, about, told, arm, lr, seed)
        with closing(trainer.store) as store:
            took = train(trainer, f"seed {seed}, {arm}, lr {lr:g}") | {"lr": lr}
            return {"took": took, "answers": asking(store, collection, some, arms, prefix=f"{arm}_")}

    for arm in (arm for arm in [*TRAININGS, *MONOLITHIC] if not config.only or arm in config.only):
        done = cached_json(folder / f"{arm}.json", partial(trained_and_asked, arm))
        found[arm] = done["took"]
        predictions += done["answers"]
    if config.only:
        return found, []
    predictions = named(predictions, questions, sixteen(collection), seed)
    write(record, found)
    write(answers, predictions)
    return found, predictions


def sixteen(collection: Collection) -> list[str]:
    """The documents of the smaller monolithic cartridge."""
    return [d.id for d in collection.documents[:SIXTEEN]]


def named(
    predictions: Sequence[Prediction], questions: Sequence[Question], few: Sequence[str], seed: int
) -> list[Prediction]:
    """The predictions under the names of the claims; those of IN_PARTS once more by kind of question, pooled over equal thirds of
    the kinds that one document answers, and about the ``few`` documents. Ids get the seed: every seed has documents of its own."""
    kinds = {q.id: q.kind or "" for q in questions}
    single = [k for k in dict.fromkeys(kinds.values()) if k != "two documents"]
    least = min(sum(k == kind for k in kinds.values()) for kind in single)
    third = {
        i
        for kind in single
        for i in Random(f"thirds/{seed}").sample(sorted(i for i, k in kinds.items() if k == kind), least)
    }
    sixteenth = {q.id for q in questions if {*q.document_ids} <= {*few}}
    found: list[Prediction] = []
    for p in predictions:
        arm = "rag" if p["arm"].startswith("rag") else p["arm"]
        arm = arm.removesuffix("_hybrid") if arm.endswith("_hybrid") else arm.replace("retrieved4", "retrieved4_dense")
        arm = arm.removesuffix("_loaded") if arm.startswith("monolithic") else arm
        one: Prediction = {
            **p,
            "question_id": f"{seed}/{p['question_id']}",
            "document_id": f"{seed}/{p['document_id']}",
            "scores": {"exact_match": p["scores"]["exact_match"]},
        }
        parts = [""]
        if arm in IN_PARTS:
            parts.append(f"_{kinds[p['question_id']].replace(' ', '_')}")
            parts += ["_thirds"] * (p["question_id"] in third) + ["_sixteen"] * (p["question_id"] in sixteenth)
        found += [{**one, "arm": f"{arm}{part}"} for part in parts]
    return found


# -- training -----------------------------------------------------------------------------------------------------------


def open_store(
    folder: Path,
    model: FrozenModel,
    config: Config,
    positions: str,
    seed: int,
    tokens: int | None = None,
    initialisation: str = "first",
) -> Store:
    """A store of this experiment, made if it is not there."""
    from cas.store.store import Store

    if Store.exists(folder):
        return Store.open(folder, write=True)
    tokens = tokens or config.tokens
    ratio = None if tokens else config.ratio
    return Store.create(
        folder, model, ratio=ratio, tokens=tokens, positions=positions, initialisation=initialisation, seed=seed
    )


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
    """A trainer of one arm on a store of its own, whose cartridges have their start. ``share``: of the passes."""
    from cas.training.trainer import Trainer, Training

    positions, joint, start = TRAININGS.get(arm, ("fixed", False, "first"))
    epochs = share * (config.epochs if start == "matched" else config.first_epochs)
    folder = Path(config.output) / f"seed-{seed}" / f"{arm}-lr{lr:g}-epochs{epochs:g}"
    many = MONOLITHIC.get(arm)
    tokens = many * span(model, config, seed) if many else None
    store = open_store(folder, model, config, positions, seed, tokens, start)
    store.add_documents(collection, model.count_tokens)
    if start == "matched":
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


def span(model: FrozenModel, config: Config, seed: int) -> int:
    """Positions of the largest cartridge of a seed's collection."""
    with base_store(config, model, seed) as base:
        return base.layout.span


def shown(what: str) -> Callable[[int, int], None]:
    """A counter on stderr."""
    return lambda done, wanted: print(f"\r{what}  {done}/{wanted} ", end="", file=sys.stderr, flush=True)


def base_store(config: Config, model: FrozenModel, seed: int) -> closing[Store]:
    """The store with a seed's self-study and, once there is one, the matched starts."""
    folder = Path(config.output) / f"seed-{seed}" / "base"
    return closing(open_store(folder, model, config, "fixed", seed, initialisation="matched"))


def train(trainer: Trainer, title: str) -> dict[str, Any]:
    """Train to the end; what it took."""
    from experiments.claims.joint_vs_isolated import progress

    progress(trainer, title)
    rows = trainer.store.rows().values()
    return {
        "steps": trainer.steps,
        "trained_tokens": sum(r.trained_tokens for r in rows),
        "adam_steps_each": sum(r.steps for r in rows) / len(rows),
        "conversations_shown_each": sum(r.drawn for r in rows) / len(rows),
        "positions_each": sum(r.p for r in rows) / len(rows),
    }


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
    """The learning rate that answers most validation questions of the first seed with ten loaded (or the one there is), by short
    trainings of ``trained``."""
    from cas.evaluation.arms import run_arms
    from cas.evaluation.resume import write

    record = Path(config.output) / f"rates-{arm}.json"
    found: dict[str, float] = json.loads(record.read_text()) if record.exists() else {}
    asked = [q for q in questions if arm != "monolithic16" or {*q.document_ids} <= {*sixteen(collection)}]
    for lr in config.lrs if len(config.lrs) > 1 else ():
        if f"{lr:g}" not in found:
            assert seed == config.seeds[0]
            trainer = trainer_for(config, model, trained, conversations, arm, lr, seed, config.search_share)
            train(trainer, f"trial of {arm}, lr {lr:g}")
            loaded = "loaded" if arm.startswith("monolithic") else "loaded10"
            answers = run_arms(model, trainer.store, collection, asked, [loaded])
            trainer.store.close()
            found[f"{lr:g}"] = sum(p["scores"]["exact_match"] for p in answers) / len(answers)
            write(record, found)
            print(f"{arm}, lr {lr:g}: {found[f'{lr:g}']:.3f} of validation questions", flush=True)
    return max(config.lrs, key=lambda lr: found.get(f"{lr:g}", 0.0))


def best_chunks(
    model: FrozenModel, store: Store, collection: Collection, questions: Sequence[Question], embedder: Embedder
) -> tuple[str, dict[str, float]]:
    """The RAG arm (words of a chunk, retrieval) that answers most validation questions, and the share of each."""
    from cas.evaluation.arms import run_arms

    scores = {}
    for arm in (f"rag{words}{how}" for words in (20, 40, 80, 160) for how in ("", "_hybrid")):
        answers = run_arms(model, store, collection, questions, [arm], embedder=embedder)
        scores[arm] = sum(p["scores"]["exact_match"] for p in answers) / len(answers)
    return max(scores, key=lambda arm: scores[arm]), scores


if __name__ == "__main__":
    sys.exit(main())
