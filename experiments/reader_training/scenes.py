"""What the embedded reader is trained on: scenes of fictional worlds, from lists of names to twelve documents.

A *scene* is some texts, each prefilled by itself, and exchanges (a user's message and the answer) that see one or
several of them. Four kinds of scene come equally often: one whole document, or several loaded like composed cartridges,
at the same positions and invisible to each other; retrieved chunks of several documents in one text; a chunk
with requests to write questions about it; a chunk with questions to answer. A fifth kind, lists of names and values,
teaches what matching is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from cas.data.lexicon import FIRST, LAST, PERSON
from cas.data.worlds import SUMMARY, Asked, Record, Shape, make_records, single, summary, two, whole
from retrieval.chunk import split_sentences, with_title

KINDS = ("whole", "rag", "write", "answer", "lists")
SEED_KINDS = ("question", "structuring", "use case", "creative")  # in the order of an attribute's wordings
NOTHING = "Nothing."  # the answer about a sentence that states no fact; self-study drops it


@dataclass(frozen=True)
class Exchange:
    """A user's message, the answer, the texts of the scene that these see, and the facts they need (Asked.facts)."""

    kind: str
    user: str
    answer: str
    texts: tuple[int, ...]
    facts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Statement:
    """Where a text states a value of a subject, and its last mention of the subject's name before: ranges of
    characters."""

    text: int
    subject: str
    value: str
    first: tuple[int, int]  # the name's first word
    last: tuple[int, int]  # and its last
    at: tuple[int, int]


@dataclass(frozen=True)
class Scene:
    """Texts, each prefilled by itself behind the header, exchanges about them, and what the texts state where."""

    texts: tuple[str, ...]
    exchanges: tuple[Exchange, ...]
    statements: tuple[Statement, ...] = ()


SMALL = Shape(people=(1, 1), facts=(2, 3), place_facts=(1, 2), event_facts=(0, 0), filler=0.0, indirect=0.0)
# Shape of the records, most documents loaded side by side, most chunks in one text.
LEVELS: tuple[tuple[Shape, int, int], ...] = (
    (SMALL, 2, 2),  # lists alone
    (SMALL, 2, 2),
    (replace(SMALL, people=(1, 2), facts=(2, 3)), 3, 3),
    (replace(SMALL, people=(2, 3), facts=(3, 4), indirect=0.1), 4, 4),
    (replace(SMALL, people=(2, 3), facts=(4, 4), event_facts=(0, 3), filler=0.1, indirect=0.3), 6, 5),
    (Shape((3, 5), (3, 5), (2, 5), (0, 4), 0.2, 0.4), 8, 6),
    (Shape((4, 8), (4, 6), (3, 6), (2, 4), 0.3, 0.5), 10, 8),
    (Shape(), 12, 8),
)


def scenes(seed: int, level: int, start: int = 0) -> Iterator[Scene]:
    """Endless scenes, a function of seed and number alone: half at ``level``, the rest at any level up to it."""
    number = start
    while True:
        random = Random(f"reader/{seed}/{number}")
        chosen = level if random.random() < 0.5 else random.randint(0, level)
        shape, side_by_side, chunks = LEVELS[chosen]
        kind = KINDS[number % 5] if chosen else "lists"
        yield _scene(random, f"reader/{seed}/{number}", kind, shape, side_by_side, chunks)
        number += 1


