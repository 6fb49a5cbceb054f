"""What answering and training cost: seconds of one question at a time under every arm, and of all work on a store."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from cas.data.collection import Question
from cas.evaluation.arms import Arm
from cas.evaluation.metrics import interval, percentile
from cas.model.decoding import Prompt, generate
from cas.report.arms import Comparison
from cas.store.store import Store
from retrieval import Embedder

ENOUGH = 30.0  # seconds of answers after which an arm is timed no more
TIMINGS = ("retrieve_s", "first_token_s", "answer_s")


def time_arms(comparison: Comparison, embedder: Embedder, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Seconds until cartridges or text are retrieved, until the first token, and until the end of the answer.

    Every arm in turn answers every question alone. Nothing is kept from one question to the next: cartridges are read
    from the store, texts are prefilled again. The first question of every arm is asked once before, untimed.

    Args:
        embedder: one without a cache.
    Returns: ``<arm>.<timing>`` of :data:`TIMINGS`, with intervals; and the same with ``_p50`` and ``_p95``.
    """
    laps: dict[Arm, list[tuple[float, float, float]]] = {arm: [] for arm in comparison.arms()}
    for arm in laps:
        _time_answer(comparison, embedder, arm, questions[0])
    for question in questions:
        for arm, timed in laps.items():
            if sum(lap[2] for lap in timed) < ENOUGH:
                timed.append(_time_answer(comparison, embedder, arm, question))
    documents = [q.document_ids[0] for q in questions]
    figures: dict[str, dict[str, float]] = {}
    for arm, timed in laps.items():
        for name, values in zip(TIMINGS, zip(*timed, strict=True), strict=True):
            figures[f"{arm}.{name}"] = asdict(interval(values, documents[: len(values)]))
            figures |= {f"{arm}.{name}_p{p}": asdict(percentile(values, p / 100)) for p in (50, 95)}
    return figures


def _time_answer(
    comparison: Comparison, embedder: Embedder, arm: Arm, question: Question
) -> tuple[float, float, float]:
    """Seconds from the question to what :data:`TIMINGS` names."""
    model, store = comparison.model, comparison.store_of(arm)
    precomputed: Mapping[str, Tensor] = {}
    layout = store.layout
    if arm.kind == "compressed":  # computed before the question, as a cartridge is
        [(_, [prompt], precomputed, layout)] = comparison.groups(arm, [question])
    started, first_token = time.perf_counter(), 0.0
    if arm.kind in ("rag", "cas"):
        embedder.embed_queries([question.question])  # the comparison's own embedder has it in its cache
    if arm.kind in ("full_document", "truncated"):
        [(_, [prompt], tokens)] = comparison.shared_texts(arm, [question])
        prompt = Prompt((*tokens, *prompt.tokens))
    elif not precomputed:
        [prompt] = comparison.prompts(arm, [question])
    retrieved = time.perf_counter()
    kv = precomputed or {i: store.cartridge(i).to(model.device, model.dtype) for i in prompt.cartridges}

    def on_token(*_: int) -> None:
        nonlocal first_token
        first_token = first_token or time.perf_counter()

    generate(model, [prompt], kv, layout, max_new_tokens=comparison.config.max_new_tokens, on_token=on_token)
    ended = time.perf_counter()
    return retrieved - started, (first_token or ended) - started, ended - started


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log, without lines that were cut short: a disk was full, or whoever wrote them was killed."""
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            yield json.loads(line)


def training_cost(store: Store) -> dict[str, Any]:
    """What a store cost: seconds of self-study, of initialization (None where its folder does not say) and of training,
    and training's conversation tokens and steps."""
    durations: dict[str, float] = {}
    file = store.folder / "seconds.jsonl"
    for entry in _lines(file) if file.exists() else ():
        durations[entry["what"]] = durations.get(entry["what"], 0.0) + entry["seconds"]
    steps, seconds = 0, 0.0
    for log in store.folder.glob("metrics*.jsonl"):  # of every round
        for entry in _lines(log):
            steps, seconds = steps + 1, seconds + entry["tokens"] / entry["tokens_per_s"]
    rows = store.rows().values()
    spent = {
        "self_study_s": durations.get("self-study"),
        "starts_s": durations.get("starts"),
        "training_s": seconds if steps else None,
    }
    return {key: value if value is None else round(value, 1) for key, value in spent.items()} | {
        "steps": steps,
        "trained_tokens": sum(r.trained_tokens for r in rows),
        "adam_steps_each": sum(r.steps for r in rows) / len(rows),
        "conversations_shown_each": sum(r.drawn for r in rows) / len(rows),
    }
