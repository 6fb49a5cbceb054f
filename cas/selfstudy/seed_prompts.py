"""The five kinds of seed prompt, in our own words, and what makes a question or an answer worth keeping.

The kinds are those of 2506.06266, section 4.1: structuring, summarisation, question, use case, creative. The filters go
by Unicode properties, so that they hold for every script; the embedded reader, which knows English only, has its own.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import regex

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

    def instruction(self, english: bool = True) -> str:
        """The user's message up to the sentence that the question must be about."""
        examples = "\n".join(f"- {example}" for example in self.examples)
        request = self.request if english else f"{self.request} Write in the language of the sentence."
        return f"{request}\n\nSentence: {EXAMPLE}\nAbout Marrow Bridge:\n{examples}"

    def openings_for(self, sentence: str, title: str, english: bool = True) -> list[str]:
        """All openings for one sentence of a document; in other languages than English the empty one alone."""
        if not english:
            return [""]
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
# Words that are frequent in English and rare in other languages with the same letters.
_ENGLISH = frozenset("the and to for with are this that by from or be it as can you not at if which these".split())  # noqa: SIM905

_SPACELESS = (
    r"[\p{scx=Han}\p{scx=Hira}\p{scx=Kana}\p{scx=Bopo}\p{scx=Hang}]"  # and Hangul, whose particles are attached
)
_SOUTHEAST = r"[\p{scx=Thai}\p{scx=Laoo}\p{scx=Khmr}\p{scx=Mymr}]"  # no spaces, several characters a syllable
_LETTER = r"[\p{L}\p{M}\p{N}_\u200c\u200d]"  # marks, joiners and non-joiners are part of words
_WORD = regex.compile(f"{_LETTER}+")
_UNIT = regex.compile(
    rf"(?P<pairs>[{_LETTER}&&{_SPACELESS}--[0-9_]]+)|(?P<fours>[{_LETTER}&&{_SOUTHEAST}--[0-9_]]+)"
    rf"|[{_LETTER}--{_SPACELESS}--{_SOUTHEAST}||[0-9_]]+",
    regex.V1,
)
# Thai, Lao, Khmer and Burmese questions may end without a mark; in Greek the mark is a semicolon.
_END = regex.compile(
    rf"(?:\p{{Sentence_Terminal}}|[\p{{Greek}}\p{{M}}]\s*;|{_SOUTHEAST})[\p{{Pe}}\p{{Pf}}\"'`*\s]*$", regex.V1
)
_YES_OR_NO = regex.compile(
    r"\W*(?:(?:yes|no|true|false|ja|nein|oui|non|sí|sim|não|да|нет|نعم|لا|हाँ|हां|नहीं|네|예|아니요|아니오)\b"
    r"|是|不|对|否|没有|はい|いいえ|ใช่|ไม่)"
)
_ROOTS = regex.compile(r"[\p{Arabic}\p{Hebrew}]")  # scripts whose languages put prefixes before a word
_SPACELESS_UNIT = regex.compile(f"[{_SPACELESS}||{_SOUTHEAST}]", regex.V1)


def normal(text: str) -> str:
    """Words in lower case: questions that are equal in this form count as duplicates."""
    return " ".join(words(unicodedata.normalize("NFC", text).lower()))


def words(text: str) -> list[str]:
    """The words and numbers of a text, in order."""
    return _WORD.findall(text)


def units(text: str) -> list[str]:
    """What texts are compared by, in order, with case and compatibility forms folded: words; in scripts without spaces
    every two neighboring characters (four in those of Southeast Asia)."""
    found = list[str]()
    for match in _UNIT.finditer(_folded(text)):
        size = {"pairs": 2, "fours": 4}.get(match.lastgroup or "", len(match[0]))
        found += [match[0][i : i + size] for i in range(max(1, len(match[0]) - size + 1))]
    return found


def content_units(text: str) -> list[str]:
    """:func:`units` without English stop words and without words of one or two letters in scripts with case."""
    return [u for u in units(text) if u not in _STOP_WORDS and (len(u) > 2 or u.upper() == u)]


def spaceless(unit: str) -> bool:
    """Whether a unit is part of a run in a script without spaces."""
    return bool(_SPACELESS_UNIT.match(unit))


def is_english(text: str) -> bool:
    """Whether a text is in English, by its letters and its most frequent words; a few words are, in Latin letters."""
    letters, tokens = [c for c in text if c.isalpha()], words(text.lower())
    if sum(c.isascii() for c in letters) < 0.9 * len(letters):
        return False
    if len(tokens) < 10:
        return len(tokens) < 4 or any(word in _STOP_WORDS for word in tokens)
    return sum(word in _ENGLISH for word in tokens) >= 0.05 * len(tokens)


