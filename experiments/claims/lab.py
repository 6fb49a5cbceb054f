"""The claims of the papers, run again: ``python -m experiments.claims`` runs all, ``python -m experiments.<name>`` one.

This module has what they share: fictional worlds of small documents, one self-study per seed, trainings that several
claims compare (run once, by the first claim that needs them), results and verdicts. Every claim is a file that says
what the paper found, what is trained and asked, and what would confirm it. Everything resumes by the same command.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from torch import Tensor

from cas import console
from cas.answering import prompts as prompting
from cas.data.collection import Collection, Question
from cas.data.worlds import Shape, world
from cas.errors import ConfigError
from cas.evaluation.answers import CachingEmbedder, answer_prompts, run_arms, unseen_questions
from cas.evaluation.arms import Arm
from cas.evaluation.metrics import interval
from cas.evaluation.recording import Prediction, flags, write_run
from cas.evaluation.resume import cached_json, check_settings
from cas.model.decoding import Prompt
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.options import READER, parse
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.synthesize import SelfStudy, synthesize
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.trainer import Trainer, Training
from experiments import common
from experiments.claims.equal_arms import EQUAL, Checksums, checksums, equal_arms
from experiments.claims.outlook import outlook
from retrieval import SentenceEmbedder

NAMES = (
    *("compression", "oracle_vs_context", "modular", "loaded", "isolation", "distractors", "pool", "order", "starts"),
    *("objective", "seed_prompts", "questions_per_chunk", "lora", "routers", "needles", "long_corpus", "two_documents"),
    *("throughput", "midconversation", "growing"),
)
SMALL = Shape(people=(3, 4))  # documents of about 350 tokens of the reader
BATCH = 64  # conversations a step, whatever the pool: small steps, since there are few conversations
MIXED: dict[str, Any] = {"pool": 16, "targets": 16, "per_target": BATCH // 16, "isolation": 0.5}
FIRST_TOKENS: dict[str, Any] = {"lr": 0.1, "epochs": 10.0}  # for cartridges initialized with a document's first tokens


@dataclass(frozen=True)
class Config:
    """Claims of the papers on fictional worlds."""

    output: str = "runs/claims"
    """Folder of results; trainings are in shared/ below it, for all claims."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds, each with a world and trainings of its own."""
    documents: int = 24
    """Documents of each world, at least 20."""
    model: str = READER
    """The frozen model."""
    ratio: float = 16.0
    """Document tokens per cartridge position."""
    epochs: float = 3.0
    """Passes over all conversations, unless a claim says otherwise."""
    lr: float = 0.02
    """Learning rate, unless a claim says otherwise."""
    conversations: int = 64
    """Conversations of self-study per document, in the mean."""
    questions: int | None = None
    """Test questions per seed; default all."""


def key(figure: str) -> str:
    """A figure's name in results: exact match, unless it has a dot."""
    return figure if "." in figure else f"{figure}.exact_match"


@dataclass(frozen=True)
class Criterion:
    """What a claim says of a figure (exact match, unless it has a dot): its 95 % interval is above (``least``) or at
    most (``most``) the limit."""

    text: str
    figure: str
    side: str
    limit: float

    def verdict(self, figures: Mapping[str, Mapping[str, float]], equal: Sequence[Sequence[str]] = ()) -> str:
        """``confirmed`` or ``contradicted`` if the whole interval is on one side of the limit, else ``undecided``; neither
        for a difference between two arms that are ``equal`` (:mod:`experiments.claims.equal_arms`)."""
        if self.figure in ("_minus_".join(pair) for pair in equal):
            return EQUAL
        figure = figures[key(self.figure)]
        above, below = figure["low"] > self.limit, figure["high"] <= self.limit  # a difference of 0 is no improvement
        confirmed, contradicted = (above, below) if self.side == "least" else (below, above)
        return "confirmed" if confirmed else "contradicted" if contradicted else "undecided"


