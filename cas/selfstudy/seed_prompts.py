"""The five kinds of seed prompt, in our own words, and what makes a question or an answer worth keeping.

The kinds are those of 2506.06266, section 4.1: structuring, summarisation, question, use case, creative.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cas.config import KINDS

BRIEF = " Answer in a few words."
EXAMPLE = "Marrow Bridge, which Ines Calloway designed, was opened in 1902 and has seven arches."
_EXAMPLE_WORDS = frozenset(["marrow", "bridge", "ines", "calloway", "arches"])


@dataclass(frozen=True)
class SeedPrompt:
    """One kind: how it is asked for, examples of ours about :data:`EXAMPLE`, the openings that start its questions, and
    what is added to a question when it is answered. ``{word}`` in an opening stands for each telling word of the sentence."""

    kind: str
    request: str
    examples: tuple[str, ...]
    openings: tuple[str, ...]
    style: str = BRIEF

    def instruction(self) -> str:
        """The user's message up to the sentence that the question shall be about."""
        shown = "\n".join(f"- {example}" for example in self.examples)
        return f"{self.request}\n\nSentence: {EXAMPLE}\nAbout Marrow Bridge:\n{shown}"

    def openings_for(self, sentence: str, title: str) -> list[str]:
        """All openings for one sentence of a document."""
        telling = dict.fromkeys(
            w for w in words(sentence) if w.islower() and len(w) > 2 and w not in _SMALL and w not in title.lower()
        )
        return [o.format(word=w) for o in self.openings for w in (telling if "{word}" in o else [""])]


SEEDS = (
    SeedPrompt(
        kind="question",
        request="Write questions about the sentence.",
        examples=(
            "Who designed Marrow Bridge?",
            "When was Marrow Bridge opened?",
            "How many arches does Marrow Bridge have?",
        ),
        openings=(
            "Who",
            "When",
            "How many",
            "What",
            "Where",
            "Why",
            "Which",
            "How",
            "What is the {word}",
            "How many {word}",
        ),
    ),
    SeedPrompt(
        kind="structuring",
        request="Write requests that ask for one detail of the sentence in a fixed form.",
        examples=(
            "Give the year in which Marrow Bridge was opened.",
            "Name the designer of Marrow Bridge.",
            "State the number of arches of Marrow Bridge.",
        ),
        openings=("Give the {word}", "Name the {word}", "State the number of", "List the"),
    ),
    SeedPrompt(
        kind="summarisation",
        request="Write requests to sum up what the sentence says.",
        examples=(
            "Say in one sentence what is known about Marrow Bridge.",
            "Describe Marrow Bridge in one sentence.",
            "Tell me briefly about the opening of Marrow Bridge.",
        ),
        openings=("Say in one sentence", "Describe the {word}", "Tell me briefly about the {word}", "Sum up"),
        style="",
    ),
    SeedPrompt(
        kind="use case",
        request="Write questions of people who need what the sentence says for something they do.",
        examples=(
            "For my report, who designed Marrow Bridge?",
            "Before I go there, I need to know when Marrow Bridge was opened.",
            "I want to draw it: how many arches does Marrow Bridge have?",
        ),
        openings=(
            "For my report, who",
            "For my report, when",
            "For my report, what is the {word}",
            "Before I go there, I need to know the {word}",
            "I want to know how many",
            "I want to know where",
        ),
    ),
    SeedPrompt(
        kind="creative",
        request="Write playful questions about the sentence.",
        examples=(
            "Quiz time: who designed Marrow Bridge?",
            "Guess when Marrow Bridge was opened.",
            "Riddle: what has seven arches and is called Marrow Bridge?",
        ),
        openings=(
            "Quiz time: who",
            "Quiz time: when",
            "Quiz time: how many",
            "Quiz time: what is the {word}",
            "Guess the {word}",
        ),
    ),
)

# The embedded reader writes one question about a sentence when it gets "kind: sentence", and answers no style but its own.
READER_SEED_PROMPTS = tuple(SeedPrompt(kind=kind, request="", examples=(), openings=("",), style="") for kind in KINDS)

# Words that say nothing about what a question is about.
_SMALL = frozenset(
    """
    a about again all also an and any are as at be been before briefly but by can could describe did do does each
    fill find for from gap give go guess had has have he her him his how i if in into is it its know like list
    made many me more most much my name named need no not of on one only or other our out over please quiz report
    riddle say sentence should show so some state sum tell than that the their them then there these they thing
    this those time to true up us want was we were what when where which who whom whose why will with would write
    year years you your
    """.split()  # noqa: SIM905
)


def normal(text: str) -> str:
    """Words in lower case: two questions with the same are one wording."""
    return " ".join(words(text.lower()))


def words(text: str) -> list[str]:
    """The words and numbers of a text, in order."""
    return re.findall(r"\w+", text)


def bad_question(question: str, title: str, text: str, wanders: bool = True) -> str | None:
    """Why a question about a titled text is not worth answering, or None. ``wanders``: the model that wrote it may have
    left the text."""
    found = words(question)
    if len(found) < 3 or question[-1] not in "?.":
        return "malformed question"
    if loops(found):
        return "loop"
    lower = f"{title} {text}".lower()
    content = [w.lower() for w in found[1:] if w.lower() not in _SMALL and len(w) > 2]
    # A small model wanders off, or into our example: most of what it asks about must occur in the text.
    strange = [w for w in content if w[:5] not in lower]
    if wanders and (len(strange) > 0.4 * len(content) or _EXAMPLE_WORDS & set(strange)):
        return "off topic"
    # Once several cartridges are loaded, a question has to say whom it means: a name, or a word of the title.
    names = {w for w in words(f"{title} {text}") if w[0].isupper() and len(w) > 1 and w.lower() not in _SMALL}
    title_words = {w.lower() for w in words(title) if len(w) > 3}
    if not any(w in names or w.lower() in title_words for w in found[1:]):
        return "no named subject"
    return None


def bad_answer(answer: str, question: str, text: str) -> str | None:
    """Why an answer is not worth learning, or None: it has to tell something of the text that the question did not, a
    word, a name, a number, or decide."""
    if not answer.strip():
        return "empty answer"
    said = {w for w in words(answer.lower()) if w not in _SMALL and (len(w) > 2 or w.isdigit())}
    news = (said - set(words(question.lower()))) & set(words(text.lower()))
    return None if news or re.match(r"(yes|no|true|false)\b", answer.lower()) else "answer without substance"


def loops(items: Sequence[Any]) -> bool:
    """Whether some three items in a row come three times."""
    counts = Counter(tuple(items[i : i + 3]) for i in range(len(items) - 2))
    return bool(counts) and max(counts.values()) >= 3
