"""The five kinds of seed prompt, in our own words, and what makes a question or an answer worth keeping.

The kinds are those of 2506.06266, section 4.1: structuring, summarisation, question, use case, creative.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from cas.options import KINDS

BRIEF = " Answer in a few words."
EXAMPLE = "Marrow Bridge, which Ines Calloway designed, was opened in 1902 and has seven arches."
_EXAMPLE_WORDS = frozenset(["marrow", "bridge", "ines", "calloway", "arches"])


@dataclass(frozen=True)
class SeedPrompt:
    """One kind of question: how it is requested, our examples about :data:`EXAMPLE`, the openings that start its
    questions, and what is appended to a question when it is answered. ``{word}`` in an opening stands for each content
    word of the sentence."""

    kind: str
    request: str
    examples: tuple[str, ...]
    openings: tuple[str, ...]
    answer_suffix: str = BRIEF

    def instruction(self) -> str:
        """The user's message up to the sentence that the question must be about."""
        examples = "\n".join(f"- {example}" for example in self.examples)
        return f"{self.request}\n\nSentence: {EXAMPLE}\nAbout Marrow Bridge:\n{examples}"

    def openings_for(self, sentence: str, title: str) -> list[str]:
        """All openings for one sentence of a document."""
        content = dict.fromkeys(
            w for w in words(sentence) if w.islower() and len(w) > 2 and w not in _STOP_WORDS and w not in title.lower()
        )
        return [o.format(word=w) for o in self.openings for w in (content if "{word}" in o else [""])]


SEED_PROMPTS = (
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
        answer_suffix="",
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

# The embedded reader writes one question about a sentence when it gets "kind: sentence"; its answers are always short.
READER_SEED_PROMPTS = tuple(
    SeedPrompt(kind=kind, request="", examples=(), openings=("",), answer_suffix="") for kind in KINDS
)

# Words that do not show what a question is about.
_STOP_WORDS = frozenset(
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
    """Words in lower case: questions that are equal in this form count as duplicates."""
    return " ".join(words(text.lower()))


def words(text: str) -> list[str]:
    """The words and numbers of a text, in order."""
    return re.findall(r"\w+", text)


def bad_question(question: str, title: str, text: str, check_topic: bool = True) -> str | None:
    """Why a question about a titled text is not worth an answer, or None. ``check_topic``: the model that wrote it may
    have asked about something else."""
    tokens = words(question)
    if len(tokens) < 3 or question[-1] not in "?.":
        return "malformed question"
    if loops(tokens):
        return "loop"
    lower = f"{title} {text}".lower()
    content = [w.lower() for w in tokens[1:] if w.lower() not in _STOP_WORDS and len(w) > 2]
    # A small model strays from the text or copies our example: most words of its question must occur in the text.
    absent = [w for w in content if w[:5] not in lower]
    if check_topic and (len(absent) > 0.4 * len(content) or _EXAMPLE_WORDS & set(absent)):
        return "off topic"
    # With several cartridges loaded, a question must identify its subject: by a name, or by a word of the title.
    names = {w for w in words(f"{title} {text}") if w[0].isupper() and len(w) > 1 and w.lower() not in _STOP_WORDS}
    title_words = {w.lower() for w in words(title) if len(w) > 3}
    if not any(w in names or w.lower() in title_words for w in tokens[1:]):
        return "no named subject"
    return None


def bad_answer(answer: str, question: str, text: str) -> str | None:
    """Why an answer is not worth learning, or None: it must contain a word, name or number of the text that the
    question does not, or begin with yes, no, true or false."""
    if not answer.strip():
        return "empty answer"
    content = {w for w in words(answer.lower()) if w not in _STOP_WORDS and (len(w) > 2 or w.isdigit())}
    new_words = (content - set(words(question.lower()))) & set(words(text.lower()))
    decides = re.match(r"(yes|no|true|false)\b", answer.lower())
    return None if new_words or decides else "answer without substance"


def loops(items: Sequence[Any]) -> bool:
    """Whether any three consecutive items occur three times."""
    counts = Counter(tuple(items[i : i + 3]) for i in range(len(items) - 2))
    return bool(counts) and max(counts.values()) >= 3