@dataclass(frozen=True)
class Claim:
    """A claim of a paper. ``run`` trains and asks for one seed and returns the answers; other figures go to
    :meth:`ClaimContext.measure`. ``table``: label and figure of every row of the results."""

    name: str
    title: str
    paper: str
    ours: str
    run: Callable[[ClaimContext], list[Prediction]]
    table: Sequence[tuple[str, str]]
    criteria: Sequence[Criterion]
    compare: Sequence[tuple[str, str]] = ()
    not_run: str = ""  # the reason, if it cannot be run


@dataclass
class ClaimContext:
    """The world of a seed, and what was trained in it."""

    config: Config
    model: FrozenModel
    seed: int
    part: str = "worlds"
    own_collection: Collection | None = None
    measurements: dict[str, list[tuple[float, str]]] = field(default_factory=dict)
    loaded: Checksums = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of this seed's trainings."""
        return Path(self.config.output) / "shared" / f"seed-{self.seed}" / self.part

    def with_collection(self, part: str, collection: Collection) -> ClaimContext:
        """The same for another collection, in a folder ``part`` of its own."""
        return ClaimContext(self.config, self.model, self.seed, part, collection, loaded=self.loaded)

    @cached_property
    def collection(self) -> Collection:
        """The documents, with their test questions."""
        return self.own_collection or world(self.seed, self.config.documents, name="small_worlds", shape=SMALL)

    @cached_property
    def embedder(self) -> CachingEmbedder:
        """The embedder of all arms."""
        return CachingEmbedder(SentenceEmbedder())

    @cached_property
    def conversations(self) -> Conversations:
        """The self-study of this seed; afterwards the base store has the attention-matching initialization."""
        with closing(self._store("base")) as base:
            wanted = self.config.conversations * len(self.collection.documents)
            study = SelfStudy(seed=self.seed, keep_going=True, conversations=wanted)
            counter = common.counter("self-study")
            conversations = synthesize(self.model, self.collection, base, study, progress=counter)
            initialize_cartridges(self.model, base, conversations, progress=common.counter("initialization"))
        return conversations

    @cached_property
    def questions(self) -> list[Question]:
        """Test questions in words that no training conversation has."""
        questions, count = unseen_questions(self.collection.questions, self.conversations), self.config.questions
        if count is None or count >= len(questions):
            return questions
        return sorted(Random(self.seed).sample(questions, count), key=lambda q: q.id)

    def _store(self, name: str, **options: Any) -> Store:
        options = {"initialisation": "matched", "seed": self.seed, **options}
        if "tokens" not in options:
            options.setdefault("ratio", self.config.ratio)
        return common.open_store(self.folder / name, self.model, **options)

    def initialized(self, name: str, collection: Collection | None = None, **options: Any) -> Store:
        """A store, open for writing, whose cartridges are initialized.

        ``options``: how it is created; attention-matching cartridges of the usual size are copied from the base store,
        not fitted again.
        """
        conversations, store = self.conversations, self._store(name, **options)
        store.add_documents(collection or self.collection, self.model.count_tokens)
        usual = {k: store.meta[k] for k in ("ratio", "tokens", "initialisation", "positions")}
        with closing(self._store("base")) as base, store.training():
            if usual == {k: base.meta[k] for k in usual} and store.layout == base.layout:
                rows, base_rows = store.rows(), base.rows()
                for i in (i for i, row in rows.items() if row.version < 1 and i in base_rows):
                    store.write_tensors(i, {"kv": base.cartridge(i)})
                store.commit(rows, None)
        initialize_cartridges(self.model, store, conversations)
        return store

    @contextmanager
    def trained(
        self,
        name: str,
        collection: Collection | None = None,
        conversations: Conversations | None = None,
        options: Mapping[str, Any] | None = None,
        trainer: type[Trainer] = Trainer,
        prepare: Callable[[Store], None] | None = None,
        until: int | None = None,
        **training: Any,
    ) -> Iterator[Store]:
        """The store of a training, which runs unless it has run before.

        ``options``: how the store is created. ``prepare``: called once the cartridges are initialized. ``until``: stop
        at this step, for a curve. ``training``: fields of :class:`Training` that differ from the usual ones.
        """
        with closing(self.initialized(name, collection, **(options or {}))) as store:
            if prepare is not None and all(row.steps == 0 for row in store.rows().values()):
                prepare(store)
            usual = {"epochs": self.config.epochs, "lr": self.config.lr, "seed": self.seed, **MIXED}
            settings = Training(**usual | training)
            training_run = trainer(self.model, store, conversations or self.conversations, settings)
            common.train(training_run, f"seed {self.seed}, {name}") if until is None else training_run.run(until=until)
            yield store

    def log(self, name: str) -> list[dict[str, Any]]:
        """The steps of a training."""
        return [json.loads(line) for line in (self.folder / name / "metrics.jsonl").read_text().splitlines()]

    def ask(
        self,
        store: Store,
        prefix: str,
        arms: Sequence[str],
        questions: Sequence[Question] | None = None,
        collection: Collection | None = None,
        **options: Any,
    ) -> list[Prediction]:
        """Answers under arms, given by name, as results record them.

        ``options``: of :func:`cas.evaluation.answers.run_arms`.
        """
        predictions = run_arms(
            self.model,
            store,
            collection or self.collection,
            self.questions if questions is None else questions,
            [Arm.parse(name) for name in arms],
            embedder=self.embedder,
            seed=self.seed,
            prefix=prefix,
            **options,
        )
        sums = checksums(options.get("cartridges") or store)
        self.loaded |= {f"{prefix}{Arm.parse(name)}": sums for name in arms}
        return [common.with_seed(p, self.seed) for p in predictions]

    def answer(
        self,
        arm: str,
        questions: Sequence[Question],
        prompts: Sequence[Prompt],
        cartridges: Mapping[str, Tensor],
        layout: Layout,
        model: FrozenModel | None = None,
    ) -> list[Prediction]:
        """Answers to prompts of an arm of one's own, as results record them."""
        if arm not in self.loaded:
            self.loaded[arm] = checksums({i: cartridges[i] for p in prompts for i in p.cartridges})
        predictions = answer_prompts(model or self.model, arm, questions, prompts, cartridges, layout, self.seed)
        return [common.with_seed(p, self.seed) for p in predictions]

    def question_tokens(self, question: Question) -> tuple[int, ...]:
        """A question with the request for a short answer, as tokens after the document."""
        return self.model.question_tokens(question.question + prompting.brief(self.model))

    def measure(self, name: str, values: Sequence[float], documents: Sequence[str] | None = None) -> None:
        """Record a figure: a value per document, or per seed."""
        ids = documents if documents is not None else [""] * len(values)
        entries = [(float(value), f"{self.seed}/{i}") for value, i in zip(values, ids, strict=True)]
        self.measurements.setdefault(name, []).extend(entries)


