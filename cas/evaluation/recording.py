"""The record of every experiment: ``predictions.jsonl``, a line per arm, seed and question, and ``results.json``.

Every figure under ``metrics`` follows from the predictions alone: ``python -m cas.evaluation.check`` recomputes it.
Figures that do not (seconds, bytes) are under ``measurements``.

Keys are ``<arm>.<metric>`` and ``<a>_minus_<b>.<metric>``, values ``{mean, low, high, n}``. Exact match, F1, contains,
ROUGE-L and chrF are in percent (a difference in points), log-perplexity in nats, any other score as recorded. The
records of all seeds are kept, not averaged first, and ``n`` counts them; the interval resamples documents, each with
all its questions and seeds (:func:`cas.evaluation.metrics.interval`), so asking again with another seed does not by
itself make it narrower.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from numbers import Real
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cas.errors import ConfigError, RunError, UserError
from cas.evaluation.machine import hardware, versions
from cas.evaluation.metrics import Estimate, interval, paired_difference
from cas.evaluation.privacy import refuse_private

PREDICTIONS_FILE = "predictions.jsonl"
RESULTS_FILE = "results.json"
PERCENT = frozenset({"exact_match", "f1", "contains", "rouge_l", "chrf"})  # recorded from 0 to 1, reported in percent
_BOOTSTRAP: dict[str, Any] = {"seed": 0, "resamples": 2000, "level": 0.95}
INTERVAL = {"method": "percentile bootstrap over documents", **_BOOTSTRAP}

# The fields of results.json, in order, and what each must be; the model may be any JSON value.
_FIELDS: dict[str, type] = {
    "name": str,
    "command": str,
    "date": str,
    "hardware": dict,
    "versions": dict,
    "seeds": list,
    "model": object,
    "collection": dict,
    "settings": dict,
    "metric_names": list,
    "compare": list,
    "interval": dict,
    "metrics": dict,
    "measurements": dict,
}

_ARM = re.compile(r"[\w=+-]+")
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Prediction(TypedDict):
    """One arm's answer to one question. ``scores``: metric -> finite float; those in PERCENT from 0 to 1."""

    arm: str
    seed: int
    question_id: str
    document_id: str
    scores: Mapping[str, float]
    answer: NotRequired[str]


def write_run(
    folder: str | os.PathLike[str],
    *,
    name: str,
    command: str,
    seeds: Sequence[int],
    model: Any,
    collection: Mapping[str, str],
    settings: Mapping[str, Any],
    predictions: Sequence[Prediction],
    compare: Sequence[tuple[str, str]],
    metric_names: Sequence[str],
    extra_metrics: Mapping[str, Mapping[str, float]] | None = None,
    keep_answers: bool,
) -> dict[str, Any]:
    """Write the two files of a run into ``folder``; return what ``results.json`` holds.

    ``command``: the command line that repeats the run. ``model``: its name, or a JSON value that describes it.
    ``collection``: ``{"name", "sha256"}``. ``predictions``: of all arms, each with every metric of ``metric_names``.
    ``compare``: pairs (a, b) to report as a minus b, matched by (seed, question_id); an arm that does not depend on the
    seed is recorded once for each seed of its partner. ``extra_metrics``: figures that no prediction holds,
    ``{key: {mean, low, high, n}}``. ``keep_answers``: whether the generated texts may be published with the scores.

    Nothing is written on an error: ConfigError for what :func:`refuse_private` finds and for values that are not JSON,
    UserError for predictions that are malformed, occur twice or lack their pair.
    """
    published = {
        "name": name,
        "command": command,
        "model": model,
        "collection": dict(collection),
        "settings": dict(settings),
        "metric_names": list(metric_names),
        "compare": [list(pair) for pair in compare],
        "measurements": {key: dict(figure) for key, figure in (extra_metrics or {}).items()},
    }
    refuse_private(published)
    records = _checked(predictions, metric_names, seeds)
    results = published | {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(),
        "versions": versions(),
        "seeds": list(seeds),
        "interval": INTERVAL,
        "metrics": recompute(records, metric_names, compare, seeds),
    }
    results = {field: results[field] for field in _FIELDS}
    _check_results(results)
    try:
        text = json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the model or a setting cannot be written as JSON: {error}") from error
    if not keep_answers:
        for record in records:
            record.pop("answer", None)

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # results.json marks the folder as complete: the old one is removed first, the new one is written last.
    (folder / RESULTS_FILE).unlink(missing_ok=True)
    _write_atomically(folder / PREDICTIONS_FILE, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    _write_atomically(folder / RESULTS_FILE, text + "\n")
    return results


def read_run(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], list[Prediction]]:
    """The results and the predictions of a run (these not yet checked, see :func:`recompute`).

    Raises RunError, naming the file and the line or field, when something is missing or broken.
    """
    folder = Path(folder)
    results = _parse(_read(folder / RESULTS_FILE), RESULTS_FILE)
    try:
        _check_results(results)
    except UserError as error:
        raise RunError(f"{RESULTS_FILE}: {error}") from error
    # Not splitlines: an answer may hold U+2028 and its like, which JSON does not escape.
    lines = _read(folder / PREDICTIONS_FILE).removesuffix("\n").split("\n")
    predictions: list[Any] = [_parse(line, f"{PREDICTIONS_FILE} line {n}") for n, line in enumerate(lines, start=1)]
    return results, predictions


