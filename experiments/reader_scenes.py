"""What the embedded reader is trained on: scenes of fictional worlds, from lists of names up to twelve documents side by side.

A *scene* is some texts, each prefilled by itself, and exchanges (a user's message and the answer) that see one or several
of them. Four kinds of scene come equally often: one whole document, or several loaded as composed cartridges would be,
at the same positions and blind to one another; retrieved chunks of several documents in one text; a chunk with requests to
write questions about it; a chunk with questions to answer. A fifth kind, lists of names and values, teaches what matching is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from cas.lexicon import FIRST, LAST, PERSON
from cas.worlds import SUMMARY, Asked, Record, Shape, make_records, single, summary, two, whole
from retrieval.chunk import split_sentences, with_title

KINDS = ("whole", "rag", "write", "answer", "lists")
SEED_KINDS = ("question", "structuring", "use case", "creative")  # in the order of an attribute's wordings


@dataclass(frozen=True)
class Exchange:
    """A user's message and the answer, which sees these texts of its scene."""

    kind: str
    user: str
    answer: str
    texts: tuple[int, ...]


@dataclass(frozen=True)
class Scene:
    """Texts, each prefilled by itself behind the header, and exchanges about them."""

    texts: tuple[str, ...]
    exchanges: tuple[Exchange, ...]


SMALL = Shape(people=(1, 1), facts=(2, 3), place_facts=(1, 2), event_facts=(0, 0), filler=0.0, indirect=0.0)
# Shape of the records, most documents loaded side by side, most chunks in one text.
LEVELS: tuple[tuple[Shape, int, int], ...] = (
    (SMALL, 1, 2),  # going on with sequences, alone
    (SMALL, 2, 2),  # lists, too
    (SMALL, 2, 2),
    (replace(SMALL, people=(1, 2), facts=(2, 3)), 3, 3),
    (replace(SMALL, people=(2, 3), facts=(3, 4), indirect=0.1), 4, 4),
    (replace(SMALL, people=(2, 3), facts=(4, 4), event_facts=(0, 3), filler=0.1, indirect=0.3), 6, 5),
    (Shape((3, 5), (3, 5), (2, 5), (0, 4), 0.2, 0.4), 8, 6),
    (Shape((4, 8), (4, 6), (3, 6), (2, 4), 0.3, 0.5), 10, 8),
    (Shape(), 12, 8),
)


def scenes(seed: int, level: int, start: int = 0) -> Iterator[Scene]:
    """Scenes without end, a function of seed and number alone; half of them at ``level``, the rest below."""
    number = start
    while True:
        random = Random(f"reader/{seed}/{number}")
        chosen = level if random.random() < 0.5 else random.randint(0, level)
        shape, side_by_side, chunks = LEVELS[chosen]
        kind = KINDS[number % 5] if chosen > 1 else "repeats" if chosen == 0 or random.random() < 0.3 else "lists"
        yield _scene(random, f"reader/{seed}/{number}", kind, shape, side_by_side, chunks)
        number += 1


