"""RAG against CAS on one store: accuracy, tokens, memory, latency and training cost, on the same questions.

    python -m cas.report --store runs/manuals --output runs/manuals_report

Every arm answers with the same model, header, question, embedder and decoding; they differ only in what stands where the
document goes. A budget counts the tokens there: text with its titles, or positions of cartridges. Writes ``results.json``,
``predictions.jsonl``, ``report.md`` and ``report.html`` (one file, nothing loaded from anywhere).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Literal

from cas import console
from cas.config import parse
from cas.errors import ConfigError

if TYPE_CHECKING:
    from cas.data.collection import Collection, Question
    from cas.evaluation.recording import Prediction
    from cas.model.frozen import FrozenModel
    from cas.store.store import Store


@dataclass(frozen=True)
class Config:
    """RAG against CAS on one store."""

    store: str = ""
    """The store, trained by cas.train."""
    output: str = "runs/rag_vs_cas"
    """Folder of the report and results."""
    collection: str | None = None
    """The documents with questions; default what the store was trained on."""
    collection_seed: int | None = None
    """Seed of a generated collection; default as the store was trained."""
    name: str | None = None
    """Name of the report; default that of the collection."""
    ks: tuple[int, ...] = (1, 2, 4, 8)
    """Cartridges to retrieve."""
    budgets: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096, 8192)
    """Tokens of retrieved text, as far as the model's window goes; as many as each of --ks has are added."""
    tune_up_to: int = 1024
    """RAG is tuned at each budget up to this one; larger ones take its setting."""
    questions: int | None = None
    """Ask so many test questions; default all."""
    validation: int = 128
    """Questions to tune RAG on, at most a quarter of all; they are not asked again."""
    metric: Literal["exact_match", "contains", "f1", "rouge_l", "chrf"] | None = None
    """What decides; default exact_match for the embedded reader, else contains."""
    isolated: str | None = None
    """A store of the same documents trained with --isolation 1, to compare."""
    monolithic: str | None = None
    """A store of the same documents trained with --merge, to compare."""
    with_chunk_k: int = 4
    """Cartridges of the arm that has one chunk of text as well."""
    timed: int = 16
    """Questions that are timed, one at a time."""
    max_new_tokens: int = 32
    """Longest answer."""
    embedder: str = "sentence-transformers/all-MiniLM-L6-v2"
    """Hub name or folder of the embedding model, for both sides."""
    device: str = "auto"
    """cpu, cuda, cuda:1, ..."""
    no_text: bool = False
    """Keep answers and question texts out of what is written: figures and question ids only."""
    seed: int = 0
    """Seed of the split into validation and test questions."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Returns the exit status."""
    return console.run(lambda: compare(parse(Config, "python -m cas.report", arguments)))


def compare(config: Config) -> int:
    """Tune, ask, time, write the report."""
    from cas.evaluation.arms import CachingEmbedder
    from cas.evaluation.resume import cached_json, check_settings
    from cas.model.frozen import FrozenModel
    from cas.report.arms import Arms
    from cas.report.costs import cost_of, timed
    from cas.report.rag_baseline import Rag
    from cas.store.store import Store
    from retrieval import SentenceEmbedder

    if not config.store:
        raise ConfigError("give --store: the folder that cas.train wrote")
    store = Store.open(config.store)
    output = Path(config.output)
    check_settings(output, {k: v for k, v in asdict(config).items() if k not in ("output", "no_text", "name")})
    model = FrozenModel.from_store(store, device=config.device)
    store.check_model(model)
    collection = collection_of(config, model, store)
    checked, asked = split(collection, config)
    metric = config.metric or ("exact_match" if model.reader else "contains")
    print(f"questions   {len(asked)} to test, {len(checked)} to tune on; {metric} decides", flush=True)
    embedder = CachingEmbedder(SentenceEmbedder(config.embedder))
    rag = Rag(model, store.texts(), embedder)
    arms = Arms(config, model, store, collection, rag)
    parts = output / "parts"
    settings = arms.tuned(parts, checked, metric)
    main_arm = (
        cached_json(parts / "k.json", partial(arms.best_k, checked, metric)) if checked else f"cas{arms.ks()[-1]}"
    )
    predictions: list[Prediction] = []
    measured: dict[str, dict[str, float]] = {}
    for arm in arms.names():
        done = cached_json(parts / f"{arm}.json", partial(arms.ask, arm, asked))
        predictions += done["predictions"]
        measured |= done["measured"]
        print(f"measured    {arm}", flush=True)
    sample = Random(config.seed).sample(asked, min(config.timed, len(asked)))
    measured |= cached_json(parts / "timed.json", partial(timed, arms, SentenceEmbedder(config.embedder), sample))
    measured |= cached_json(parts / "retrieval.json", partial(arms.retrieval, asked))
    cost = cost_of(store)
    return write(
        config, model, store, collection, asked, predictions, measured, settings, cost, metric, main_arm, arms.notes
    )


