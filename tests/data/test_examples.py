"""The example documents and questions are sound (whether a model can answer them is measured elsewhere)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from cas.data.collection import Collection, Question

HARBOUR = Path(__file__).parents[2] / "examples" / "harbour"


@pytest.fixture(scope="module")
def collection() -> Collection:
    return Collection.load("examples")


@pytest.fixture(scope="module")
def validation() -> tuple[Question, ...]:
    return Collection.load(HARBOUR, HARBOUR / "validation.jsonl").questions


def test_counts(collection: Collection, validation: tuple[Question, ...]) -> None:
    assert len(collection) == 8
    assert collection.skipped == ("not read: 1 question file (validation.jsonl); cas.train --dry-run lists them",)
    ids = {document.id for document in collection.documents}
    for questions, number in ((collection.questions, 8), (validation, 2)):
        assert {question.kind for question in questions} == {"lookup"}
        assert Counter(question.document_ids for question in questions) == {(id,): number for id in ids}


def test_ids(collection: Collection, validation: tuple[Question, ...]) -> None:
    for document in collection.documents:
        assert document.id == document.title.lower().replace(" ", "-")
        assert document.text.startswith(f"# {document.title}\n")
        assert 130 <= len(document.text.split()) <= 240
    for prefix, questions in (("q", collection.questions), ("v", validation)):
        ids = [f"{question.document_ids[0]}/{prefix}" for question in questions]
        assert [re.sub(r"\d+$", "", question.id) for question in questions] == ids


def test_every_question_names_its_subject_once(collection: Collection, validation: tuple[Question, ...]) -> None:
    questions = [*collection.questions, *validation]
    assert len({re.sub(r"\W+", " ", question.question.lower()) for question in questions}) == len(questions) == 80
    for question in questions:
        subject = collection[question.document_ids[0]].title
        assert [d.title for d in collection.documents if d.title in question.question] == [subject]


def test_every_answer_is_in_its_document_only(collection: Collection, validation: tuple[Question, ...]) -> None:
    for question in (*collection.questions, *validation):
        (id,) = question.document_ids
        assert 1 <= len(question.answers[0].split()) <= 4
        for answer in question.answers:
            pattern = rf"(?<!\w){re.escape(answer)}(?!\w)"
            assert re.search(pattern, collection[id].text), (question.id, answer)
            assert not re.search(pattern, question.question), question.id
        # Another document's value must not pass for this one's.
        shortest = rf"(?<![\w:]){re.escape(question.answers[-1])}(?![\w:])"
        elsewhere = [d.id for d in collection.documents if d.id != id and re.search(shortest, d.text)]
        assert not elsewhere, (question.id, elsewhere)