def recompute(
    predictions: Sequence[Prediction],
    metric_names: Sequence[str],
    compare: Sequence[Sequence[str]],
    seeds: Sequence[int],
) -> dict[str, dict[str, float]]:
    """The ``metrics`` of a run, from its predictions alone; UserError when these are malformed, doubled or unpaired."""
    arms: dict[str, dict[tuple[int, str], Prediction]] = {}
    for record in _checked(predictions, metric_names, seeds):
        arms.setdefault(record["arm"], {})[record["seed"], record["question_id"]] = record
    metrics = {}
    for arm, records in arms.items():
        documents = [record["document_id"] for record in records.values()]
        for metric in metric_names:
            values = [record["scores"][metric] for record in records.values()]
            metrics[f"{arm}.{metric}"] = _in_units(metric, interval(values, documents, **_BOOTSTRAP))
    for a, b in compare:
        pairs = _pairs(arms, a, b)
        documents = [first["document_id"] for first, _ in pairs]
        for metric in metric_names:
            first_values = [first["scores"][metric] for first, _ in pairs]
            second_values = [second["scores"][metric] for _, second in pairs]
            difference = paired_difference(first_values, second_values, documents, **_BOOTSTRAP)
            metrics[f"{a}_minus_{b}.{metric}"] = _in_units(metric, difference)
    return metrics


def table(results: Mapping[str, Any], rows: Sequence[str], columns: Sequence[str]) -> str:
    """Markdown table, legible as plain text, of ``mean [low, high]``: arms (or ``a_minus_b``) down, metrics across.

    Measurements named ``<row>.<column>`` are included. A missing figure is shown as a dash; a row or a column without
    any figure is most likely a spelling mistake and raises UserError.
    """
    figures = {**results["metrics"], **results["measurements"]}
    lines = [["arm", *(f"{column}{_unit(column)}" for column in columns)]]
    lines += [[row, *(_cell(figures.get(f"{row}.{column}"), column) for column in columns)] for row in rows]
    for line in [*lines[1:], *list(zip(*lines))[1:]]:
        if set(line[1:]) == {"-"}:
            raise UserError(f"there are no figures for {line[0]}; choose from {', '.join(figures)}")
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |" for line in lines]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text) + "\n"


def flags(config: Any, *omitted: str) -> str:
    """The flags that give this configuration, a dataclass, with ``--output DIR`` and without the fields ``omitted``."""
    parts = []
    for name, value in asdict(config).items():
        if name in ("output", *omitted) or value == getattr(type(config), name, None):
            continue
        words = value if isinstance(value, tuple) else (value,)
        text = " ".join(f"{v:g}" if isinstance(value, tuple) and isinstance(v, Real) else str(v) for v in words)
        parts.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {text}"))
    return " ".join([*parts, "--output DIR"])


def is_estimate(figure: object) -> bool:
    """Whether ``figure`` is ``{mean, low, high, n}``, finite numbers and a positive whole n."""
    if not isinstance(figure, Mapping) or set(figure) != {"mean", "low", "high", "n"}:
        return False
    numbers = [v for v in figure.values() if isinstance(v, int | float) and math.isfinite(v)]
    return len(numbers) == 4 and isinstance(figure["n"], int) and figure["n"] > 0


def _unit(metric: str) -> str:
    return " (%)" if metric in PERCENT else " (nats)" if metric == "log_perplexity" else ""


def _in_units(metric: str, estimate: Estimate) -> dict[str, float]:
    scale = 100.0 if metric in PERCENT else 1.0
    return {key: value if key == "n" else value * scale for key, value in asdict(estimate).items()}


def _cell(figure: Mapping[str, float] | None, column: str) -> str:
    if figure is None:
        return "-"
    digits = 1 if column in PERCENT else 3
    return f"{figure['mean']:.{digits}f} [{figure['low']:.{digits}f}, {figure['high']:.{digits}f}]"


