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
    return f"""# Fictional documents

Made by `python docs/make_worlds.py`.

The demo, the benchmarks and the claims use generated documents: no model can know their contents in advance, so every
right answer comes from the document, its cartridge, or luck.

`--collection million_tokens` is a fictional world of 1,664 documents, about 620 words and punctuation marks each: more
than a million tokens for any model. `--collection-seed` alone determines it. Each document describes one place, the
people who work there and an event. Facts refer to their subject by name, by role or by pronoun, and stand among
sentences without facts. All documents look alike and share values and parts of names, so that they are easily confused.
Names are made of random syllables. Test questions use wordings that occur neither in documents nor in self-study, and
come in four kinds: *lookup* (the text names the subject next to the fact), *indirect* (it says "she" or "the porter"),
*whole document* (comparing, counting, listing) and *two documents*.

## A document

**{document.title}** (`{document.id}`)

{_quoted(document.text)}

## Its questions

{_table([q for q in found.questions if q.document_ids[0] == document.id])}

## Needles in a haystack

`--collection niah` has 64 documents of at least 3,000 words (up to a few hundred more); `niah:8000` makes them at least
8,000 words long. Among sentences without facts they hold keys with one number each (*multi-key*), a key with several
words (*multi-value*) and chains of variables (*variable tracking*). One of the documents of `niah:300` begins:

{_quoted(needles.documents[0].text[:420].rpartition(".")[0] + ". …")}

{_table(needles.questions)}

## The reader

`--model reader`, the default for `million_tokens`, is a Llama of 4.8 million parameters with its own tokenizer and chat
template (`cas/model/reader`, less than 10 MB). It was trained from scratch on worlds of other seeds, with questions in
all wordings, those of test questions included. In self-study it writes only the other wordings. It can read these
worlds and nothing else. With it, a CPU trains cartridges for a few documents in minutes.

{_reader(max(RUNS.glob("*/results.json")))}
"""


def _reader(run: Path) -> str:
    """What a recorded run measured, and the curve of the training before it."""
    found = json.loads(run.read_text(encoding="utf-8"))
    metrics = {key.removesuffix(".exact_match"): m for key, m in found["metrics"].items()}
    rows = [f"| {k} | {m['mean']:.1f} [{m['low']:.1f}, {m['high']:.1f}] | {m['n']} |" for k, m in metrics.items()]
    return f"""How often its answers match exactly, in percent, on a world it never saw (`{found["command"]}`, seed
{found["seeds"][0]}, {found["date"][:10]}, [recorded run](../{run.relative_to(RUNS.parents[2]).as_posix()})). Unless an
arm's name ends in another kind, it asks lookups. `chunk512` has up to 512 tokens of text around the answer;
`rag_shaped` has about 100 of them among passages of five other documents. `documents4` has the KV of four whole
documents loaded, each computed separately, at `fixed` positions; `_offset` has them at `offset` positions, `_text` as
one text. `_minus_` is the difference between two arms on the same questions.

| arm | exact match | questions |
|---|---|---|
{chr(10).join(rows)}

Its training (`python -m experiments.train_reader`, in several runs, see the [log](../experiments/LOG.md)): percent of
answers that match exactly, measured on each new training example before learning from it. Examples grow from level 0
(lists of names and values) to level 7 (up to twelve whole documents).

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