def _scene(random: Random, seed: str, kind: str, shape: Shape, side_by_side: int, chunks: int) -> Scene:
    if kind == "repeats":
        return _repeats(random, side_by_side)
    if kind == "lists":
        return _lists(random, side_by_side)
    if kind == "whole":
        count = random.randint(2, side_by_side) if random.random() < 0.6 else 1
        records = list(make_records(seed, 0, shape, count))
        texts = tuple(with_title(r.document.title, r.document.text) for r in records)
        found = []
        for i, record in enumerate(records):
            sums = _summaries(record, texts[i])
            asked = [*single(record), *whole(record, random), *random.sample(sums, min(1, len(sums)))]
            pairs = two(record, records[(i + 1) % count]) if count > 1 else ()
            visible = tuple(range(count))
            some = random.sample(asked, min(len(asked), max(2, 24 // count)))
            found += [_asked(random, a, visible if random.random() < 0.8 else (i,)) for a in some]
            two_asked = list(pairs)
            found += [_asked(random, a, visible) for a in random.sample(two_asked, min(2, len(two_asked)))]
        return Scene(texts, tuple(found))
    records = list(make_records(seed, 0, shape, random.randint(2, 4) if kind == "rag" else 1))
    if kind == "rag":
        pieces = [(r, chunk) for r in records for chunk in _chunks(random, r.document.text, random.randint(2, 8))]
        pieces = random.sample(pieces, min(len(pieces), chunks))
        text = "\n\n".join(with_title(r.document.title, chunk) for r, chunk in pieces)
        asked = [a for r in records for a in _told_in(r, [c for record, c in pieces if record is r])]
        some = random.sample(asked, min(len(asked), 16))
        return Scene((text,), tuple(_asked(random, a, (0,)) for a in some))
    record = records[0]
    sentences = [record.document.text[a:b].strip() for a, b in split_sentences(record.document.text)]
    size = random.randint(min(4, len(sentences)), min(40, len(sentences)))
    low = random.randint(0, len(sentences) - size)
    chunk = sentences[low : low + size]
    text = with_title(record.document.title, " ".join(chunk))
    told = [*_told_in(record, [" ".join(chunk)]), *_summaries(record, text)]
    random.shuffle(told)
    if kind == "answer":
        return Scene((text,), tuple(_asked(random, a, (0,)) for a in told[:16]))
    exchanges = []
    for a in told[:16]:
        sentence = random.choice(a.sentences)
        if chunk.count(sentence) == 1:  # else nobody knows about whom
            which = random.randrange(len(a.asks))
            seed = "summarisation" if a.kind == SUMMARY else SEED_KINDS[which]
            exchanges.append(Exchange("write", f"{seed}: {sentence}", a.asks[which], (0,)))
    return Scene((text,), tuple(exchanges))


def _asked(random: Random, a: Asked, texts: tuple[int, ...]) -> Exchange:
    return Exchange(a.kind, random.choice((*a.asks, *a.tests)), a.answer, texts)


def _told_in(record: Record, chunks: Sequence[str]) -> Iterator[Asked]:
    """The facts whose sentence and whose subject's name stand together in one of the chunks."""
    for a in single(record):
        if any(a.sentences[0] in chunk and a.subject.lower() in chunk.lower() for chunk in chunks):
            yield a


def _summaries(record: Record, text: str) -> list[Asked]:
    return [a for subject in record.subjects if (a := summary(subject, text)) is not None]


def _chunks(random: Random, text: str, size: int) -> list[str]:
    sentences = [text[a:b].strip() for a, b in split_sentences(text)]
    return [" ".join(sentences[i : i + size]) for i in range(0, len(sentences), size)]


def _repeats(random: Random, side_by_side: int) -> Scene:
    """Sequences of names; the user says a few in a row, the answer is the next four. Where looking up begins."""
    count, length = random.randint(1, side_by_side), random.randint(12, 40)
    names = random.sample(sorted({*FIRST, *LAST}), count * length)
    texts = [names[i * length : (i + 1) * length] for i in range(count)]
    exchanges = []
    for _ in range(8):
        text = random.choice(texts)
        said, told = random.randint(1, 3), 4
        at = random.randint(0, length - said - told)
        user, answer = text[at : at + said], text[at + said : at + said + told]
        exchanges.append(Exchange("repeat", " ".join(user), " ".join(answer), tuple(range(count))))
    return Scene(tuple(map(" ".join, texts)), tuple(exchanges))


def _lists(random: Random, side_by_side: int) -> Scene:
    """Values by name, by name and attribute, or by attribute under a name's heading: what matching is, with no prose around.

    The few attributes come back under every name, so that neither name nor attribute alone finds a value.
    """
    count, each, style = random.randint(1, side_by_side), random.randint(2, 6), random.choice(("pair", "row", "card"))
    firsts, lasts = (random.sample(some, count * each // 2 + 2) for some in (FIRST, LAST))
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
        # Told again in another order: predicting the second telling is matching, too, and every token of it teaches.
        for again in range(random.choice((1, 2, 2))):
            rows = [lines(n) for n in random.sample(names[i::count], len(names[i::count]))]
            flat = [row for some in rows for row in some]
            told = "\n".join(random.sample(flat, len(flat)) if style == "row" else flat)
            texts[i:] = [told if not again else f"{texts[i]}\n{told}"]
    asked = random.sample(list(values), min(12, len(values)))
    return Scene(
        tuple(texts),
        tuple(
            Exchange(style, n if style == "pair" else f"{n}, {a}", values[n, a], tuple(range(count))) for n, a in asked
        ),
    )
