"""Write docs/worlds.md: ``python docs/make_worlds.py`` (a test compares the two)."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from cas.collection import Question
from cas.niah import niah
from cas.worlds import world

RESULTS = Path(__file__).parents[1] / "experiments" / "results" / "reader"


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
use, and come in four kinds, reported apart: *lookup* (the text names the subject beside the fact), *indirect* (it says "she"
or "the porter"), *whole document* (comparing, counting, listing) and *two documents*.

## A page

**{document.title}** (`{document.id}`)

{_quoted(document.text)}

## Its gold questions

{_table([q for q in found.questions if q.document_ids[0] == document.id])}

## Needles in a haystack

`--collection niah` has 64 documents of at least 3,000 words (some hundred more), `niah:8000` of at least 8,000: keys with one number each (*multi-key*), a key with
several words (*multi-value*), chains of variables (*variable tracking*), between sentences that tell nothing. The
beginning of one of `niah:300`:

{_quoted(needles.documents[0].text[:420].rpartition(".")[0] + ". …")}

{_table(needles.questions)}
{_reader()}"""


def _quoted(text: str) -> str:
    return "\n>\n".join(f"> {paragraph}" for paragraph in text.split("\n\n"))


def _table(questions: list[Question] | tuple[Question, ...]) -> str:
    rows = [f"| {q.kind} | {q.question} | {q.answers[0]} |" for q in questions]
    return "\n".join(["| kind | question | answer |", "|---|---|---|", *rows])


def _reader() -> str:
    """The curve and the figures of the newest recorded reader, if there is one."""
    curves = sorted(RESULTS.glob("*/curve.jsonl"))
    if not curves:
        return ""
    lines = [json.loads(line) for line in curves[-1].read_text().splitlines()]
    shown = [lines[round(i * (len(lines) - 1) / 14)] for i in range(15)] if len(lines) > 15 else lines
    rows = []
    for line in shown:
        right: Counter[str] = Counter()
        seen: Counter[str] = Counter()
        for kind, (share, n) in line["exact"].items():
            name = "lookup, one document" if kind == "lookup" else "lookup, several" if "lookup x" in kind else "rest"
            right[name] += share * n
            seen[name] += n
        cells = [
            f"{100 * right[n] / seen[n]:.0f}" if seen[n] else "" for n in ("lookup, one document", "lookup, several")
        ]
        rows.append(f"| {line['tokens'] / 1e6:.1f} | {line['level']} | {line['loss']:.3f} | {cells[0]} | {cells[1]} |")
    metrics = json.loads((curves[-1].parent / "results.json").read_text())["metrics"]
    figures = [
        f"| {name} | {m['exact_match']['mean']:.1f} | {m['exact_match']['low']:.1f} to {m['exact_match']['high']:.1f} |"
        for name, m in metrics.items()
        if "_minus_" not in name
    ]
    table = "\n".join(
        ["| million tokens | level | loss | lookup, one text | lookup, several |", "|---|---|---|---|---|", *rows]
    )
    read = "\n".join(["| arm | exact match, % | 95 % |", "|---|---|---|", *figures])
    return f"""
## The reader's curve

Trained by `python -m experiments.train_reader`; exact match (%) of whole answers in training scenes of the present level and below.

{table}

Measured by `python -m experiments.reader` on a world it never saw (`experiments/results/reader/{curves[-1].parent.name}`):

{read}
"""


if __name__ == "__main__":
    Path(__file__).with_name("worlds.md").write_text(text(), encoding="utf-8")