def run(claim: Claim, config: Config, model: FrozenModel | None = None) -> dict[str, Any]:
    """Run a claim, write its results, print its table and verdicts."""
    folder = Path(config.output) / claim.name
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "seeds")}
    check_settings(Path(config.output) / "shared", settings)
    model = model or FrozenModel.from_pretrained(config.model)
    predictions: list[Prediction] = []
    measurements: dict[str, list[tuple[float, str]]] = {}
    hashes, loaded = list[str](), list[Checksums]()

    def one_seed(lab: ClaimContext) -> dict[str, Any]:
        started, record = time.monotonic(), {"predictions": claim.run(lab)}
        seconds = round(time.monotonic() - started, 1)
        return {**record, "measured": lab.measurements, "loaded": lab.loaded, "seconds": seconds}

    for seed in config.seeds:
        lab = ClaimContext(config, model, seed)
        hashes.append(lab.collection.hash)
        part = cached_json(folder / f"seed-{seed}.json", lambda lab=lab: one_seed(lab))  # type: ignore[misc]
        predictions += part["predictions"]
        loaded.append(part.get("loaded", {}))
        for name, values in part["measured"].items():
            measurements.setdefault(name, []).extend((v, d) for v, d in values)
    compare = list(dict.fromkeys(claim.compare))
    if equal := equal_arms(predictions, loaded, compare):
        settings["equal_arms"] = equal
    results = write_run(
        folder / "results",
        name=claim.name,
        command=" ".join([f"python -m experiments.{claim.name}", flags(config)]),
        seeds=list(config.seeds),
        model="embedded reader" if model.reader else model.source.name,
        collection={"name": "small worlds", "sha256": hashes[0]},
        settings=settings,
        predictions=predictions,
        metric_names=["exact_match"],
        compare=compare,
        extra_metrics={
            name: asdict(interval([v for v, _ in values], [d for _, d in values]))
            for name, values in measurements.items()
        },
        keep_answers=model.reader,
    )
    print(report(claim, results), flush=True)
    return results


