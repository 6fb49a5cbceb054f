"""Needles in a haystack, after RULER (2404.06654, section 3): any length, three kinds of question, over text of our own.

Every document is a haystack of sentences that tell nothing, with needles at random depths:

- *multi-key*: every key has one number, and all but one of the keys are there to distract;
- *multi-value*: one key has several words, all of which are asked for;
- *variable tracking*: chains of variables, each the same as the one before; asked are all with the first one's value.
"""

from __future__ import annotations

from itertools import pairwise
from random import Random

from cas.data.collection import Collection
from cas.data.documents import Document, Question
from cas.data.lexicon import ANIMALS, COLLECTED, FILLERS, FIRST, LAST
from cas.data.worlds import listed

MULTI_KEY, MULTI_VALUE, TRACKING = "multi-key", "multi-value", "variable tracking"
KEYS, VALUES, CHAIN, CHAINS = 8, 3, 3, 2
WORDS = 3000


def niah(seed: int = 0, words: int = WORDS, documents: int = 64) -> Collection:
    """``documents`` haystacks of at least ``words`` words each, up to 400 more.

    Each has a question of every kind and two more of the first.
    Deterministic in the seed. Lists are asked for, and answered, in the order of the text, as "a, b and c".
    """
    if words < 300:
        raise ValueError(f"niah:{words}: the needles alone take 200 words; give at least 300")
    found, asked = [], []
    for number in range(documents):
        document, questions = _haystack(f"niah/{seed}/{number}", f"{number:05d}", words)
        found.append(document)
        asked += questions
    return Collection("niah", tuple(found), tuple(asked))


def _haystack(seed: str, id: str, words: int) -> tuple[Document, list[Question]]:
    random = Random(seed)
    title = f"Notebook {random.randrange(10**6):06d}"  # what tells one haystack from another
    names = random.sample([f"{a} {b}" for a in random.sample(FIRST, 12) for b in random.sample(LAST, 4)], KEYS + 1)
    numbers = [f"{n}" for n in random.sample(range(1_000_000, 10_000_000), KEYS + CHAINS)]
    needles = [f"The special number of {n} is {v}." for n, v in zip(names[1:], numbers)]
    values = random.sample((*ANIMALS, *COLLECTED), VALUES)
    needles += [f"A password of {names[0]} is {v}." for v in values]
    letters = random.sample("ABCDEFGHJKLMNPQRSTUVWXYZ", CHAIN * CHAINS)
    variables = [f"{letter}{random.randrange(100, 1000)}" for letter in letters]
    chains = [variables[i::CHAINS] for i in range(CHAINS)]
    order = {needle: random.random() for needle in needles}
    for chain, number in zip(chains, numbers[KEYS:]):
        says = [f"Variable {chain[0]} is {number}."]
        says += [f"Variable {b} is the same as variable {a}." for a, b in pairwise(chain)]
        order.update(zip(says, sorted(random.random() for _ in says)))  # a chain is told from its head on
    length = sum(len(needle.split()) for needle in order)
    hay: list[str] = []
    while length < words:
        hay += random.sample(FILLERS, len(FILLERS))
        length += sum(len(sentence.split()) for sentence in FILLERS)
    sentences = [(place, needle) for needle, place in order.items()]
    sentences += [((i + random.random()) / max(1, len(hay)), sentence) for i, sentence in enumerate(hay)]
    told = [sentence for _, sentence in sorted(sentences)]
    text = "\n\n".join(" ".join(told[i : i + 12]) for i in range(0, len(told), 12))
    passwords = sorted(values, key=lambda v: order[f"A password of {names[0]} is {v}."])
    chain = chains[0]
    questions = [
        *((MULTI_KEY, f"What is the special number of {names[i]}?", numbers[i - 1]) for i in random.sample(range(1, KEYS + 1), 3)),
        (MULTI_VALUE, f"What are all the passwords of {names[0]}?", listed(passwords)),
        (TRACKING, f"Which variables of {title} have the value {numbers[KEYS]}?", listed(chain)),
    ]  # fmt: skip
    return Document(id, title, text), [
        Question(f"{id}/{i}", (id,), question, (answer,), None, kind) for i, (kind, question, answer) in enumerate(questions)
    ]  # fmt: skip