def collection_of(config: Config, model: FrozenModel, store: Store) -> Collection:
    """The store's documents with their questions, as ``cas.train`` saw them."""
    import yaml

    from cas.data.collection import Collection, split_long

    file = store.folder / "config.yaml"
    trained = yaml.safe_load(file.read_text()) if file.exists() else {}
    name = config.collection or trained.get("collection")
    if not name:
        raise ConfigError(f"{store.folder} does not say what it was trained on; give --collection")
    seed = trained.get("collection_seed", 0) if config.collection_seed is None else config.collection_seed
    found = Collection.load(name, seed=seed)
    if trained.get("span") and trained.get("tokens") is None:
        most = int(trained["span"] * (trained.get("ratio") or 16.0))
        found = split_long(found, most, lambda text: len(model.encode(text)))
    have = {d.id for d in found.documents}
    if missing := [i for i in store.rows() if i not in have]:
        raise ConfigError(
            f"--collection {name} lacks {len(missing)} documents of the store, such as {missing[0]}; give the one it was "
            "trained on"
        )
    found = found.select(list(store.rows()))
    if len(found.questions) < 8:
        raise ConfigError(
            f"{name} has {len(found.questions)} questions about these documents; write at least 8 into questions.jsonl beside "
            'them, a line each: {"id": "q1", "document_ids": ["…"], "question": "…", "answers": ["…"]}'
        )
    return found


def split(collection: Collection, config: Config) -> tuple[list[Question], list[Question]]:
    """Questions to tune on, and questions to test with: no question is both."""
    few = min(config.validation, len(collection.questions) // 4)
    mixed = Random(f"validation/{config.seed}").sample(collection.questions, len(collection.questions))
    rest = mixed[few:] if config.questions is None else mixed[few : few + config.questions]
    return mixed[:few], sorted(rest, key=lambda q: q.id)


def write(
    config: Config,
    model: FrozenModel,
    store: Store,
    collection: Collection,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    measured: dict[str, dict[str, float]],
    settings: Mapping[int, Mapping[str, Any]],
    cost: Mapping[str, Any],
    metric: str,
    main_arm: str,
    notes: Sequence[str],
) -> int:
    """Results, tests and the report."""
    from cas.evaluation.arms import METRICS
    from cas.evaluation.recording import flags, relative, write_run
    from cas.report.rag_baseline import Setting
    from cas.report.view import by_kind, compared, make_report

    arms = list(dict.fromkeys(p["arm"] for p in predictions))
    pairs = compared(arms, main_arm, measured)
    measured = measured | by_kind(predictions, {q.id: q.kind or "" for q in questions}, metric)
    said = asdict(config) | {"store": "DIR", "output": "DIR"}
    for name in ("isolated", "monolithic"):
        said[name] = said[name] and "DIR"
    if config.collection is not None and Path(config.collection).exists():
        said["collection"] = relative(config.collection)
    run = write_run(
        Path(config.output),
        name="rag_vs_cas",
        command="python -m cas.report " + flags(Config(**said)),
        seeds=[config.seed],
        model="embedded reader" if model.reader else model.source.name,
        collection={"name": config.name or collection.name, "sha256": collection.hash},
        settings=said
        | {
            "metric": metric,
            "main_arm": main_arm,
            "notes": list(notes),
            "cost": dict(cost),
            "kinds": {q.id: q.kind or "" for q in questions},
        }
        | {"rag": {str(b): {**s, "said": str(Setting(**s["best"]))} for b, s in settings.items()}}
        | {"documents": len(collection), "tokens": sum(r.tokens for r in store.rows().values())}
        | {"positions": sum(r.p for r in store.rows().values()), "questions": len(questions)},
        predictions=predictions,
        compare=pairs,
        metric_names=[*METRICS, "rouge_l", "chrf"],
        extra_metrics=measured,
        keep_answers=not config.no_text,
    )
    texts = {} if config.no_text else {q.id: (q.question, q.answers[0]) for q in questions}
    make_report(Path(config.output), run, predictions, texts)
    print(f"written     {config.output}/report.html, report.md, results.json, predictions.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