def bad_question(question: str, title: str, text: str, check_topic: bool = True) -> str | None:
    """Why a question about a titled text is not worth an answer, or None. ``check_topic``: the model that wrote it may
    have asked about something else."""
    asked, content = units(question), content_units(question)
    if len(asked) < 3 or not _END.search(question):
        return "malformed question"
    if loops(asked):
        return "loop"
    if not content:
        return "no named subject"
    pairs = 2 * sum(map(spaceless, content)) > len(content)
    if not pairs and asked[0] == content[0]:
        content = content[1:]  # usually a question word
    # A small model strays from the text or copies our example: most words of its question must occur in the text. Pairs are
    # often no words; and only English stop words are known, so other questions may have more of them about the title.
    absent = [unit for unit in content if not _occurs(unit, f"{title} {text}")]
    titled = not _STOP_WORDS & set(asked) and any(
        unit in _unit_set(title) and (len(unit) > 3 or unit.upper() == unit) for unit in content
    )
    most = 0.75 if pairs or titled else 0.5
    if check_topic and (len(absent) > most * len(content) or _EXAMPLE_WORDS & set(absent)):
        return "off topic"
    return None


def bad_answer(answer: str, question: str, text: str) -> str | None:
    """Why an answer is not worth learning, or None: it must contain a word, name or number of the text that the
    question does not, be a short passage of the text, or begin with yes, no, true or false."""
    if not answer.strip():
        return "empty answer"
    asked = set(units(question))
    if _YES_OR_NO.match(answer.lower()):
        return None
    asked |= {unit for unit in units(answer) if _ROOTS.match(unit) and _occurs(unit, question)}
    if any(unit not in asked and _occurs(unit, text) for unit in content_units(answer)):
        return None
    passage = regex.escape(_folded(answer).strip(" \n.,;:!?\"'`*。！？"))  # such as "C++" or "-q"
    quoted = passage and regex.search(rf"(?<!\w){passage}(?!\w)", _folded(text))
    quoted = quoted and not set(units(answer)) <= asked | _STOP_WORDS
    return None if quoted else "answer without substance"


@lru_cache(256)
def _folded(text: str) -> str:
    return unicodedata.normalize("NFKC", text).casefold()


@lru_cache(16)
def _unit_set(text: str) -> frozenset[str]:
    return frozenset(units(text))


def _occurs(unit: str, text: str) -> bool:
    """Whether a unit occurs in a text, a word perhaps in another form: by its beginning, in some scripts by any part."""
    if unit in _unit_set(text):
        return True
    if any(c.isdigit() for c in unit):
        return False
    if spaceless(unit):
        return unit in _folded(text)
    if _ROOTS.match(unit):
        size = 3 if len(unit) < 6 else 4
        return any(unit[i : i + size] in _folded(text) for i in range(len(unit) - size + 1))
    return unit[: 5 if len(unit) > 5 else max(4, len(unit) - 1)] in _folded(text)


def bad_reader_question(question: str, title: str, text: str) -> str | None:
    """Why a question that the embedded reader wrote is dropped, or None: its texts are English, with names in capitals."""
    tokens = words(question)
    if len(tokens) < 3 or question[-1] not in "?.":
        return "malformed question"
    if loops(tokens):
        return "loop"
    # With several cartridges loaded, a question must identify its subject: by a name, or by a word of the title.
    names = {w for w in words(f"{title} {text}") if w[0].isupper() and len(w) > 1 and w.lower() not in _STOP_WORDS}
    title_words = {w.lower() for w in words(title) if len(w) > 3}
    return None if any(w in names or w.lower() in title_words for w in tokens[1:]) else "no named subject"


def bad_reader_answer(answer: str, question: str, text: str) -> str | None:
    """Why an answer of the embedded reader is dropped, or None: see :func:`bad_answer`, with words as they stand."""
    if not answer.strip():
        return "empty answer"
    content = {w for w in words(answer.lower()) if w not in _STOP_WORDS and (len(w) > 2 or w.isdigit())}
    new_words = (content - set(words(question.lower()))) & set(words(text.lower()))
    decides = regex.match(r"(yes|no|true|false)\b", answer.lower())
    return None if new_words or decides else "answer without substance"


def loops(items: Sequence[Any]) -> bool:
    """Whether any three consecutive items occur three times."""
    counts = Counter(tuple(items[i : i + 3]) for i in range(len(items) - 2))
    return bool(counts) and max(counts.values()) >= 3
