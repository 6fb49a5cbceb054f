"""Fictional worlds: deterministic, answerable from their documents alone, and asked in words that no training uses."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import pytest

from cas.collection import Collection
from cas.lexicon import EVENT, FILLERS, FIRST, LAST, PERSON, PLACE
from cas.seeds import normal
from cas.worlds import INDIRECT, LOOKUP, NUMBERS, TWO, WHOLE, Record, Shape, make_records, single, two, whole, world

COUNT = 40


@pytest.fixture(scope="module")
def collection() -> Collection:
    return world(3, COUNT)


@pytest.fixture(scope="module")
def records() -> list[Record]:
    return [record for pair in range(COUNT // 2) for record in make_records("world/3", pair, Shape())]


def test_a_world_is_a_function_of_its_seed(collection: Collection) -> None:
    assert world(3, COUNT) == collection and world(4, COUNT).hash != collection.hash
    smaller = world(3, 10)
    assert smaller.documents == collection.documents[:10]
    assert smaller.questions == collection.select(10).questions
    assert len(world(3, 9)) == 9 and all(
        set(q.document_ids) <= {d.id for d in world(3, 9).documents} for q in world(3, 9).questions
    )


def test_kinds_and_shares(collection: Collection) -> None:
    counts = Counter(q.kind for q in collection.questions)
    assert counts == {LOOKUP: COUNT * 8, INDIRECT: COUNT * 4, WHOLE: COUNT * 2, TWO: COUNT * 2}
    assert all((len(q.document_ids) == 2) == (q.kind == TWO) for q in collection.questions)
    assert len({normal(q.question) for q in collection.questions}) > 0.99 * len(collection.questions)
    most = Counter(q.answers[0] for q in collection.questions).most_common(1)[0][1]
    assert most < 0.06 * len(collection.questions)  # nothing to gain by guessing


def test_facts_stand_in_the_text_once_and_as_told(records: list[Record]) -> None:
    for record in records:
        sentences = re.split(r"(?<=\.)\s+", record.document.text)
        for subject in record.subjects:
            assert len(subject.told) >= 2
            for name, (value, how) in subject.told.items():
                a = subject.attribute(name)
                words = {"name": {subject.name, subject.short}, "role": {subject.role}, "pronoun": {subject.pronoun}}[
                    how
                ]
                forms = {(s := said.format(s=w, v=value))[0].upper() + s[1:] for said in a.says for w in words}
                assert len(forms & set(sentences)) == 1, (record.document.id, subject.name, name)


def test_a_pronoun_can_only_mean_its_subject(records: list[Record]) -> None:
    """The sentence before it, those that tell nothing left out, is about the same subject and names nobody else."""
    full = {f"{a} {b}" for a in FIRST for b in LAST}
    told = 0
    for record in records:
        for paragraph in record.document.text.split("\n\n"):
            names = {n for n in re.findall(r"[A-Z][a-z]+ [A-Z][a-z]+", paragraph) if n in full}
            sentences = [s for s in re.split(r"(?<=\.)\s+", paragraph) if s not in FILLERS]
            for before, sentence in itertools.pairwise(sentences):
                if re.match(r"(He|She|It)\b", sentence):
                    told += 1
                    assert not re.search(r"won by|victory of|first prize to", before)
                    if sentence.startswith("It"):
                        continue
                    assert len(names) == 1
            assert not re.match(r"(He|She|It)\b", sentences[0])
    assert told > 100


def test_roles_and_names_are_unique(records: list[Record]) -> None:
    names = Counter(p.name for r in records for p in r.people)
    assert names.most_common(1)[0][1] == 1
    assert len({r.place.name for r in records}) == len(records)
    for record in records:
        assert len({p.role for p in record.people}) == len(record.people)
        for person in record.people:
            assert re.search(
                rf"{person.name} (is|works).*{person.role.removeprefix('the ')}|, {person.name} is {person.role}",
                record.document.text,
            )


def test_documents_distract_from_each_other(records: list[Record]) -> None:
    """Last names and values come back in other documents, so neither alone says which document to read."""
    last = Counter(n for r in records for n in {p.short for p in r.people})
    values = Counter((a, v) for r in records for p in r.people for a, (v, _) in p.told.items())
    assert sum(n > 1 for n in last.values()) > 0.2 * len(last) and sum(n > 1 for n in values.values()) > 0.5 * len(
        values
    )


def test_answers_to_questions_about_the_whole(records: list[Record]) -> None:
    from random import Random

    kinds = Counter[str]()
    for record in records:
        born = {p.name: int(p.told["birth year"][0]) for p in record.people if "birth year" in p.told}
        name, value = record.common
        sharing = [p.name for p in record.people if p.told.get(name, ("",))[0] == value]
        assert 2 <= len(sharing) <= 4
        for asked in whole(record, Random(0)):
            if asked.asks[0].startswith("Who is older"):
                a, b = re.findall(r"[A-Z]\w+ [A-Z]\w+", asked.asks[0].removeprefix("Who"))
                assert {asked.answer} == {a if born[a] < born[b] else b} and born[a] != born[b]
                kinds["compare"] += 1
            elif asked.asks[0].startswith("List"):
                found = re.split(r", | and ", asked.answer)
                assert found == sharing  # in the order of the text
                assert [record.document.text.index(n) for n in found] == sorted(
                    record.document.text.index(n) for n in found
                )
                kinds["list"] += 1
            else:
                assert (
                    asked.answer
                    == NUMBERS[len(record.people) if asked.asks[0].startswith("How many people work") else len(sharing)]
                )
                kinds["count"] += 1
    assert min(kinds.values()) >= 30 and len(kinds) == 3


def test_two_documents_are_needed(records: list[Record]) -> None:
    for record, other in zip(records[::2], records[1::2]):
        assert record.founder in other.people and other.founder in record.people
        assert record.founder is not None and record.founder.name in record.document.text
        for asked in two(record, other):
            if "founder" in asked.asks[0]:
                assert asked.answer in other.document.text and record.place.name in asked.asks[0]
            else:
                assert asked.answer in (record.place.name, other.place.name)


def test_training_and_test_wordings_are_disjoint(collection: Collection, records: list[Record]) -> None:
    from random import Random

    trained: set[str] = set()
    for i, record in enumerate(records):
        other = records[i ^ 1]
        for asked in (*single(record), *whole(record, Random(1)), *two(record, other)):
            assert len(asked.asks) >= 2 and len(asked.tests) >= 2
            trained.update(map(normal, asked.asks))
    assert len(trained) > 5000
    assert not trained & {normal(q.question) for q in collection.questions}
    for a in (*PERSON, *PLACE, *EVENT):
        stripped = [normal(w.replace("{s}", "").replace("{v}", "")) for w in (*a.says, *a.asks, *a.tests)]
        assert len(set(stripped)) == len(stripped), a.name