def _scene(random: Random, seed: str, kind: str, shape: Shape, side_by_side: int, chunks: int) -> Scene:
    if kind == "lists":
        return _lists(random, side_by_side)
    if kind == "whole":
        count = random.randint(2, side_by_side) if random.random() < 0.6 else 1
        records = list(make_records(seed, 0, shape, count))
        texts = tuple(with_title(r.document.title, r.document.text) for r in records)
        joined = random.random() < 0.25  # all of them as one text
        exchanges = []
        for i, record in enumerate(records):
            sums = _summaries(record, texts[i])
            asked = [*single(record), *random.sample(sums, min(1, len(sums)))]
            every = list(whole(record, random))
            pairs = two(record, records[(i + 1) % count]) if count > 1 else ()
            visible = (0,) if joined else tuple(range(count))
            chosen = random.sample(asked, min(len(asked), max(2, 20 // count)))
            chosen += random.sample(every, min(len(every), max(1, 4 // count)))
            exchanges += [_exchange(random, a, visible if joined or random.random() < 0.8 else (i,)) for a in chosen]
            two_asked = list(pairs)
            exchanges += [_exchange(random, a, visible) for a in random.sample(two_asked, min(2, len(two_asked)))]
        texts = ("\n\n".join(texts),) if joined else texts
        return Scene(texts, tuple(exchanges), tuple(_statements(records, texts)))
    records = list(make_records(seed, 0, shape, random.randint(2, 4) if kind == "rag" else 2))
    if kind == "rag":
        pieces = [(r, chunk) for r in records for chunk in _chunks(random, r.document.text, random.randint(2, 8))]
        pieces = random.sample(pieces, min(len(pieces), chunks))
        text = "\n\n".join(with_title(r.document.title, chunk) for r, chunk in pieces)
        asked = [a for r in records for a in _questions_in(r, [c for record, c in pieces if record is r])]
        chosen = random.sample(asked, min(len(asked), 16))
        return Scene((text,), tuple(_exchange(random, a, (0,)) for a in chosen), tuple(_statements(records, (text,))))
    record = records[0]
    sentences = split_sentences(record.document.text)
    size = random.randint(min(4, len(sentences)), min(40, len(sentences)))
    low = random.randint(0, len(sentences) - size)
    chunk = record.document.text[sentences[low][0] : sentences[low + size - 1][1]].strip()
    text = with_title(record.document.title, chunk)
    asked = [*_questions_in(record, [chunk]), *_summaries(record, text)]
    random.shuffle(asked)
    statements = tuple(_statements([record], (text,)))
    if kind == "answer":
        return Scene((text,), tuple(_exchange(random, a, (0,)) for a in asked[:16]), statements)
    exchanges = []
    for a in asked[:16]:
        which = random.randrange(len(a.sentences))
        sentence, fact = a.sentences[which], a.facts[which]
        if chunk.count(sentence) == 1:  # else its subject is ambiguous
            number = random.randrange(len(a.asks))
            seed = "summarisation" if a.kind == SUMMARY else SEED_KINDS[number]
            exchanges.append(Exchange("write", f"{seed}: {sentence}", a.asks[number], (0,), (fact,)))
    telling = {s for a in single(record) for s in a.sentences}
    silent = [s for a, b in sentences[low : low + size] if (s := record.document.text[a:b].strip()) not in telling]
    for sentence in random.sample(silent, min(2, len(silent))):
        seed = random.choice(("summarisation", *SEED_KINDS))
        exchanges.append(Exchange("write", f"{seed}: {sentence}", NOTHING, (0,)))
    return Scene((text,), tuple(exchanges), statements)


def _exchange(random: Random, a: Asked, texts: tuple[int, ...]) -> Exchange:
    return Exchange(a.kind, random.choice((*a.asks, *a.tests)), a.answer, texts, a.facts)


def _statements(records: Sequence[Record], texts: Sequence[str]) -> Iterator[Statement]:
    """Every fact of the records that the texts state in a paragraph that names its subject before."""
    facts = [(s.name, f.value, f.sentence) for r in records for s in r.subjects for f in s.told.values()]
    facts += [(r.place.name, r.founder.name, r.founded) for r in records if r.founder is not None]
    for number, text in enumerate(texts):
        start = 0
        for paragraph in text.split("\n\n"):
            for subject, value, sentence in facts:
                at = paragraph.find(sentence)
                if at >= 0:
                    at += sentence.rindex(value)
                    words = subject.removeprefix("the ").split()
                    last = _before(paragraph, words[-1], at)
                    first = _before(paragraph, words[0], at) or last
                    if last and first:
                        spans = [(start + a, start + b) for a, b in (first, last, (at, at + len(value)))]
                        yield Statement(number, subject, value, *spans)
            start += len(paragraph) + 2


def _before(text: str, word: str, end: int) -> tuple[int, int] | None:
    """The last place of a word in ``text[:end]``."""
    at = text.rfind(word, 0, end)
    return (at, at + len(word)) if at >= 0 else None


def _questions_in(record: Record, chunks: Sequence[str]) -> Iterator[Asked]:
    """Questions whose answer one of the chunks states, together with the subject's full name."""
    stated = {(chunks[t.text], t.subject, t.value) for t in _statements([record], chunks)}
    for a in single(record):
        if any((chunk, a.subject, a.answer) in stated and a.subject.lower() in chunk.lower() for chunk in chunks):
            yield a


def _summaries(record: Record, text: str) -> list[Asked]:
    return [a for subject in record.subjects if (a := summary(subject, text)) is not None]


def _chunks(random: Random, text: str, size: int) -> list[str]:
    sentences = split_sentences(text)
    groups = [sentences[i : i + size] for i in range(0, len(sentences), size)]
    return [text[group[0][0] : group[-1][1]].strip() for group in groups]


def _lists(random: Random, side_by_side: int) -> Scene:
    """Values by name, by name and attribute, or by attribute under a name's heading: what matching is, with no prose
    around.

    The few attributes come back under every name, so that neither name nor attribute alone finds a value.
    """
    count, each, style = random.randint(1, side_by_side), random.randint(2, 6), random.choice(("pair", "row", "card"))
    firsts, lasts = (random.sample(names, count * each // 2 + 2) for names in (FIRST, LAST))
    names = random.sample([f"{a} {b}" for a in firsts for b in lasts], count * each)
    kinds = [a for a in PERSON if a.values]
    kinds = random.sample(kinds, 1 if style == "pair" else random.randint(2, 3))
    values = {(n, a.name): random.choice(a.values or ()) for n in names for a in kinds}
    lines = {
        "pair": lambda n: [f"{n}: {values[n, kinds[0].name]}"],
        "row": lambda n: [f"{n}, {a.name}: {values[n, a.name]}" for a in random.sample(kinds, len(kinds))],
        "card": lambda n: [n, *(f"{a.name}: {values[n, a.name]}" for a in random.sample(kinds, len(kinds)))],
    }[style]
    texts: list[str] = []
    for i in range(count):
        # Repeated in another order: predicting the repetition is matching too, and every token of it trains.
        for again in range(random.choice((1, 2, 2))):
            rows = [lines(n) for n in random.sample(names[i::count], len(names[i::count]))]
            flat = [row for group in rows for row in group]
            part = "\n".join(random.sample(flat, len(flat)) if style == "row" else flat)
            texts[i:] = [part if not again else f"{texts[i]}\n{part}"]
    asked = random.sample(list(values), min(12, len(values)))
    return Scene(
        tuple(texts),
        tuple(
            Exchange(
                style, n if style == "pair" else f"{n}, {a}", values[n, a], tuple(range(count)), ((n, values[n, a]),)
            )
            for n, a in asked
        ),
        tuple(statement for i, text in enumerate(texts) for statement in _list_statements(i, text)),
    )


def _list_statements(number: int, text: str) -> Iterator[Statement]:
    """The statements of a list: a value after a colon, of the name in the line or in the heading."""
    start, name, at = 0, "", 0
    for line in text.split("\n"):
        left, colon, value = line.rpartition(": ")
        if not colon or (left.count(" ") and left[0].isupper()):
            name, at = (left if colon else line).split(",")[0], start
        if colon:
            end, split = start + len(line), at + name.index(" ")
            yield Statement(number, name, value, (at, split), (split + 1, at + len(name)), (end - len(value), end))
        start += len(line) + 1
