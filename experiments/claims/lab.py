"""The claims of the papers, run again: ``python -m experiments.claims`` runs all, ``python -m experiments.<name>`` one.

Here is what they share: fictional worlds of small documents, one self-study a seed, trainings that several claims compare (made
once, whichever asks first), results and verdicts. A claim is a file of its own that says what the paper found, what is trained
and asked, and what would confirm it. Everything resumes by the same command.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

from cas import console
from cas.config import READER, parse
from cas.data.collection import Collection, Question
from cas.data.worlds import Shape, world
from cas.errors import ConfigError
from cas.evaluation.arms import CachingEmbedder, run_arms, unseen
from cas.evaluation.metrics import interval
from cas.evaluation.recording import Prediction, flags, write_run
from cas.evaluation.resume import cached_json, check_settings
from cas.model.frozen import FrozenModel
from cas.selfstudy.conversations import Conversations
from cas.selfstudy.synthesize import SelfStudy, synthesize
from cas.store.store import Store
from cas.training.initialization import initialize_cartridges
from cas.training.trainer import Trainer, Training
from experiments.claims.collapse_and_rescue import shown, train
from retrieval import SentenceEmbedder

NAMES = (
    *("compression", "oracle_vs_context", "modular", "loaded", "isolation", "distractors", "pool", "order", "starts"),
    *("objective", "seed_prompts", "questions_per_chunk", "lora", "routers", "needles", "long_corpus", "two_documents"),
    *("throughput", "midconversation", "growing"),
)
SMALL = Shape(people=(3, 4))  # documents of about 350 tokens of the reader
FIRST_TOKENS: dict[str, Any] = {
    "lr": 0.1,
    "epochs": 8.0,
}  # what cartridges need that start as a document's first tokens


@dataclass(frozen=True)
class Config:
    """Claims of the papers on fictional worlds."""

    output: str = "runs/claims"
    """Folder of results; trainings stand in shared/ below it, for all claims."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds, each a world and trainings of its own."""
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
    questions: int | None = None
    """Ask so many test questions a seed; default all."""


def key(figure: str) -> str:
    """A figure's name in results: exact match, unless it has a dot."""
    return figure if "." in figure else f"{figure}.exact_match"


@dataclass(frozen=True)
class Criterion:
    """What a claim says of a figure (exact match, unless it has a dot): the bound of its 95 % interval is at ``least`` or at ``most``
    so much."""

    says: str
    figure: str
    side: str
    limit: float

    def verdict(self, figures: Mapping[str, Mapping[str, float]]) -> str:
        """``confirmed`` or ``contradicted`` if the whole interval is on one side of the limit, else ``undecided``."""
        found = figures[key(self.figure)]
        low, high = found["low"], found["high"]
        above, below = low > self.limit, high <= self.limit  # no difference at all is not a better one
        confirmed, contradicted = (above, below) if self.side == "least" else (below, above)
        return "confirmed" if confirmed else "contradicted" if contradicted else "undecided"


@dataclass(frozen=True)
class Claim:
    """One row. ``run`` trains and asks for one seed and returns the answers; figures that are no answers go to
    :meth:`ClaimContext.measure`. ``table``: label and figure, as the results show them."""

    name: str
    title: str
    paper: str
    ours: str
    run: Callable[[ClaimContext], list[Prediction]]
    table: Sequence[tuple[str, str]]
    shown: Sequence[Criterion]
    compare: Sequence[tuple[str, str]] = ()
    not_run: str = ""  # the reason, if it cannot be run


