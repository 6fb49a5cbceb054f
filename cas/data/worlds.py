"""Fictional worlds: collections of any size in plain English, with gold questions that only their documents answer.

A world is a function of its seed. Every document is the record of one place, the people who work there and an event: facts in
varied sentences, told by name, by role or by pronoun, among sentences that tell nothing. All documents look alike, share
values and parts of names, and refer to each other in pairs, so that they distract from one another. Gold questions use wordings
that documents and self-study never use; see :class:`cas.data.lexicon.Attribute`.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random

from cas.data.collection import Collection
from cas.data.documents import Document, Question
from cas.data.lexicon import (
    CONTESTS,
    EVENT,
    EVENTS,
    FILLERS,
    FIRST,
    LAST,
    ORGANISATIONS,
    PERSON,
    PLACE,
    ROLES,
    Attribute,
)

LOOKUP, INDIRECT, WHOLE, TWO, SUMMARY = "lookup", "indirect", "whole document", "two documents", "summary"
BY_NAME, BY_ROLE, BY_PRONOUN = "name", "role", "pronoun"
FOUNDER_ASKS = (
    "Who founded {s}?",
    "Name the founder of {s}.",
    "For the plaque I need to know who founded {s}.",
    "Quiz time: whose work is {s}?",
)
NUMBERS = ["no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
MILLION_TOKENS = 1664  # documents of about 620 words and marks each, so of no fewer tokens of any model


@dataclass(frozen=True)
class Shape:
    """How large documents are: people, facts told of each person, of the place and of the event, and sentences without
    facts for every one with. Ranges are inclusive."""

    people: tuple[int, int] = (7, 8)
    facts: tuple[int, int] = (5, 6)
    place_facts: tuple[int, int] = (5, 6)
    event_facts: tuple[int, int] = (3, 4)
    filler: float = 0.3
    indirect: float = 0.5  # share of facts that are told by role or pronoun


@dataclass(frozen=True)
class Fact:
    """A value, how the text names its subject, and the sentence that tells it."""

    value: str
    how: str = BY_NAME
    sentence: str = ""


@dataclass
class Subject:
    """Somebody or something with facts: ``told`` has them by attribute name, in the order of the text."""

    kind: tuple[Attribute, ...]
    name: str
    short: str  # how the text may also call it
    role: str  # "the cook", "the mill"
    pronoun: str
    told: dict[str, Fact] = field(default_factory=dict)

    def attribute(self, name: str) -> Attribute:
        return next(a for a in self.kind if a.name == name)


@dataclass
class Record:
    """One document and what is told in it. ``founder``: a person of another record."""

    document: Document
    place: Subject
    people: list[Subject]
    event: Subject | None
    common: tuple[str, str]  # attribute and value that several of the people share, or empty
    founder: Subject | None = None

    @property
    def founded(self) -> str:
        """The sentence that tells the founder, the document's first."""
        return self.document.text.split(". ")[0] + "." if self.founder else ""

    @property
    def subjects(self) -> list[Subject]:
        return [self.place, *self.people, *([self.event] if self.event else [])]


@dataclass(frozen=True)
class Asked:
    """A question and its answer, as worded for training (``asks``) and for testing (``tests``); the ``facts`` it rests
    upon, each a subject's name and a value, in the order of thought; the ``sentences`` that tell them, where all are of
    one subject."""

    kind: str
    answer: str
    asks: tuple[str, ...]
    tests: tuple[str, ...]
    facts: tuple[tuple[str, str], ...] = ()
    sentences: tuple[str, ...] = ()

    @property
    def subject(self) -> str:
        """Whom or what it asks about first."""
        return self.facts[0][0] if self.facts else ""


