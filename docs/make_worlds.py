"""Write docs/worlds.md: ``python docs/make_worlds.py`` (a test compares the two)."""

from __future__ import annotations

from pathlib import Path

from cas.collection import Question
from cas.niah import niah
from cas.worlds import world


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

`--collection niah` has 64 documents of at least 3,000 words (some hundred more), `niah:8000` of at least 8,000:
keys with one number each (*multi-key*), a key with
several words (*multi-value*), chains of variables (*variable tracking*), between sentences that tell nothing. The
beginning of one of `niah:300`:

{_quoted(needles.documents[0].text[:420].rpartition(".")[0] + ". …")}

{_table(needles.questions)}
"""


def _quoted(text: str) -> str:
    return "\n>\n".join(f"> {paragraph}" for paragraph in text.split("\n\n"))


def _table(questions: list[Question] | tuple[Question, ...]) -> str:
    rows = [f"| {q.kind} | {q.question} | {q.answers[0]} |" for q in questions]
    return "\n".join(["| kind | question | answer |", "|---|---|---|", *rows])


if __name__ == "__main__":
    Path(__file__).with_name("worlds.md").write_text(text(), encoding="utf-8")