@dataclass
class ClaimContext:
    """The world of a seed, and what was trained in it."""

    config: Config
    model: FrozenModel
    seed: int
    part: str = "worlds"
    given: Collection | None = None
    measured: dict[str, list[tuple[float, str]]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the trainings of this seed stand."""
        return Path(self.config.output) / "shared" / f"seed-{self.seed}" / self.part

    def elsewhere(self, part: str, collection: Collection) -> ClaimContext:
        """The same for another collection."""
        return ClaimContext(self.config, self.model, self.seed, part, collection)

    @cached_property
    def collection(self) -> Collection:
        """The documents, with their test questions."""
        return self.given or world(self.seed, self.config.documents, name="small_worlds", shape=SMALL)

    @cached_property
    def embedder(self) -> CachingEmbedder:
        """One embedder for all that retrieve."""
        return CachingEmbedder(SentenceEmbedder())

    @cached_property
    def conversations(self) -> Conversations:
        """The self-study of this seed; the base store has the matched starts afterwards."""
        with closing(self._store("base")) as base:
            told = synthesize(
                self.model, self.collection, base, SelfStudy(seed=self.seed), progress=shown("self-study")
            )
            initialize_cartridges(self.model, base, told, progress=shown("starts"))
        return told

    @cached_property
    def questions(self) -> list[Question]:
        """Test questions in words that no training conversation has."""
        found, most = unseen(self.collection.questions, self.conversations), self.config.questions
        if most is None or most >= len(found):
            return found
        return sorted(Random(self.seed).sample(found, most), key=lambda q: q.id)

    def _store(self, name: str, **made: Any) -> Store:
        folder = self.folder / name
        if Store.exists(folder):
            return Store.open(folder, write=True)
        made = {"initialisation": "matched", "seed": self.seed, **made}
        if "tokens" not in made:
            made.setdefault("ratio", self.config.ratio)
        return Store.create(folder, self.model, **made)

    def started(self, name: str, collection: Collection | None = None, **made: Any) -> Store:
        """A store, open for writing, whose cartridges have their start. ``made``: how it is created; matched starts of the usual
        size are copied, not fitted again."""
        told, store = self.conversations, self._store(name, **made)
        store.add_documents(collection or self.collection, self.model.count_tokens)
        usual = {k: store.meta[k] for k in ("ratio", "tokens", "initialisation", "positions")}
        with closing(self._store("base")) as base, store.training():
            if usual == {k: base.meta[k] for k in usual} and store.layout == base.layout:
                rows, have = store.rows(), base.rows()
                for i in (i for i, row in rows.items() if row.version < 1 and i in have):
                    store.write_tensors(i, {"kv": base.cartridge(i)})
                store.commit(rows, None)
        initialize_cartridges(self.model, store, told)
        return store

    @contextmanager
    def trained(
        self,
        name: str,
        collection: Collection | None = None,
        conversations: Conversations | None = None,
        made: Mapping[str, Any] | None = None,
        trainer: type[Trainer] = Trainer,
        prepare: Callable[[Store], None] | None = None,
        until: int | None = None,
        **training: Any,
    ) -> Iterator[Store]:
        """The store of a training by its name, run if it was not. ``made``: how the store is created; ``prepare``: called on its starts.

        ``training``: fields of :class:`Training` other than the usual. ``until``: stop at this step, for a curve.
        """
        with closing(self.started(name, collection, **(made or {}))) as store:
            if prepare is not None and all(row.steps == 0 for row in store.rows().values()):
                prepare(store)
            usual = {"epochs": self.config.epochs, "lr": self.config.lr, "pool": 16, "targets": 16, "isolation": 0.5}
            settings = Training(**usual | {"seed": self.seed} | training)
            one = trainer(self.model, store, conversations or self.conversations, settings)
            if until is None:
                train(one, f"seed {self.seed}, {name}")
            else:
                one.run(until=until)
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
        **how: Any,
    ) -> list[Prediction]:
        """Answers under arms of :func:`cas.evaluation.arms.build_prompts`; names of documents and questions get the seed."""
        found = run_arms(
            how.pop("model", self.model),
            store,
            collection or self.collection,
            self.questions if questions is None else questions,
            arms,
            embedder=self.embedder,
            seed=self.seed,
            prefix=prefix,
            **how,
        )
        return [self.named(p) for p in found]

    def named(self, p: Prediction) -> Prediction:
        """A prediction as results keep it."""
        return {
            **p,
            "question_id": f"{self.seed}/{p['question_id']}",
            "document_id": f"{self.seed}/{p['document_id']}",
            "scores": {"exact_match": p["scores"]["exact_match"]},
        }

    def measure(self, name: str, values: Sequence[float], documents: Sequence[str] | None = None) -> None:
        """Keep a figure: a value per document, or one of the whole seed."""
        about = documents if documents is not None else [""] * len(values)
        self.measured.setdefault(name, []).extend(
            (float(v), f"{self.seed}/{d}") for v, d in zip(values, about, strict=True)
        )


def run(claim: Claim, config: Config, model: FrozenModel | None = None) -> dict[str, Any]:
    """Run a claim, write its results, print its table and verdicts."""
    folder = Path(config.output) / claim.name
    settings = {k: v for k, v in asdict(config).items() if k not in ("output", "seeds")}
    check_settings(Path(config.output) / "shared", settings)
    model = model or FrozenModel.from_pretrained(config.model)
    predictions: list[Prediction] = []
    measured: dict[str, list[tuple[float, str]]] = {}
    hashes = []

    def one_seed(lab: ClaimContext) -> dict[str, Any]:
        predictions = claim.run(lab)
        return {"predictions": predictions, "measured": lab.measured}

    for seed in config.seeds:
        lab = ClaimContext(config, model, seed)
        hashes.append(lab.collection.hash)
        part = cached_json(folder / f"seed-{seed}.json", lambda lab=lab: one_seed(lab))  # type: ignore[misc]
        predictions += part["predictions"]
        for name, values in part["measured"].items():
            measured.setdefault(name, []).extend((v, d) for v, d in values)
    found = write_run(
        folder / "results",
        name=claim.name,
        command=" ".join([f"python -m experiments.{claim.name}", flags(config)]),
        seeds=list(config.seeds),
        model="embedded reader" if model.reader else model.source.name,
        collection={"name": "small worlds", "sha256": hashes[0]},
        settings=settings,
        predictions=predictions,
        metric_names=["exact_match"],
        compare=list(dict.fromkeys(claim.compare)),
        extra_metrics={
            name: asdict(interval([v for v, _ in values], [d for _, d in values])) for name, values in measured.items()
        },
        keep_answers=model.reader,
    )
    print(report(claim, found), flush=True)
    return found


def report(claim: Claim, found: Mapping[str, Any]) -> str:
    """A claim's figures and verdicts as Markdown."""
    figures = {**found["metrics"], **found["measurements"]}
    lines = [
        f"## {NAMES.index(claim.name) + 1}. {claim.title}",
        "",
        f"*Paper:* {claim.paper}",
        "",
        f"*Ours:* {claim.ours}",
    ]
    lines += ["", "| | mean [95 %] |", "|---|---|"]
    lines += [f"| {label} | {cell(figures[key(name)])} |" for label, name in claim.table]
    lines += [
        "",
        *(
            f"- {s.verdict(figures).upper()}: {s.says} ({cell(figures[key(s.figure)])}, at {s.side} {s.limit:g})"
            for s in claim.shown
        ),
    ]
    return "\n".join(lines) + "\n"


def cell(figure: Mapping[str, float]) -> str:
    """A figure with its interval."""
    digits = 1 if max(abs(figure[k]) for k in ("mean", "low", "high")) >= 10 else 2
    return f"{figure['mean']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def load(name: str) -> Claim:
    """A claim by its name."""
    if name not in NAMES:
        raise ConfigError(f"there is no claim {name}; choose from {', '.join(NAMES)}")
    claim: Claim = importlib.import_module(f"experiments.claims.{name}").CLAIM
    return claim


def told(command: str, arguments: Sequence[str] | None) -> Config:
    """The command line. Raises ConfigError for a world that is too small for what the claims load."""
    config = parse(Config, f"python -m experiments.{command}", arguments)
    if config.documents < 20:
        raise ConfigError(f"--documents {config.documents}: at least 20, since up to 20 cartridges are loaded together")
    return config


def main_of(claim: Claim, arguments: Sequence[str] | None = None) -> int:
    """The command of one claim. Returns the exit status."""

    def body() -> int:
        config = told(claim.name, arguments)
        if claim.not_run:
            print(f"{claim.title}: not run: {claim.not_run}")
        else:
            run(claim, config)
        return 0

    return console.run(body)


def main(arguments: Sequence[str] | None = None) -> int:
    """All claims, in order. Returns the exit status."""

    def body() -> int:
        config = told("claims", arguments)
        model = FrozenModel.from_pretrained(config.model)
        for name in NAMES:
            claim = load(name)
            if not claim.not_run:
                run(claim, config, model)
        return 0

    return console.run(body)
