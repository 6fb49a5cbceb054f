"""Write docs/worlds.md: ``python docs/make_worlds.py`` (a test compares the two)."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

from cas.data.collection import Question
from cas.data.niah import niah
from cas.data.worlds import world

RUNS = Path(__file__).parents[1] / "experiments" / "results" / "reader"
# Rows of the curve end at so many million tokens.
MARKS = (1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300)
KINDS = {"card": "lists", "pair": "lists", "row": "lists"}


def text() -> str:
    """The page."""
    found = world(0, 2)
    document = found.documents[0]
    needles = niah(0, 300, 1)
    return f"""# Worlds

Made by `python docs/make_worlds.py`.

`--collection million_tokens` is a fictional world: 1,664 documents of about 620 words and marks each, more than a million
tokens of any model, a function of `--collection-seed` alone. Every document is the record of one place, the people who work
there and an event. Facts are told by name, by role or by pronoun, among sentences that tell nothing. All documents look
alike and share values and parts of names, so that they distract from one another; names are put together from syllables,
so that no model can know anything about their bearers. Gold questions use wordings that neither documents nor self-study
use, and come in four kinds: *lookup* (the text names the subject beside the fact), *indirect* (it says "she"
or "the porter"), *whole document* (comparing, counting, listing) and *two documents*.

## A page

**{document.title}** (`{document.id}`)

{_quoted(document.text)}

## Its gold questions

{_table([q for q in found.questions if q.document_ids[0] == document.id])}

## Needles in a haystack

`--collection niah` has 64 documents of at least 3,000 words (some hundred more), `niah:8000` of at least 8,000:
keys with one number each (*multi-key*), a key with
several words (*multi-value*), chains of variables (*variable tracking*), between sentences that tell nothing. The
beginning of one of `niah:300`:

{_quoted(needles.documents[0].text[:420].rpartition(".")[0] + ". …")}

{_table(needles.questions)}

## The reader

`--model reader`, the default for `million_tokens`, is a Llama of 4.8 million parameters with its own tokenizer and chat template
(`cas/reader`, less than 10 MB). It was trained from scratch on worlds of other seeds, where it answered questions in all
wordings, those of gold questions too; self-study has it write in the training wordings alone. It can read these worlds and
nothing else. With it, a CPU trains cartridges of a few documents in minutes.

{_reader(max(RUNS.glob("*/results.json")))}
"""


def _reader(run: Path) -> str:
    """What a recorded run measured, and the curve of the training before it."""
    found = json.loads(run.read_text(encoding="utf-8"))
    metrics = {key.removesuffix(".exact_match"): m for key, m in found["metrics"].items()}
    rows = [f"| {k} | {m['mean']:.1f} [{m['low']:.1f}, {m['high']:.1f}] | {m['n']} |" for k, m in metrics.items()]
    return f"""Whole answers that are exactly right, in percent, on a world it never saw (`{found["command"]}`, seed
{found["seeds"][0]}, {found["date"][:10]}, [recorded run](../{run.relative_to(RUNS.parents[2]).as_posix()})). Arms ask
lookups if their names do not end in another kind; `chunk512` has up to 512 tokens around the answer, `rag_shaped` about 100
of them among parts of five other documents; `documents4` has four whole documents loaded, each prefilled by itself, at `fixed`
positions, `_offset` at offset ones, `_text` has them in one text; `_minus_` are differences on the same questions.

| arm | exact match | questions |
|---|---|---|
{chr(10).join(rows)}

Its training (`python -m experiments.train_reader`, in several goes: see the [LOG](../experiments/LOG.md)): percent of whole
answers that were exactly right, in scenes it had never seen, while it learned from them. Scenes grow
from level 0 (lists of names and values) to 7 (up to twelve whole documents).

{_curve(run.with_name("curve.jsonl"))}
"""


def _curve(file: Path) -> str:
    """The training's own figures, a row for all lines between two marks."""
    columns = (
        "lists",
        "lookup",
        "lookup in 2-12 texts",
        "indirect",
        "whole document",
        "two documents",
        "summary",
        "write",
    )
    rows = [f"| million tokens | level | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for low, high in zip((0, *MARKS), MARKS):
        some = [line for line in lines if low * 1e6 < line["tokens"] <= high * 1e6]
        hits: dict[str, float] = defaultdict(float)
        asked: dict[str, int] = defaultdict(int)
        for line in some:
            for key, (share, n) in line["exact"].items():
                kind, _, texts = key.partition(" x")
                name = KINDS.get(kind, "lookup in 2-12 texts" if kind == "lookup" and texts else kind)
                hits[name] += share * n
                asked[name] += n
        if some:
            shares = [f"{100 * hits[c] / asked[c]:.1f}" if asked[c] else "" for c in columns]
            rows.append(f"| {some[-1]['tokens'] / 1e6:.1f} | {some[-1]['level']} | {' | '.join(shares)} |")
    return "\n".join(rows)


def _quoted(text: str) -> str:
    return "\n>\n".join(f"> {paragraph}" for paragraph in text.split("\n\n"))


def _table(questions: list[Question] | tuple[Question, ...]) -> str:
    rows = [f"| {q.kind} | {q.question} | {q.answers[0]} |" for q in questions]
    return "\n".join(["| kind | question | answer |", "|---|---|---|", *rows])


if __name__ == "__main__":
    Path(__file__).with_name("worlds.md").write_text(text(), encoding="utf-8")
