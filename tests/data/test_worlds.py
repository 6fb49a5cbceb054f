"""Fictional worlds: deterministic, answerable from their documents alone, and asked in words that no training uses."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path

import pytest

from cas.data.collection import Collection, save_jsonl
from cas.data.lexicon import EVENT, FILLERS, FIRST, LAST, PERSON, PLACE
from cas.data.niah import MULTI_KEY, MULTI_VALUE, TRACKING, niah
from cas.data.worlds import (
    INDIRECT,
    LOOKUP,
    MILLION_TOKENS,
    NUMBERS,
    TWO,
    WHOLE,
    Record,
    Shape,
    make_records,
    single,
    summary,
    two,
    whole,
    world,
)
from cas.errors import CollectionError
from cas.selfstudy.seed_prompts import normal

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


def test_a_million_tokens() -> None:
    """More than 600 words a document; no tokenizer makes less than a token of a word."""
    some = world(0, 32)
    words = sum(len(re.findall(r"\w+|[^\w\s]", f"{d.title} {d.text}")) for d in some.documents)
    assert words / 32 * MILLION_TOKENS > 1_000_000
    loaded = Collection.load("million_tokens", seed=5)
    assert len(loaded) == MILLION_TOKENS and loaded.select(32) == world(5, 32)


def test_exported_it_is_the_same_collection(collection: Collection, tmp_path: Path) -> None:
    save_jsonl(collection, tmp_path)
    assert Collection.load(tmp_path) == collection and Collection.load(tmp_path).hash == collection.hash


def test_needles(tmp_path: Path) -> None:
    found = niah(2, 900, 6)
    assert found == niah(2, 900, 6) and found.hash != niah(3, 900, 6).hash
    assert Counter(q.kind for q in found.questions) == {MULTI_KEY: 18, MULTI_VALUE: 6, TRACKING: 6}
    for question in found.questions:
        text = found[question.document_ids[0]].text
        items = re.split(r", | and ", question.answers[0])
        places = [text.index(f"Variable {x} is" if question.kind == TRACKING else f" is {x}.") for x in items]
        assert places == sorted(places)
        if question.kind == MULTI_KEY:
            name = question.question.removeprefix("What is the special number of ").rstrip("?")
            assert f"The special number of {name} is {items[0]}." in text and text.count("The special number of") == 8
        elif question.kind == MULTI_VALUE:
            name = question.question.removeprefix("What are all the passwords of ").rstrip("?")
            assert re.findall(rf"A password of {name} is (\w+)\.", text) == items
        else:
            value = dict(re.findall(r"Variable (\w+) is (?:the same as variable )?(\w+)\.", text))
            assert len(value) == 6 and question.question.endswith(f"{value[items[0]]}?")
            assert [value[b] for b in items[1:]] == items[:-1]
    for length in (300, 5000, 20000):
        for document in niah(0, length, 2).documents:
            assert length <= len(document.text.split()) < length + 400
    assert len(Collection.load("niah:400", seed=1)) == 64
    for wrong in ("niah:200", "niah:x", "million_tokens:9"):
        with pytest.raises(CollectionError, match="niah"):
            Collection.load(wrong)


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
            for name, fact in subject.told.items():
                a = subject.attribute(name)
                words = {"name": {subject.name, subject.short}, "role": {subject.role}, "pronoun": {subject.pronoun}}[
                    fact.how
                ]
                forms = {(s := said.format(s=w, v=fact.value))[0].upper() + s[1:] for said in a.says for w in words}
                assert forms & set(sentences) == {fact.sentence}, (record.document.id, subject.name, name)
        for asked in single(record):
            assert asked.answer in asked.sentences[0] and asked.sentences[0] in record.document.text
            assert all(asked.subject.lower() in wording.lower() for wording in (*asked.asks, *asked.tests))


def test_summaries_list_what_a_text_tells_in_its_order(records: list[Record]) -> None:
    for record in records:
        text = record.document.text
        for subject in record.subjects:
            found = summary(subject, text)
            assert found is not None and found.answer.split("; ") == [
                f"{n}: {f.value}" for n, f in subject.told.items()
            ]
            if all(text.count(s) == 1 for s in found.sentences):
                assert sorted(found.sentences, key=text.index) == list(found.sentences)
            first, second = found.sentences[:2]
            part = summary(subject, f"{subject.name} is there. {second} {first}")
            assert part is not None and part.sentences == (first, second)
            assert summary(subject, f"{subject.name} is there. {first}") is None


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
    values = Counter((a, f.value) for r in records for p in r.people for a, f in p.told.items())
    assert sum(n > 1 for n in last.values()) > 0.2 * len(last) and sum(n > 1 for n in values.values()) > 0.5 * len(
        values
    )


def test_answers_to_questions_about_the_whole(records: list[Record]) -> None:
    from random import Random

    kinds = Counter[str]()
    for record in records:
        born = {p.name: int(p.told["birth year"].value) for p in record.people if "birth year" in p.told}
        name, value = record.common
        sharing = [p.name for p in record.people if name in p.told and p.told[name].value == value]
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
