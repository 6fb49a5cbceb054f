"""Ten pages of technical documentation, a hundred questions, one model: cartridges against text and RAG.

``python -m experiments.technical_docs --output runs/technical_docs -- --ratio 8`` trains ``examples/relay_docs`` by the
ordinary pipeline; what follows ``--`` are options of ``cas.train``. The same command resumes an interrupted run. The
product in the pages is invented, so a model knows no answer without them.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cas import console
from cas.errors import ConfigError, RunError
from cas.evaluation.arms import FULL_DOCUMENT, NO_CONTEXT, ORACLE, Arm
from cas.options import TrainConfig, parse
from experiments import common

if TYPE_CHECKING:
    from cas.data.collection import Collection

PAGES = Path(__file__).parents[2] / "examples" / "relay_docs"
QUESTIONS = PAGES.with_name("relay_docs_questions.jsonl")
ALL_LOADED, RETRIEVED = Arm("loaded"), Arm("retrieved", 4, retriever="hybrid")
RAG = Arm("rag", retriever="hybrid")  # as many tokens as four of the largest cartridges have positions
ARMS = (NO_CONTEXT, FULL_DOCUMENT, RAG, ORACLE, ALL_LOADED, RETRIEVED)
OURS = ("--collection", "--store", "--documents", "--merge", "--span", "--config", "--dry-run")


@dataclass(frozen=True)
class DocsConfig:
    """Train on pages of technical documentation and measure; prints a table. Options of cas.train follow after --."""

    output: str = "runs/technical_docs"
    """The store, with summary.json and the results beside it."""
    pages: int = 10
    """Use only the first so many pages (by name)."""
    questions: int | None = None
    """Ask only so many questions, spread over the pages; default all, ten a page."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the experiment. Returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    cut = words.index("--") if "--" in words else len(words)
    own, flags = words[:cut], words[cut + 1 :]
    return console.run(lambda: experiment(parse(DocsConfig, "python -m experiments.technical_docs", own), flags))


def experiment(config: DocsConfig, flags: Sequence[str]) -> int:
    """Train, evaluate, print, and write ``summary.json``. ``flags``: options of ``cas.train``."""
    from cas.evaluation.answers import run_arms, unseen_questions
    from cas.evaluation.privacy import refuse_private
    from cas.evaluation.recording import flags as given
    from cas.evaluation.resume import cached_json, check_settings
    from cas.model.frozen import FrozenModel
    from cas.selfstudy.conversations import Conversations
    from cas.store.index import load_embedder
    from cas.store.store import Store
    from cas.train import train

    folder, pages = Path(config.output), load_pages(config)
    settings = train_config(config, flags)
    published = {k: v for k, v in asdict(settings).items() if k not in ("store", "collection")}
    refuse_private(published)
    texts = {"sha256": pages.hash, "questions_sha256": hashlib.sha256(QUESTIONS.read_bytes()).hexdigest()}
    asked = {"pages": config.pages, "questions": config.questions, **texts}
    check_settings(folder, {**published, **asked})
    commit = cached_json(folder / "commit.json", current_commit)
    command = " ".join(
        ["python -m experiments.technical_docs", given(config), *(["--", shlex.join(flags)] if flags else [])]
    )
    if status := train(settings, command.replace("DIR", config.output)):
        return status
    with Store.open(Path(str(settings.store))) as store:
        conversations = Conversations.load(store.folder / "conversations")
        questions = unseen_questions(pages.questions, conversations)
        print(f"questions   {len(questions)} of {len(pages.questions)}: the others' wording occurs in the self-study")
        if not questions:
            raise RunError("no question is left; give another seed: -- --seed 1")
        model = FrozenModel.from_store(store, None, None, settings.dtype, settings.device)
        run = partial(run_arms, model, store, pages, questions, embedder=load_embedder(settings.embedder))
        predictions = []
        for arm in ARMS:
            answer = partial(run, [arm], seed=settings.seed, progress=common.log_arm)
            predictions += cached_json(folder / "answers" / f"{arm}.json", answer)
        figures = measurements(store, conversations)
        rows = store.rows().values()
    write_results(
        folder,
        command=command,
        model=model.source.name,
        pages=pages,
        settings={**published, **asked, "commit": commit, "positions_of_pages": {row.id: row.p for row in rows}},
        predictions=predictions,
        figures=figures,
    )
    return 0


