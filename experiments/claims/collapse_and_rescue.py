"""The main claims of 2606.04557 on worlds: isolated cartridges collapse when loaded together, joint training helps.

    python -m experiments.collapse_and_rescue --documents 64 --seeds 0 1 2 --output DIR

Every seed has a world of its own, one self-study, and all trainings, each at its best learning rate on validation
questions. ``joint_first`` and ``isolated_first``: cartridges initialized with the document's first tokens, as in the
paper, trained on equal tokens. ``paper``: the isolated ones at ``offset`` positions. ``joint`` and ``isolated``: with
attention-matching initialization (``cas/training/initialization.py``), on fewer tokens, again equal. ``start``: this
initialization, untrained. ``monolithic``: one cartridge with the positions of four. ``monolithic16``: one for sixteen
documents with as many positions as their sixteen cartridges. Validation questions are of all kinds and ask nothing that
a test question asks. Every part resumes by the same command.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, get_args

from cas import console
from cas.errors import ConfigError
from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm, Retriever
from cas.options import READER, parse
from experiments import common
from experiments.claims.collapse_trainings import (
    MONOLITHIC,
    OTHERS,
    TRAININGS,
    Config,
    K,
    base_store,
    chosen_rate,
    sixteen,
    trainer_for,
    world_of,
)

if TYPE_CHECKING:
    from cas.data.collection import Collection, Question
    from cas.evaluation.recording import Prediction
    from cas.model.frozen import FrozenModel
    from cas.store.store import Store
    from retrieval import Embedder

LOADED, HYBRID = Arm("loaded", OTHERS), Arm("retrieved", K, retriever="hybrid")
FOUR = (ORACLE, LOADED, replace(LOADED, others="nearest"), HYBRID)
# Arms of every training, and those of the text. All are asked the same questions.
ARMS: dict[str, tuple[Arm, ...]] = {
    "start": (ORACLE, LOADED),
    "joint": (*FOUR[:3], replace(LOADED, order="reversed"), Arm("absent", OTHERS), HYBRID, Arm("retrieved", K)),
    "isolated": FOUR,
    "joint_first": FOUR,
    "isolated_first": FOUR,
    "paper": (ORACLE, LOADED),
    **dict.fromkeys(MONOLITHIC, (Arm("loaded"),)),
}
TEXT = (NO_CONTEXT, FULL_DOCUMENT)
TEXTS = "text"  # the name of that part of the work
# Ends of the names of arms with a part of the questions, and the arms that are split like this.
PARTS = ("_lookup", "_indirect", "_whole_document", "_two_documents", "_thirds", "_sixteen")
IN_PARTS = ("joint_retrieved4", "rag")
# The claims: the bound of the 95 % interval is at least, or at most, a limit.
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
        trained[str(seed)], answers = one_seed(config, model, seed)
        predictions += answers
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


def validation(config: Config, seed: int, count: int = 256) -> list[Question]:
    """Questions of this world that no test question asks, in any wording; they have wordings of test questions, and as
    large shares of every kind."""
    from cas.data.collection import Question
    from cas.data.worlds import INDIRECT, LOOKUP, TWO, WHOLE, Shape, make_records, single, two, whole

    number = config.collection_seed + seed
    tested = {
        (i, q.question) for q in world_of(replace(config, questions=None), seed).questions for i in q.document_ids
    }
    random, by_kind = Random(f"validation/{seed}"), dict[str, list[Question]]()
    for group in range(config.documents // 2):
        records = list(make_records(f"world/{number}", group, Shape()))
        for record, other in zip(records, reversed(records), strict=True):
            i = record.document.id
            for n, asked in enumerate([*single(record), *whole(record, random), *two(record, other)]):
                if not any((i, wording) in tested for wording in asked.tests):
                    ids = (i, other.document.id) if asked.kind == TWO else (i,)
                    wording = asked.tests[n % len(asked.tests)]
                    question = Question(f"{i}/v{n:02d}", ids, wording, (asked.answer,), None, asked.kind)
                    by_kind.setdefault(asked.kind, []).append(question)
    shares = {LOOKUP: count // 2, INDIRECT: count // 4, WHOLE: count // 8, TWO: count // 8}
    return [q for kind, share in shares.items() for q in random.sample(by_kind[kind], min(share, len(by_kind[kind])))]


def one_seed(config: Config, model: FrozenModel, seed: int) -> tuple[dict[str, Any], list[Prediction]]:
    """What was trained for a seed, and the answers under every arm."""
    from cas.evaluation.answers import CachingEmbedder, run_arms, unseen_questions
    from cas.evaluation.resume import cached_json, write
    from cas.selfstudy.conversations import Conversations
    from cas.selfstudy.synthesize import SelfStudy, synthesize
    from cas.training.initialization import initialize_cartridges
    from retrieval import SentenceEmbedder

    folder = Path(config.output) / f"seed-{seed}"
    answers_file, record_file = folder / "predictions.json", folder / "trained.json"
    if answers_file.exists():
        return json.loads(record_file.read_text()), json.loads(answers_file.read_text())
    collection, checked = world_of(config, seed), validation(config, seed)
    record: dict[str, Any] = {}
    predictions: list[Prediction] = []
    with base_store(config, model, seed) as base:
        study = SelfStudy(conversations=config.conversations, seed=seed, keep_going=True)
        conversations = synthesize(model, collection, base, study, progress=common.counter("self-study"))
        questions = unseen_questions(collection.questions, conversations)
        embedder = CachingEmbedder(SentenceEmbedder())
        run_all = partial(run_arms, model, embedder=embedder, seed=seed, progress=common.log_arm)
        initialize_cartridges(model, base, conversations, progress=common.counter("initialization"))
        record |= {"conversations": len(conversations), "documents": len(collection)}
        if not config.only or TEXTS in config.only:
            search = partial(best_chunks, model, base, collection, checked, embedder)
            best, scores = cached_json(folder / "rag.json", search)
            record["rag"] = {"best": best, "validation": scores}
            texts = partial(run_all, base, collection, questions, [*TEXT, Arm.parse(best)])
            predictions += cached_json(folder / "text.json", texts)
            untrained = partial(run_all, base, collection, questions, ARMS["start"], prefix="start_")
            predictions += cached_json(folder / "start.json", untrained)

    def train_and_answer(name: str) -> dict[str, Any]:
        """What a training cost, and the answers of its arms."""
        trained, its_conversations, its_questions = collection, conversations, questions
        if name in MONOLITHIC:
            trained = collection if name == "monolithic" else collection.select(sixteen(collection))
            ids = {d.id for d in trained.documents}
            items = [c for d in trained.documents for c in conversations.by_document.get(d.id, ())]
            its_conversations = Conversations([replace(c, document="collection") for c in items], {})
            its_questions = [q for q in questions if {*q.document_ids} <= ids]
            trained = trained.merged()
        lr = chosen_rate(config, model, collection, trained, its_conversations, name, checked, seed)
        trainer = trainer_for(config, model, trained, its_conversations, name, lr, seed)
        with closing(trainer.store) as store:
            cost = common.train(trainer, f"seed {seed}, {name}, lr {lr:g}") | {"lr": lr}
            answers = run_all(store, collection, its_questions, ARMS[name], prefix=f"{name}_")
            return {"took": cost, "answers": answers}

    for name in (name for name in [*TRAININGS, *MONOLITHIC] if not config.only or name in config.only):
        part = cached_json(folder / f"{name}.json", partial(train_and_answer, name))
        record[name] = part["took"]
        predictions += part["answers"]
    if config.only:
        return record, []
    predictions = rename_arms(predictions, questions, sixteen(collection), seed)
    write(record_file, record)
    write(answers_file, predictions)
    return record, predictions


def rename_arms(
    predictions: Sequence[Prediction], questions: Sequence[Question], few: Sequence[str], seed: int
) -> list[Prediction]:
    """The predictions under the names of the claims.

    Those of IN_PARTS are repeated by kind of question, pooled over equal thirds of the kinds that one document answers,
    and about the ``few`` documents.
    """
    kinds = {q.id: q.kind or "" for q in questions}
    single = [k for k in dict.fromkeys(kinds.values()) if k != "two documents"]
    least = min(sum(k == kind for k in kinds.values()) for kind in single)
    third = {
        i
        for kind in single
        for i in Random(f"thirds/{seed}").sample(sorted(i for i, k in kinds.items() if k == kind), least)
    }
    sixteenth = {q.id for q in questions if {*q.document_ids} <= {*few}}
    renamed: list[Prediction] = []
    for p in predictions:
        name, question = claimed_name(Arm.parse(p["arm"])), p["question_id"]
        parts = [""]
        if name in IN_PARTS:
            parts.append(f"_{kinds[question].replace(' ', '_')}")
            parts += ["_thirds"] * (question in third) + ["_sixteen"] * (question in sixteenth)
        renamed += [{**common.with_seed(p, seed), "arm": f"{name}{part}"} for part in parts]
    return renamed


def claimed_name(arm: Arm) -> str:
    """An arm under the name that the claims have for it."""
    if arm.kind == "rag":
        return "rag"
    if arm.training in MONOLITHIC:
        return arm.training
    if arm.kind == "retrieved" and arm.retriever == "vectors":
        return f"{arm}_dense"
    return str(replace(arm, retriever="vectors"))


def best_chunks(
    model: FrozenModel, store: Store, collection: Collection, questions: Sequence[Question], embedder: Embedder
) -> tuple[str, dict[str, float]]:
    """The name of the RAG arm (words of a chunk, retriever) that answers most validation questions, and the share of
    each."""
    from cas.evaluation.answers import run_arms

    shares = {}
    for arm in (Arm("rag", size=words, retriever=by) for words in (20, 40, 80, 160) for by in get_args(Retriever)):
        answers = run_arms(model, store, collection, questions, [arm], embedder=embedder)
        shares[str(arm)] = sum(p["scores"]["exact_match"] for p in answers) / len(answers)
    return max(shares, key=lambda arm: shares[arm]), shares


if __name__ == "__main__":
    sys.exit(main())
