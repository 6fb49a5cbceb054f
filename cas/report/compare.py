"""RAG against CAS on one store: accuracy, tokens, memory, latency and training cost, on the same questions.

    cas report --store runs/manuals --output runs/manuals_report

Every arm answers with the same model, header, question, embedder and decoding; arms differ only in what stands where
the document goes. A budget counts the tokens there: text with its titles, or positions of cartridges. Writes
``results.json``, ``predictions.jsonl``, ``report.md`` and ``report.html`` (a single file that loads nothing).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from cas import console
from cas.errors import ConfigError
from cas.options import parse, store_folder
from cas.report.config import Config

if TYPE_CHECKING:
    from cas.data.collection import Question
    from cas.evaluation.arms import Arm
    from cas.evaluation.recording import Prediction
    from cas.report.arms import Comparison
    from cas.store.store import Store

PACKAGES = ("jinja2", "matplotlib", "rouge_score", "sacrebleu")  # of the extra ``report``
_MAY_CHANGE = (
    "output",
    "no_text",
    "name",
    "model",
    "revision",
    "device",
    "price_hour",
    "price_tokens",
)  # of the options, when a report goes on


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison. Returns the exit status."""
    return console.run(lambda: compare(parse(Config, "python -m cas.report", arguments)))


def compare(config: Config) -> int:
    """Tune RAG, answer under every arm, time, write the report. Returns the exit status."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ConfigError(f"the report needs {', '.join(missing)}: pip install 'cas-cartridges[report]'")

    from cas.store.store import Store

    folder = store_folder(config.store)
    with Store.open(folder) as store:
        return _compare(replace(config, store=str(folder)), store)


def _compare(config: Config, store: Store) -> int:
    from cas.evaluation.answers import CachingEmbedder
    from cas.evaluation.arms import Arm
    from cas.evaluation.resume import cached_json, check_settings
    from cas.model.frozen import FrozenModel
    from cas.report.arms import Comparison
    from cas.report.costs import time_arms
    from cas.report.exports import remove_ragas, write_ragas, write_trec
    from cas.report.questions import load_questions, parts_folder, split
    from cas.report.rag_baseline import Rag
    from retrieval import SentenceEmbedder

    output = Path(config.output)
    check_settings(output, {k: v for k, v in asdict(config).items() if k not in _MAY_CHANGE})
    with console.Display("loading", passing=True):
        model = FrozenModel.from_store(store, config.model, config.revision, device=config.device)
        store.check_model(model)
        collection, remarks = load_questions(config, model, store)
    for remark in remarks:
        print(remark, file=sys.stderr, flush=True)
    validation, test = split(collection, config)
    match_parts_to_text_option(output / "parts", config.no_text)
    metric = config.metric or ("exact_match" if model.reader else "contains")
    print(f"questions   {len(test)} to test, {len(validation)} to tune on; {metric} decides", flush=True)
    rag = Rag(model, store.texts(), CachingEmbedder(SentenceEmbedder(config.embedder)))
    comparison = Comparison(config, model, store, collection, rag)
    parts = parts_folder(output, model, (store, *comparison.other_stores.values()), collection)
    main_arm = f"cas{comparison.ks()[-1]}"
    if validation:
        with console.Display("choosing k", passing=True):
            main_arm = cached_json(parts / "k.json", partial(comparison.best_k, validation, metric))
    with console.Display("tuning") as display:
        settings = comparison.tune_rag(parts, validation, metric, Arm.parse(main_arm), display.show)
    predictions: list[Prediction] = []
    measurements: dict[str, dict[str, float]] = {}
    arms = comparison.arms()
    with console.Display("answers") as display:
        for arm in arms:

            def show(answered: int, before: int = len(predictions), arm: Arm = arm) -> None:
                display.show(before + answered, len(arms) * len(test), str(arm))

            show(0)
            part = cached_json(parts / f"{arm}.json", partial(measure, comparison, arm, test, show))
            predictions += part["predictions"]
            measurements |= part["measured"]
            print(f"measured    {arm}", flush=True)
    sample = Random(config.seed).sample(test, min(config.timed, len(test)))
    uncached = SentenceEmbedder(config.embedder)
    with console.Display("timing", passing=True):
        measurements |= cached_json(parts / "timed.json", partial(time_arms, comparison, uncached, sample))
    with console.Display("retrieval", passing=True):
        retrieval = cached_json(parts / "retrieval.json", partial(comparison.retrieval, test))
    measurements |= retrieval["measured"]
    write_trec(output, test, retrieval["rankings"])
    if config.no_text:
        remove_ragas(output)
    else:
        write_ragas(output, comparison, test, predictions)
    return write(comparison, test, predictions, measurements, settings, metric, main_arm)


def measure(
    comparison: Comparison, arm: Arm, questions: Sequence[Question], answered: Callable[[int], None]
) -> dict[str, Any]:
    """What :meth:`Comparison.run` returns, without the answers if the configuration keeps texts out."""
    part = comparison.run(arm, questions, answered)
    return without_answers(part) if comparison.config.no_text else part


def without_answers(part: Mapping[str, Any]) -> dict[str, Any]:
    """A part of the report whose predictions have scores and no answers."""
    return {**part, "predictions": [{k: v for k, v in p.items() if k != "answer"} for p in part["predictions"]]}


def match_parts_to_text_option(parts: Path, no_text: bool) -> None:
    """Remove the answers from the parts of an earlier run with texts, or the parts of one without, for this run to
    compute again."""
    from cas.evaluation.resume import write as write_json

    for file in parts.rglob("*.partial"):  # left by a killed run
        file.unlink()
    for file in parts.rglob("*.json"):
        part = json.loads(file.read_text())
        if not isinstance(part, dict) or "predictions" not in part:
            continue
        has_answers = any("answer" in p for p in part["predictions"])
        if no_text and has_answers:
            write_json(file, without_answers(part))
        elif not no_text and not has_answers:
            file.unlink()


def _public(path: str) -> str:
    """A path as it may be published."""
    from cas.evaluation.privacy import relative

    try:
        return relative(path)
    except ConfigError:  # outside of the working folder: after hours is no time to refuse
        return "COLLECTION"


def write(
    comparison: Comparison,
    questions: Sequence[Question],
    predictions: Sequence[Prediction],
    measurements: dict[str, dict[str, float]],
    rag_settings: Mapping[int, Mapping[str, Any]],
    metric: str,
    main_arm: str,
) -> int:
    """Write the results, the tests and the report. Returns the exit status."""
    from cas.evaluation.arms import Arm
    from cas.evaluation.metrics import METRICS
    from cas.evaluation.recording import flags, write_run
    from cas.report.costs import training_cost
    from cas.report.pages import write_pages
    from cas.report.rag_baseline import Setting
    from cas.report.view import by_kind, pairs_to_test

    config, model, store, collection = comparison.config, comparison.model, comparison.store, comparison.collection
    arms = [Arm.parse(name) for name in dict.fromkeys(p["arm"] for p in predictions)]
    kinds = {q.id: q.kind or "" for q in questions}
    published = asdict(config) | {"store": "DIR", "output": "DIR"}
    for name in ("isolated", "monolithic"):
        published[name] = published[name] and "DIR"
    if config.model is not None and Path(config.model).exists():
        published["model"] = "MODEL"
    if config.collection is not None and Path(config.collection).exists():
        published["collection"] = _public(config.collection)
    rows = store.answering().values()
    run = write_run(
        Path(config.output),
        name="rag_vs_cas",
        command="python -m cas.report " + flags(Config(**published)),
        seeds=[config.seed],
        model="embedded reader" if model.reader else model.source.name,
        collection={"name": config.name or collection.name, "sha256": collection.hash},
        settings={
            **published,
            "metric": metric,
            "main_arm": main_arm,
            "notes": list(comparison.notes),
            "cost": training_cost(store),
            "kinds": kinds,
            "rag": {str(b): {**s, "said": str(Setting(**s["best"]))} for b, s in rag_settings.items()},
            "documents": len(collection),
            "tokens": sum(r.tokens for r in rows),
            "positions": sum(r.p for r in rows),
            "questions": len(questions),
        },
        predictions=predictions,
        compare=[(str(a), str(b)) for a, b in pairs_to_test(arms, Arm.parse(main_arm), measurements)],
        metric_names=[*METRICS, "rouge_l", "chrf"],
        extra_metrics=measurements | by_kind(predictions, kinds, metric),
        keep_answers=not config.no_text,
    )
    texts = {} if config.no_text else {q.id: (q.question, q.answers[0]) for q in questions}
    write_pages(Path(config.output), run, predictions, texts)
    print(f"written     {config.output}/report.html, report.md, results.json, predictions.jsonl")
    return 0


if __name__ == "__main__":
    sys.exit(main())