def report(claim: Claim, results: Mapping[str, Any]) -> str:
    """A claim's figures and verdicts as Markdown."""
    figures = {**results["metrics"], **results["measurements"]}
    equal = results["settings"].get("equal_arms", [])
    lines = [f"## {NAMES.index(claim.name) + 1}. {claim.title}", "", f"*Paper:* {claim.paper}"]
    lines += ["", f"*Ours:* {claim.ours}", "", "| | mean [95 %] |", "|---|---|"]
    lines += [f"| {label} | {cell(figures[key(name)])} |" for label, name in claim.table]
    lines += [
        "",
        *(
            f"- {s.verdict(figures, equal).upper()}: {s.text} ({cell(figures[key(s.figure)])}, at {s.side} {s.limit:g})"
            for s in claim.criteria
        ),
        *(f"- {EQUAL.upper()} {a} and {b}: every answer is the same, from the same cartridges" for a, b in equal),
    ]
    return "\n".join(lines) + "\n"


def cell(figure: Mapping[str, float]) -> str:
    """A figure with its interval."""
    digits = 1 if max(abs(figure[k]) for k in ("mean", "low", "high")) >= 10 else 2
    return f"{figure['mean']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def load(name: str) -> Claim:
    """The claim with a name. Raises ConfigError if there is none."""
    if name not in NAMES:
        raise ConfigError(f"there is no claim {name}; choose from {', '.join(NAMES)}")
    claim: Claim = importlib.import_module(f"experiments.claims.{name}").CLAIM
    return claim


def parse_command(command: str, arguments: Sequence[str] | None) -> Config:
    """The options of a command line. Raises ConfigError for a world that is too small for what the claims load."""
    config = parse(Config, f"python -m experiments.{command}", arguments)
    if config.documents < 20:
        raise ConfigError(f"--documents {config.documents}: at least 20, since up to 20 cartridges are loaded together")
    return config


def main_of(claim: Claim, arguments: Sequence[str] | None = None) -> int:
    """The command of one claim. Returns the exit status."""

    def body() -> int:
        config = parse_command(claim.name, arguments)
        if claim.not_run:
            print(f"{claim.title}: not run: {claim.not_run}")
        else:
            run(claim, config)
        return 0

    return console.run(body)


def main(arguments: Sequence[str] | None = None) -> int:
    """All claims, in order. Returns the exit status."""

    def body() -> int:
        config = parse_command("claims", arguments)
        model = FrozenModel.from_pretrained(config.model)
        claims = [claim for claim in map(load, NAMES) if not claim.not_run]
        print("\n".join(outlook(config.output, [claim.name for claim in claims], config.seeds)), flush=True)
        for claim in claims:
            run(claim, config, model)
        return 0

    return console.run(body)