def load_pages(config: DocsConfig) -> Collection:
    """The pages that are trained, with the questions that are asked about them."""
    from cas.data.collection import Collection

    pages = Collection.load(PAGES, QUESTIONS).select(config.pages)
    if config.questions is None:
        return pages
    if not 1 <= config.questions <= len(pages.questions):
        raise ConfigError(f"--questions {config.questions}: from 1 to {len(pages.questions)}")
    spread = [len(pages.questions) * i // config.questions for i in range(config.questions)]
    return replace(pages, questions=tuple(pages.questions[i] for i in spread))


def train_config(config: DocsConfig, flags: Sequence[str]) -> TrainConfig:
    """The options of ``cas.train``, with the pages and the store of this experiment.

    Raises: ConfigError if the flags name those.
    """
    if taken := [flag for flag in flags if flag.partition("=")[0] in OURS]:
        raise ConfigError(f"{taken[0]} is chosen by this experiment; leave it out after --")
    own = ["--collection", str(PAGES), "--store", f"{config.output}/store", "--documents", str(config.pages)]
    return parse(TrainConfig, "python -m experiments.technical_docs ... --", [*flags, *own])


def current_commit() -> str | None:
    """The commit of this checkout, with ``-dirty`` if files differ from it; None outside a checkout."""
    git = ["git", "-C", str(PAGES), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measurements(store: Any, conversations: Any) -> dict[str, float]:
    """What self-study kept and dropped, by reason, and the minutes of the work on the store."""
    from cas.report.costs import training_cost

    cost = training_cost(store)
    dropped = {f"dropped_{reason.replace(' ', '_')}": n for reason, n in sorted(conversations.dropped.items())}
    stages = {"self_study": "self_study_s", "initialization": "starts_s", "training": "training_s"}
    minutes = {f"{stage}_min": cost[key] / 60 for stage, key in stages.items() if cost[key] is not None}
    return {"kept_conversations": len(conversations), **dropped, **minutes, "training_steps": cost["steps"]}


def write_results(
    folder: Path,
    *,
    command: str,
    model: str,
    pages: Collection,
    settings: Mapping[str, Any],
    predictions: Sequence[Any],
    figures: Mapping[str, float],
) -> None:
    """Write the record and ``summary.json``, and print the table."""
    from cas.evaluation.metrics import METRICS
    from cas.evaluation.recording import table, write_run
    from cas.evaluation.resume import write

    run = write_run(
        folder / "results",
        name="technical_docs",
        command=command,
        seeds=[settings["seed"]],
        model=model,
        collection={"name": "relay_docs", "sha256": pages.hash},
        settings=settings,
        predictions=predictions,
        compare=[
            (str(RETRIEVED), str(RAG)),
            (str(ORACLE), str(NO_CONTEXT)),
            (str(FULL_DOCUMENT), str(ORACLE)),
            (str(ORACLE), str(ALL_LOADED)),
        ],
        metric_names=list(METRICS),
        extra_metrics={key: common.single_measurement(value) for key, value in figures.items()},
        keep_answers=True,
    )
    print("\n" + table(run, [str(arm) for arm in ARMS], ["contains", "f1", "log_perplexity"]))
    for key, value in figures.items():
        print(f"{key.replace('_', ' ')}: {value:,.1f}".removesuffix(".0"))
    accuracy = {str(arm): run["metrics"][f"{arm}.contains"]["mean"] for arm in ARMS}
    write(folder / "summary.json", {"pages": len(pages), **figures, "accuracy": accuracy})
    print(f"written: {folder}/summary.json, {folder}/results")


if __name__ == "__main__":
    sys.exit(main())