def world(
    seed: int,
    documents: int = MILLION_TOKENS,
    questions: int = 16,
    name: str = "million_tokens",
    shape: Shape | None = None,
) -> Collection:
    """The collection of a seed: ``documents`` records of a ``shape``, each with about ``questions`` gold questions in test wordings.

    Half of them are lookups of facts told by name, a quarter of facts told by role or pronoun, an eighth each needs the whole
    document or two documents. The first n documents of a larger world are the world of n documents (for even n).
    """
    found: list[Document] = []
    asked: list[Question] = []
    for pair in range((documents + 1) // 2):
        records = list(make_records(f"world/{seed}", pair, shape or Shape()))
        for record, other in zip(records, reversed(records)):
            if len(found) == documents:
                break
            found.append(record.document)
            alone = len(found) == documents and documents % 2 == 1
            asked += _gold(record, None if alone else other, Random(f"world/{seed}/{record.document.id}"), questions)
    return Collection(name, tuple(found), tuple(asked))


def _gold(record: Record, other: Record | None, random: Random, count: int) -> Iterator[Question]:
    """About ``count`` gold questions about one record."""
    shares = {LOOKUP: count // 2, INDIRECT: count // 4, WHOLE: max(1, count // 8), TWO: max(1, count // 8)}
    every = [*single(record), *whole(record, random), *(two(record, other) if other else ())]
    random.shuffle(every)
    number = 0
    for kind, share in shares.items():
        for item in [a for a in every if a.kind == kind][:share]:
            ids = [record.document.id, *([other.document.id] if kind == TWO and other else [])]
            wording = random.choice(item.tests)
            yield Question(f"{record.document.id}/{number:02d}", tuple(ids), wording, (item.answer,), None, kind)
            number += 1


# -- questions ----------------------------------------------------------------------------------------------------------


def single(record: Record) -> Iterator[Asked]:
    """Every fact of a record as a question."""
    for subject in record.subjects:
        for name, fact in subject.told.items():
            a = subject.attribute(name)
            fill = _filler(s=subject.name)
            kind = LOOKUP if fact.how == BY_NAME else INDIRECT
            told = ((subject.name, fact.value),)
            yield Asked(kind, fact.value, fill(a.asks), fill(a.tests), told, (fact.sentence,))
    if record.founder is not None:
        fill = _filler(s=record.place.name)
        yield Asked(
            LOOKUP,
            record.founder.name,
            fill(FOUNDER_ASKS),
            fill(("To whom does {s} owe its existence?", "Which person started {s}?")),
            ((record.place.name, record.founder.name),),
            (record.founded,),
        )


def summary(subject: Subject, text: str) -> Asked | None:
    """What ``text`` tells of a subject, in its order: "pet: goat; coat: red". None if it tells less than two things."""
    facts = {name: fact for name, fact in subject.told.items() if fact.sentence in text}
    if len(facts) < 2 or subject.name.lower() not in text.lower():
        return None
    return Asked(
        SUMMARY,
        "; ".join(f"{name}: {fact.value}" for name, fact in facts.items()),
        _filler(s=subject.name)(("Sum up what is told of {s}.",)),
        (),
        tuple((subject.name, fact.value) for fact in facts.values()),
        tuple(fact.sentence for fact in facts.values()),
    )


def whole(record: Record, random: Random) -> Iterator[Asked]:
    """Questions that need several places of a record: comparing, counting, listing."""
    born = {p.name: int(p.told["birth year"].value) for p in record.people if "birth year" in p.told}
    pairs = [(a, b) for a in born for b in born if born[a] != born[b]]
    for a, b in random.sample(pairs, min(2, len(pairs))):
        fill = _filler(a=a, b=b)
        yield Asked(
            WHOLE,
            min(a, b, key=born.__getitem__),
            fill(("Who is older, {a} or {b}?", "Name the older one of {a} and {b}.")),
            fill(("Which of the two was born first, {a} or {b}?", "Of {a} and {b}, who has lived longer?")),
            ((a, str(born[a])), (b, str(born[b]))),
        )
    fill = _filler(p=record.place.name)
    yield Asked(
        WHOLE,
        NUMBERS[len(record.people)],
        fill(("How many people work at {p}?", "Give the number of people who work at {p}.")),
        fill(("What is the size of the staff of {p}?", "Of how many heads does the staff of {p} consist?")),
    )
    name, value = record.common
    if not name:
        return
    sharing = [p.name for p in record.people if name in p.told and p.told[name].value == value]
    told = tuple((person, value) for person in sharing)
    fill = _filler(p=record.place.name, a=name, v=value)
    yield Asked(
        WHOLE,
        listed(sharing),
        fill(("List the people at {p} whose {a} is {v}.", "Who at {p} has {v} for {a}?")),
        fill(("Which people at {p} share the {a} {v}?", "{v} is the {a} of which people at {p}?")),
        told,
    )
    yield Asked(
        WHOLE,
        NUMBERS[len(sharing)],
        fill(("Count the people at {p} whose {a} is {v}.", "How many at {p} have {v} for {a}?")),
        fill(("What is the number of people at {p} with the {a} {v}?", "{v} is the {a} of how many people at {p}?")),
        told,
    )


def two(record: Record, other: Record) -> Iterator[Asked]:
    """Questions that need two records: facts about a founder told elsewhere, and which place is older."""
    if record.founder is not None and record.founder in other.people:
        for name, fact in record.founder.told.items():
            a = record.founder.attribute(name)
            fill = _filler(s=f"the founder of {record.place.name}")
            told = ((record.place.name, record.founder.name), (record.founder.name, fact.value))
            yield Asked(TWO, fact.value, fill(a.asks), fill(a.tests), told)
    years = [r.place.told["founding year"].value for r in (record, other) if "founding year" in r.place.told]
    if len(set(years)) == 2:
        fill = _filler(a=record.place.name, b=other.place.name)
        yield Asked(
            TWO,
            (record if years[0] < years[1] else other).place.name,
            fill(("Which is older, {a} or {b}?", "Name the older one of {a} and {b}.")),
            fill(("Which of the two was there first, {a} or {b}?", "Of {a} and {b}, which one has existed longer?")),
            ((record.place.name, years[0]), (other.place.name, years[1])),
        )


def _filler(**words: str) -> Callable[[Sequence[str]], tuple[str, ...]]:
    def fill(wordings: Sequence[str]) -> tuple[str, ...]:
        return tuple(_upper(w.format(**words)) for w in wordings)

    return fill


def listed(names: Sequence[str]) -> str:
    """Several names as one answer: a, b and c."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


# -- documents ----------------------------------------------------------------------------------------------------------


def make_records(seed: str, group: int, shape: Shape, size: int = 2) -> Iterator[Record]:
    """The records of one group of a world, each founded by somebody of the next one. Full names and places are unique
    within a world, counted through, not drawn; names of events are drawn, and a few of a thousand come twice."""
    records = []
    for member in range(size):
        number = group * size + member
        records.append(_make_record(seed, number, Random(f"{seed}/record/{number}"), shape))
    for record, other in zip(records, [*records[1:], records[0]]):
        if other is not record and other.people:
            random = Random(f"{seed}/founder/{record.document.id}")
            record.founder = random.choice(other.people)
            said = random.choice(
                ("{s} was founded by {v}.", "{s} is the work of {v}.", "{s} was called into being by {v}.")
            )
            told = said.format(s=record.place.name, v=record.founder.name)
            record.document = Document(record.document.id, record.document.title, f"{told} {record.document.text}")
        yield record


def _make_record(seed: str, number: int, random: Random, shape: Shape) -> Record:
    place_name = _unique(seed, "place", number, LAST, ORGANISATIONS)
    noun = place_name.split()[1].lower()
    place = Subject(PLACE, place_name, place_name, f"the {noun}", "it")
    people = []
    count = random.randint(*shape.people)
    for i, role in enumerate(random.sample(ROLES, count)):
        name = _unique(seed, "person", number * 16 + i, FIRST, LAST)
        people.append(Subject(PERSON, name, name.split()[1], f"the {role}", random.choice(("he", "she"))))
    event = None
    if shape.event_facts[1]:
        name = f"the {random.choice(LAST)} {random.choice(EVENTS)} {random.choice(CONTESTS)}"
        event = Subject(EVENT, name, f"the {name.split()[-1].lower()}", f"the {name.split()[-1].lower()}", "it")
    common = _give_facts(random, shape, place, people, event)
    paragraphs = [_paragraph(random, shape, place, [])]
    for person in people:
        intro = random.choice(("{n} is {r} of {p}.", "{n} works at {p} as {r}.", "At {p}, {n} is {r}."))
        intro = intro.format(n=person.name, r=person.role, p=random.choice((place.name, place.role)))
        paragraphs.append(_paragraph(random, shape, person, [intro]))
    if event is not None:
        intro = random.choice(
            ("The people of {p} still speak of {e}.", "{p} took part in {e}.", "A picture of {e} hangs at {p}.")
        )
        paragraphs.append(_paragraph(random, shape, event, [_upper(intro.format(p=place.name, e=event.name))]))
    first, rest = paragraphs[0], paragraphs[1:]
    random.shuffle(rest)
    document = Document(f"{number:05d}", place.name, "\n\n".join([first, *rest]))
    in_order = sorted(people, key=lambda person: document.text.index(person.name))
    return Record(document, place, in_order, event, common)


def _give_facts(
    random: Random, shape: Shape, place: Subject, people: Sequence[Subject], event: Subject | None
) -> tuple[str, str]:
    """Decide every subject's facts (``how`` comes with the sentence). Returns attribute and value that several share."""
    for subject, (low, high) in (
        (place, shape.place_facts),
        *((p, shape.facts) for p in people),
        *([(event, shape.event_facts)] if event else []),
    ):
        for a in random.sample(subject.kind, min(random.randint(low, high), len(subject.kind))):
            values = a.values or tuple(p.name for p in people)
            if values:
                subject.told[a.name] = Fact(random.choice(values))
    if len(people) < 3:
        return "", ""
    a = random.choice(PERSON)
    value = random.choice(a.values)
    for person in random.sample(list(people), random.randint(2, min(4, len(people) - 1))):
        if a.name not in person.told:
            person.told.pop(random.choice(list(person.told)), None)
        person.told[a.name] = Fact(value)
    return a.name, value


def _paragraph(random: Random, shape: Shape, subject: Subject, sentences: list[str]) -> str:
    """Sentences about one subject, some told by its role or a pronoun, with others between that tell nothing."""
    clear = bool(sentences)  # whether a pronoun can only mean this subject
    facts = [(name, fact.value) for name, fact in subject.told.items()]
    random.shuffle(facts)
    subject.told.clear()
    for name, value in facts:
        if random.random() < shape.filler:
            sentences.append(random.choice(FILLERS))
        how = BY_NAME
        if random.random() < shape.indirect:
            how = BY_PRONOUN if clear and random.random() < 0.5 else BY_ROLE
        # An event's role ("the race") is clear only behind its name.
        if how == BY_ROLE and not clear:
            how = BY_NAME
        said = random.choice(subject.attribute(name).says)
        phrase = {
            BY_NAME: random.choice((subject.name, subject.short)) if clear else subject.name,
            BY_ROLE: subject.role,
            BY_PRONOUN: subject.pronoun,
        }[how]
        sentences.append(_upper(said.format(s=phrase, v=value)))
        subject.told[name] = Fact(value, how, sentences[-1])
        clear = name != "winner"  # which names somebody else
    return " ".join(sentences)


def _unique(seed: str, what: str, number: int, firsts: Sequence[str], seconds: Sequence[str]) -> str:
    """The ``number``-th of all pairs in a shuffled order of the seed's own; no pair comes twice, their parts do."""
    total = len(firsts) * len(seconds)
    assert number < total, f"a world has no more than {total} of {what}"
    half = total.bit_length() // 2 + 1
    mask = (1 << half) - 1
    while True:  # a Feistel network permutes the numbers of 2 x half bits; walk on until one of ours comes out
        left, right = number >> half, number & mask
        for turn in range(4):
            left, right = right, left ^ (zlib.crc32(f"{seed}/{what}/{turn}/{right}".encode()) & mask)
        number = left << half | right
        if number < total:
            return f"{firsts[number % len(firsts)]} {seconds[number // len(firsts)]}"


def _upper(sentence: str) -> str:
    return sentence[0].upper() + sentence[1:]