def _checked(predictions: Sequence[Any], metric_names: Sequence[str], seeds: Sequence[int]) -> list[Prediction]:
    """The predictions with plain float scores, which JSON gives back to the same bits; UserError for a bad one."""
    if not predictions or not metric_names:
        raise UserError("a run needs at least one prediction and one metric")
    seen = set()
    records = []
    for number, prediction in enumerate(predictions, start=1):
        problem = _problem(prediction, metric_names, seeds)
        if problem:
            raise UserError(f"prediction {number}: {problem}")
        key = prediction["arm"], prediction["seed"], prediction["question_id"]
        if key in seen:
            raise UserError(f"prediction {number}: arm {key[0]}, seed {key[1]}, question {key[2]} is there twice")
        seen.add(key)
        record: Prediction = prediction.copy()
        record["scores"] = {metric: float(score) for metric, score in record["scores"].items()}
        records.append(record)
    return records


def _problem(prediction: Mapping[str, Any], metric_names: Sequence[str], seeds: Sequence[int]) -> str | None:
    """What is wrong with one prediction, if anything."""
    required = {"arm": str, "seed": int, "question_id": str, "document_id": str, "scores": Mapping}
    for field, kind in required.items():
        if not isinstance(prediction.get(field), kind):
            return f"{field} must be a {kind.__name__}, not {prediction.get(field)!r}"
    if unknown := set(prediction) - {*required, "answer"}:
        return f"unknown field {', '.join(sorted(unknown))}; metrics go under scores"
    if not isinstance(prediction.get("answer", ""), str):
        return f"answer must be a str, not {prediction['answer']!r}"
    if not _ARM.fullmatch(prediction["arm"]) or "_minus_" in prediction["arm"]:
        return f"arm {prediction['arm']!r} must be of letters, digits and _ = + -, without '_minus_'"
    if prediction["seed"] not in seeds:
        return f"seed {prediction['seed']} is not among the seeds of the run, {list(seeds)}"
    for metric in metric_names:
        if metric not in prediction["scores"]:
            return f"arm {prediction['arm']}, question {prediction['question_id']} has no score {metric}"
    for metric, score in prediction["scores"].items():
        value = float(score) if isinstance(score, Real) else math.nan
        if not math.isfinite(value):
            return f"{metric} must be a finite number, not {score!r}"
        if metric in PERCENT and not 0 <= value <= 1:
            return f"{metric} must be from 0 to 1, not {score!r}"
    return None


def _pairs(
    arms: Mapping[str, Mapping[tuple[int, str], Prediction]], a: str, b: str
) -> list[tuple[Prediction, Prediction]]:
    for arm in (a, b):
        if arm not in arms:
            raise UserError(f"cannot compare {a} with {b}: there are no predictions of {arm}")
    for has, lacks in ((a, b), (b, a)):
        for seed, question in arms[has]:
            if (seed, question) not in arms[lacks]:
                raise UserError(f"cannot compare {a} with {b}: {lacks} lacks seed {seed}, question {question}")
    pairs = [(first, arms[b][key]) for key, first in arms[a].items()]
    for first, second in pairs:
        documents = [first["document_id"], second["document_id"]]
        if documents[0] != documents[1]:
            question = first["question_id"]
            raise UserError(f"cannot compare {a} with {b}: question {question} is about {' and '.join(documents)}")
    return pairs


def _check_results(results: Mapping[str, Any]) -> None:
    """Raise UserError when a field of ``results.json`` is missing or not of its kind; the metrics are not looked at."""
    missing = [field for field in _FIELDS if field not in results]
    if missing:
        raise UserError(f"lacks {', '.join(missing)}")
    for field, kind in _FIELDS.items():
        if not isinstance(results[field], kind):
            raise UserError(f"{field} must be a {kind.__name__}, not {results[field]!r}")
    collection = results["collection"]
    if set(collection) != {"name", "sha256"} or not all(isinstance(value, str) for value in collection.values()):
        raise UserError(f"collection must be a name and a sha256, not {collection!r}")
    if not _SHA256.fullmatch(collection["sha256"]):
        raise UserError(f"collection sha256 must be 64 hex digits, not {collection['sha256']!r}")
    if not all(isinstance(metric, str) for metric in results["metric_names"]):
        raise UserError("metric_names must be strings")
    for pair in results["compare"]:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(arm, str) for arm in pair)):
            raise UserError(f"compare must be pairs of arms, not {pair!r}")
    for key, figure in results["measurements"].items():
        if not is_estimate(figure):
            raise UserError(f"measurement {key} must be {{mean, low, high, n}}, finite, not {figure!r}")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        # A lone surrogate in a generated answer becomes \udxxx, which is how JSON writes it.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise RunError(f"{path.name} is missing") from error
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path.name} cannot be read: {error}") from error


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise RunError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise RunError(f"{where} is not a JSON object")
    return value
