"""What each call of self-study asks about: two planners behind one protocol.

A plan is a pure function of the settings, the number of the call and what earlier units asked and kept, which the
caller passes in as a :class:`History`. An interrupted synthesis rebuilds the history from finished units, and so plans
the same.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import ChainMap, Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import accumulate
from random import Random
from typing import Protocol

from cas.data.collection import Collection, Document
from cas.errors import RunError
from cas.model.frozen import FrozenModel
from cas.options import SelfStudy
from cas.selfstudy.conversations import Conversation
from cas.selfstudy.prompt_styles import PromptStyle
from cas.selfstudy.seed_prompts import SeedPrompt, normal
from retrieval.chunk import split_sentences, with_title

MAX_RETRIES_PER_DOCUMENT = 5
GOLDEN_RATIO = 0.6180339887498949

Topic = tuple[str, str]  # document id, kind of question
Pair = tuple[int, str]  # index of a sentence, opening of a question about it


@dataclass(frozen=True)
class SplitDocument:
    """A document in sentences, with the length of each in tokens."""

    document: Document
    sentences: tuple[str, ...]
    lengths: tuple[int, ...]


def split_documents(model: FrozenModel, documents: Collection) -> list[SplitDocument]:
    """Documents in sentences, sorted by id; documents without a word are left out."""
    split = []
    for document in sorted(documents.documents, key=lambda d: d.id):
        spans = [document.text[start:end].strip() for start, end in split_sentences(document.text)]
        sentences = tuple(text for text in spans if re.search(r"\w", text))
        if sentences:
            lengths = tuple(max(1, len(model.encode(text))) for text in sentences)
            split.append(SplitDocument(document, sentences, lengths))
    return split


@dataclass(frozen=True)
class Call:
    """What one call asks: a window of sentences that the model reads, one kind of question, and (sentence, opening)
    pairs, each of which gets one question at each of the temperatures."""

    number: int
    source: SplitDocument
    window: range
    seed_prompt: SeedPrompt
    pairs: tuple[Pair, ...]
    temperatures: tuple[float, ...]
    is_retry: bool = False  # for a document about which nothing is kept yet

    @property
    def document(self) -> Document:
        """The document that the call is about."""
        return self.source.document

    @property
    def topic(self) -> Topic:
        """Document and kind; pairs are counted as tried within it."""
        return self.document.id, self.seed_prompt.kind

    @property
    def chunk(self) -> str:
        """The text that the model reads."""
        return with_title(self.document.title, " ".join(self.source.sentences[i] for i in self.window))

    @property
    def text_pairs(self) -> list[tuple[str, str]]:
        """Sentence and opening of every pair, as text."""
        return [(self.source.sentences[i], opening) for i, opening in self.pairs]


@dataclass
class History:
    """What finished units asked and kept."""

    asked: int = 0  # pairs
    kept: int = 0  # conversations
    questions: dict[str, set[str]] = field(default_factory=dict)  # document id: questions kept, normalized
    tried: dict[Topic, AbstractSet[Pair]] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)  # document id: calls made because nothing was kept
    dropped: Counter[str] = field(default_factory=Counter)  # reason: questions and answers

    def add(self, calls: Sequence[Call], conversations: Sequence[Conversation], dropped: Counter[str]) -> None:
        """Count a finished unit."""
        for call in calls:
            self.asked += len(call.pairs)
            self.tried[call.topic] = {*self.tried.get(call.topic, ()), *call.pairs}
            if call.is_retry:
                self.retries[call.document.id] += 1
        for conversation in conversations:
            self.questions.setdefault(conversation.document, set()).add(normal(conversation.question))
        self.kept += len(conversations)
        self.dropped.update(dropped)


class Planner(Protocol):
    """Decides what the calls of each unit ask."""

    every_sentence: bool  # stored with each unit

    def plan(self, unit: int, history: History) -> list[Call]:
        """The calls of a unit, given the history of all units before it; none when the synthesis is complete.

        Raises: RunError when too little of what the model writes is kept.
        """
        ...

    def progress(self, history: History) -> tuple[int, int]:
        """How much is done, and of how much."""
        ...


def make_planner(sources: Sequence[SplitDocument], style: PromptStyle, settings: SelfStudy) -> Planner:
    """Every sentence once where the style says so and no number of conversations is set; otherwise sampling."""
    if style.every_sentence and settings.conversations is None:
        return SentencePlanner(sources, style, settings)
    return CoveragePlanner(sources, style, settings)


class SentencePlanner:
    """Asks about every sentence once in every kind, in random order: a greedy question and sampled wordings."""

    every_sentence = True

    def __init__(self, sources: Sequence[SplitDocument], style: PromptStyle, settings: SelfStudy) -> None:
        self.style, self.settings = style, settings
        self._calls: list[tuple[SplitDocument, str, range, range]] = []  # document, kind, window, sentences asked about
        rows = settings.questions_per_call
        for source in sources:
            for window, targets in sentence_windows(source.lengths, settings.chunk_tokens):
                for first in range(targets.start, targets.stop, rows):
                    batch = range(first, min(first + rows, targets.stop))
                    self._calls += [(source, kind, window, batch) for kind in settings.kinds]
        Random(f"{settings.seed}/everything").shuffle(self._calls)
        self._total = sum(len(batch) for *_, batch in self._calls)

    def plan(self, unit: int, history: History) -> list[Call]:
        """The next calls of the list, whatever the history."""
        size = self.settings.calls_per_unit
        return [self.call(number) for number in range(len(self._calls))[unit * size : (unit + 1) * size]]

    def call(self, number: int) -> Call:
        """What call ``number`` asks."""
        source, kind, window, batch = self._calls[number]
        temperatures = (0.0, *[self.style.wording_temperature] * (self.settings.wordings - 1))
        return Call(number, source, window, self.style.seed_prompt(kind), tuple((i, "") for i in batch), temperatures)

    def progress(self, history: History) -> tuple[int, int]:
        """(sentences asked about, sentences), each counted in every kind."""
        return history.asked, self._total


class CoveragePlanner:
    """Samples until enough conversations are kept, then retries documents about which none is.

    A point walks evenly (by the golden ratio) over all tokens of the collection, so that documents get calls in
    proportion to their length.
    """

    every_sentence = False

    def __init__(self, sources: Sequence[SplitDocument], style: PromptStyle, settings: SelfStudy) -> None:
        self.sources, self.style, self.settings = sources, style, settings
        self.lengths = [sum(source.lengths) for source in sources]
        self.target = settings.conversations or sum(max(64, n // 4) for n in self.lengths)
        self._ends = list(accumulate(self.lengths))
        self._start = Random(f"{settings.seed}/walk").random()

    def plan(self, unit: int, history: History) -> list[Call]:
        """The calls of a unit; a pair is tried again only when every pair of its window was tried."""
        silent = self._silent(history) if history.kept >= self.target else []
        if not self.sources or (history.kept >= self.target and not silent):
            return []
        self._check_yield(unit, history)
        calls, size = list[Call](), self.settings.calls_per_unit
        tried = ChainMap[Topic, AbstractSet[Pair]]({}, history.tried)
        for number in range(unit * size, (unit + 1) * size):
            call = self.call(number, tried, silent)
            tried[call.topic] = {*tried.get(call.topic, ()), *call.pairs}
            calls.append(call)
        return calls

    def call(self, number: int, tried: Mapping[Topic, AbstractSet[Pair]], silent: Sequence[SplitDocument] = ()) -> Call:
        """What call ``number`` asks, given the pairs that earlier calls tried and, in retries, which documents."""
        s = self.settings
        source, window = self.window(number, silent)
        kind = s.kinds[(number + number // len(s.kinds)) % len(s.kinds)]
        prompt, title = self.style.seed_prompt(kind), source.document.title
        pairs = [(i, opening) for i in window for opening in prompt.openings_for(source.sentences[i], title)]
        seen = tried.get((source.document.id, kind), frozenset())
        fresh = [pair for pair in pairs if pair not in seen]
        chosen = fresh or pairs
        Random(f"{s.seed}/call/{number}").shuffle(chosen)
        temperature = 0.0 if fresh else self.style.repeat_temperature
        return Call(number, source, window, prompt, tuple(chosen[: s.questions_per_call]), (temperature,), bool(silent))

    def window(self, number: int, silent: Sequence[SplitDocument] = ()) -> tuple[SplitDocument, range]:
        """The document and sentences that call ``number`` reads, at most ``chunk_tokens`` tokens around a point of the
        walk: over the whole collection, or over the silent documents in turn."""
        along = (self._start + number * GOLDEN_RATIO) % 1.0
        if silent:
            source = silent[number % len(silent)]
            point = int(along * sum(source.lengths))
        else:
            point = int(along * self._ends[-1])
            index = bisect_right(self._ends, point)
            source, point = self.sources[index], point - (self._ends[index] - self.lengths[index])
        center = bisect_right(list(accumulate(source.lengths)), point)
        random = Random(f"{self.settings.seed}/window/{number}")
        return source, _grow_window(source.lengths, center, self.settings.chunk_tokens, random)

    def progress(self, history: History) -> tuple[int, int]:
        """(conversations kept, conversations wanted)."""
        return min(history.kept, self.target), self.target

    def _silent(self, history: History) -> list[SplitDocument]:
        """Documents about which nothing is kept and which have retries left."""
        return [
            source
            for source in self.sources
            if not history.questions.get(source.document.id)
            and history.retries[source.document.id] < MAX_RETRIES_PER_DOCUMENT
        ]

    def _check_yield(self, unit: int, history: History) -> None:
        """Raise when next to nothing of what the model writes is kept; half may be dropped of a weak model."""
        asked = unit * self.settings.calls_per_unit * self.settings.questions_per_call
        if history.kept < self.target and asked > 12 * self.target + 1000:
            raise RunError(
                f"self-study kept {history.kept} of {self.target} conversations; dropped: {dict(history.dropped)}; "
                f"{self.style.advice}"
            )


def _grow_window(lengths: Sequence[int], center: int, most: int, random: Random) -> range:
    """Sentences around one, of at most ``most`` tokens in all (or that sentence alone), extended to random sides."""
    low, high, used = center, center + 1, lengths[center]
    while True:
        left = low > 0 and used + lengths[low - 1] <= most
        right = high < len(lengths) and used + lengths[high] <= most
        if not (left or right):
            return range(low, high)
        if left and (not right or random.random() < 0.5):
            low -= 1
            used += lengths[low]
        else:
            used += lengths[high]
            high += 1


def sentence_windows(lengths: Sequence[int], most: int) -> list[tuple[range, range]]:
    """Windows of sentences with these lengths, of at most ``most`` tokens (or one sentence), and which of its sentences
    each window is for: together, every sentence once. Later windows begin earlier, so that a pronoun comes after its
    name."""
    windows, start = [], 0
    while start < len(lengths):
        end, used = start + 1, lengths[start]
        while end < len(lengths) and used + lengths[end] <= (most * 3 // 4 if start else most):
            used += lengths[end]
            end += 1
        low = start
        while low > 0 and used + lengths[low - 1] <= most:
            low -= 1
            used += lengths[low]
        windows.append((range(low, end), range(start, end)))
        start = end
    return windows
