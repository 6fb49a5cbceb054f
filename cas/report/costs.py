"""What answering and training cost: seconds of one question at a time under every arm, and of all work on a store."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from cas.evaluation.metrics import interval

if TYPE_CHECKING:
    from torch import Tensor

    from cas.data.collection import Question
    from cas.report.arms import Arms
    from cas.store.store import Store
    from retrieval import Embedder

ENOUGH = 30.0  # seconds of answers


def timed(arms: Arms, embedder: Embedder, questions: Sequence[Question]) -> dict[str, dict[str, float]]:
    """Seconds until cartridges or text are found, until the first token, and until the end of the answer, every arm in turn on
    every question, alone. Nothing is kept from one question to the next: cartridges are read from the store, texts are read anew.

    ``embedder``: one that does not remember. The first question of every arm is asked once more before, untimed. An arm that has
    taken :data:`ENOUGH` is asked no more.
    """
    laps: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms.names()}
    for arm in laps:
        _one(arms, embedder, arm, questions[0])
    for question in questions:
        for arm, found in laps.items():
            if sum(lap[2] for lap in found) < ENOUGH:
                found.append(_one(arms, embedder, arm, question))
    documents = [q.document_ids[0] for q in questions]
    return {
        f"{arm}.{name}": asdict(interval(values, documents[: len(values)]))
        for arm, found in laps.items()
        for name, values in zip(("retrieve_s", "first_token_s", "answer_s"), zip(*found, strict=True), strict=True)
    }


def _one(arms: Arms, embedder: Embedder, arm: str, question: Question) -> tuple[float, float, float]:
    from cas.model.decoding import Prompt, generate

    store = arms.others.get(arm.partition("_")[0], arms.store)
    ready: Mapping[str, Tensor] = {}
    layout = store.layout
    if arm == "compressed":  # as a cartridge, it was made long before the question
        [(_, [prompt], ready, layout)] = arms.groups(arm, [question])
    started, first = time.perf_counter(), 0.0
    if arm.startswith("rag") or "cas" in arm:
        embedder.embed([question.question])  # the arms' own embedder remembers it
    if arm in ("full_document", "truncated"):
        [(_, [prompt], tokens)] = arms.shared_texts(arm, [question])
        prompt = Prompt((*tokens, *prompt.tokens))
    elif not ready:
        [prompt] = arms.prompts(arm, [question])
    found = time.perf_counter()
    loaded = ready or {n: store.cartridge(n).to(arms.model.device, arms.model.dtype) for n in prompt.cartridges}

    def on_token(*_: int) -> None:
        nonlocal first
        first = first or time.perf_counter()

    most = arms.config.max_new_tokens
    generate(arms.model, [prompt], loaded, layout, max_new_tokens=most, on_token=on_token)
    ended = time.perf_counter()
    return found - started, (first or ended) - started, ended - started


def cost_of(store: Store) -> dict[str, Any]:
    """What was spent on a store: seconds of self-study, of starts (None where its folder does not say) and of training, and
    training's conversation tokens and steps."""
    spent: dict[str, float] = {}
    file = store.folder / "seconds.jsonl"
    for line in file.read_text().splitlines() if file.exists() else ():
        entry = json.loads(line)
        spent[entry["what"]] = spent.get(entry["what"], 0.0) + entry["seconds"]
    steps, seconds = 0, 0.0
    for log in store.folder.glob("metrics*.jsonl"):  # of every round
        for line in log.read_text().splitlines():
            entry = json.loads(line)
            steps, seconds = steps + 1, seconds + entry["tokens"] / entry["tokens_per_s"]
    rows = store.rows().values()
    found = {
        "self_study_s": spent.get("self-study"),
        "starts_s": spent.get("starts"),
        "training_s": seconds if steps else None,
    }
    return {k: v if v is None else round(v, 1) for k, v in found.items()} | {
        "steps": steps,
        "trained_tokens": sum(r.trained_tokens for r in rows),
        "adam_steps_each": sum(r.steps for r in rows) / len(rows),
        "conversations_shown_each": sum(r.drawn for r in rows) / len(rows),
    }
