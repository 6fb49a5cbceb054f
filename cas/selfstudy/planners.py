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
from dataclasses import dataclass, field, replace
from itertools import accumulate
from random import Random
from typing import Protocol

import numpy as np

from cas.data.collection import Collection, Document
from cas.errors import ConfigError
from cas.model.frozen import FrozenModel
from cas.options import EFFORTS, SelfStudy
from cas.selfstudy.conversations import Asked
from cas.selfstudy.coverage import Coverage
from cas.selfstudy.prompt_styles import PromptStyle, token_limits
from cas.selfstudy.seed_prompts import BRIEF, SeedPrompt, is_english, normal
from cas.selfstudy.windows import grow_window, sentence_windows
from retrieval.chunk import split_sentences, with_title

MAX_RETRIES_PER_DOCUMENT = 5
MAX_QUESTIONS_EACH = 8  # for every conversation that a document is to get: then it is given up
MAX_QUESTIONS_PER_SENTENCE = 24  # of a kind: then its document is exhausted; English has some eight openings of a kind
GOLDEN_RATIO = 0.6180339887498949

Topic = tuple[str, str]  # document id, kind of question
Pair = tuple[int, str]  # index of a sentence, opening of a question about it


@dataclass(frozen=True)
class SplitDocument:
    """A document in sentences, with the length of each in tokens."""

    document: Document
    sentences: tuple[str, ...]
    lengths: tuple[int, ...]
    english: bool = True


def split_documents(
    model: FrozenModel, documents: Collection, limit: int = SelfStudy.chunk_tokens
) -> list[SplitDocument]:
    """Documents in sentences of at most ``limit`` tokens, sorted by id; documents without a word are left out."""
    split = []
    for document in sorted(documents.documents, key=lambda d: d.id):
        spans = split_sentences(document.text, limit, model.count_tokens)
        texts = (document.text[start:end].strip() for start, end in spans)
        sentences = tuple(text for text in texts if re.search(r"\w", text))
        if sentences:
            lengths = tuple(max(1, model.count_tokens(text)) for text in sentences)
            split.append(SplitDocument(document, sentences, lengths, is_english(document.text)))
    return split


def fit_window(
    model: FrozenModel, style: PromptStyle, settings: SelfStudy, documents: Collection
) -> tuple[SelfStudy, list[SplitDocument]]:
    """The documents in sentences, and the settings with ``chunk_tokens`` such that the model can read chunk, request and
    reply. Raises: ConfigError when the model reads too little."""
    question, answer = token_limits(model, settings)
    template, positions = model.template, model.geometry.max_positions
    titles = 3 * max((model.count_tokens(d.title) for d in documents.documents), default=0)
    requests = max(style.request_length(model, kind, settings, question) for kind in settings.kinds)
    room = positions - len(template.header_ids) - question - titles
    to_ask, to_answer = room - requests, room - answer - len(model.question_tokens(BRIEF))
    limit = min(settings.chunk_tokens, to_ask // 2, to_answer)
    if limit < 16:
        raise ConfigError(
            f"the model reads {positions} tokens, too few for self-study beside its instructions; give another --model"
        )
    sources = split_documents(model, documents, limit)
    longest = max((n for source in sources for n in source.lengths), default=0)
    # A chunk may have a few tokens more than its sentences by themselves.
    most = min(to_ask - longest, to_answer) * 15 // 16
    return replace(settings, chunk_tokens=max(1, min(settings.chunk_tokens, most))), sources


@dataclass(frozen=True)
class Call:
    """What one call asks: a window of sentences that the model reads, one kind of question, and (sentence, opening)
    pairs, each of which gets one question at each of the temperatures, or up to ``likeliest`` ones without sampling; or,
    without pairs, a list of ``listed`` questions."""

    number: int
    source: SplitDocument
    window: range
    seed_prompt: SeedPrompt
    pairs: tuple[Pair, ...]
    temperatures: tuple[float, ...]
    is_retry: bool = False  # for a document about which nothing is kept yet
    listed: int = 0
    likeliest: int = 0

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
    asked_about: Counter[str] = field(default_factory=Counter)  # document id: questions, dropped ones included
    kept: int = 0  # conversations
    questions: dict[str, set[str]] = field(default_factory=dict)  # document id: questions kept, normalized
    tried: dict[Topic, AbstractSet[Pair]] = field(default_factory=dict)
    retries: Counter[str] = field(default_factory=Counter)  # document id: calls made because nothing was kept
    dropped: Counter[str] = field(default_factory=Counter)  # reason: questions and answers
    changed: list[str] = field(default_factory=list)  # document ids in the order of units: what counts may have changed

    def add(self, calls: Sequence[Call], conversations: Sequence[Asked], dropped: Counter[str]) -> None:
        """Count a finished unit."""
        self.changed += dict.fromkeys(call.document.id for call in calls)
        for call in calls:
            self.asked += len(call.pairs)
            self.asked_about[call.document.id] += call.listed or len(call.pairs) * len(call.temperatures)
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
        """The calls of a unit, given the history of all units before it; none when the synthesis is complete."""
        ...

    def progress(self, history: History) -> tuple[int, int]:
        """How much is done, and of how much."""
        ...

    def most_questions(self, history: History) -> int:
        """At most so many questions are still to be asked."""
        ...


def make_planner(sources: Sequence[SplitDocument], style: PromptStyle, settings: SelfStudy) -> Planner:
    """Every sentence once where the style says so and no number of conversations is set; otherwise sampling."""
    if style.every_sentence and settings.conversations is None:
        return SentencePlanner(sources, style, settings)
    return CoveragePlanner(sources, style, settings)


class NoQuestions:
    """Asks nothing: ``--writer none``."""

    every_sentence = False

    def plan(self, unit: int, history: History) -> list[Call]:
        """No calls."""
        return []

    def progress(self, history: History) -> tuple[int, int]:
        """Nothing of nothing."""
        return 0, 0

    def most_questions(self, history: History) -> int:
        """None."""
        return 0


class SentencePlanner:
    """Asks about every sentence in every kind, in random order. A unit has all kinds of the same sentences, so that a
    sentence about which the first kind has no question is left out of the others.

    In stores that an earlier version began (not ``style.likeliest``), every call stands for itself: a greedy question and
    sampled wordings.
    """

    every_sentence = True

    def __init__(self, sources: Sequence[SplitDocument], style: PromptStyle, settings: SelfStudy) -> None:
        self.style, self.settings = style, settings
        self.per_call, self.per_unit = style.sizes(settings)
        calls = list[list[tuple[SplitDocument, str, range, range]]]()  # document, kind, window, sentences asked about
        for source in sources:
            for window, targets in sentence_windows(source.lengths, settings.chunk_tokens):
                for first in range(targets.start, targets.stop, self.per_call):
                    batch = range(first, min(first + self.per_call, targets.stop))
                    group = [(source, kind, window, batch) for kind in settings.kinds]
                    calls += [group] if style.likeliest else [[call] for call in group]
        Random(f"{settings.seed}/everything").shuffle(calls)
        self._calls = [call for group in calls for call in group]
        self._total = sum(len(batch) for *_, batch in self._calls)
        if style.likeliest:
            self.per_unit = len(settings.kinds) * max(1, self.per_unit // len(settings.kinds))

    def plan(self, unit: int, history: History) -> list[Call]:
        """The next calls of the list, whatever the history."""
        size = self.per_unit
        return [self.call(number) for number in range(len(self._calls))[unit * size : (unit + 1) * size]]

    def call(self, number: int) -> Call:
        """What call ``number`` asks."""
        source, kind, window, batch = self._calls[number]
        prompt, pairs = self.style.seed_prompt(kind), tuple((i, "") for i in batch)
        if self.style.likeliest:
            return Call(number, source, window, prompt, pairs, (0.0,), likeliest=self.settings.wordings)
        temperatures = (0.0, *[self.style.wording_temperature] * (self.settings.wordings - 1))
        return Call(number, source, window, prompt, pairs, temperatures)

    def progress(self, history: History) -> tuple[int, int]:
        """(sentences asked about, sentences), each counted in every kind."""
        return history.asked, self._total

    def most_questions(self, history: History) -> int:
        """All wordings about the other sentences."""
        return (self._total - history.asked) * self.settings.wordings


class CoveragePlanner:
    """Samples until every document has its conversations or is exhausted, or until ``settings.conversations`` are kept in
    all; then retries documents about which none is.

    A point walks evenly (by the golden ratio) over the tokens of all documents that lack some, so that these get calls in
    proportion to their length. A document is exhausted after :data:`MAX_QUESTIONS_PER_SENTENCE` or
    :data:`MAX_QUESTIONS_EACH`: model and text do not allow more conversations than were kept until then.
    """

    every_sentence = False

    def __init__(self, sources: Sequence[SplitDocument], style: PromptStyle, settings: SelfStudy) -> None:
        self.sources, self.style, self.settings = sources, style, settings
        self.per_call, self.per_unit = style.sizes(settings)
        self.lengths = [sum(source.lengths) for source in sources]
        self.target = settings.conversations or sum(map(self._owed, sources))
        self._ends = list(accumulate(self.lengths))
        self._start = Random(f"{settings.seed}/walk").random()
        self._coverage: Coverage | None = None

    def plan(self, unit: int, history: History) -> list[Call]:
        """The calls of a unit; a pair is tried again only when every pair of its window was tried."""
        coverage = self.coverage(history)
        done = not coverage.length or (self.settings.conversations is not None and history.kept >= self.target)
        silent = [self.sources[i] for i in coverage.silent] if done else []
        hopeless = not done and coverage.asked > 12 * self.target + 1000
        if hopeless or (done and not silent):
            return []
        calls, size = list[Call](), self.per_unit
        tried = ChainMap[Topic, AbstractSet[Pair]]({}, history.tried)
        for number in range(unit * size, (unit + 1) * size):
            call = self.call(number, tried, silent, coverage.ends)
            tried[call.topic] = {*tried.get(call.topic, ()), *call.pairs}
            calls.append(call)
        return calls

    def call(
        self,
        number: int,
        tried: Mapping[Topic, AbstractSet[Pair]],
        silent: Sequence[SplitDocument] = (),
        ends: Sequence[int] | np.ndarray | None = None,
    ) -> Call:
        """What call ``number`` asks, given the pairs that earlier calls tried, in retries which documents, and where
        documents end on the walk."""
        s = self.settings
        source, window = self.window(number, silent, ends)
        kind = s.kinds[(number + number // len(s.kinds)) % len(s.kinds)]
        prompt, title = self.style.seed_prompt(kind), source.document.title
        if self.style.lists:  # always sampled, so that two lists about a window differ
            temperatures = (self.style.repeat_temperature,)
            return Call(number, source, window, prompt, (), temperatures, bool(silent), self.per_call)
        pairs = [
            (i, opening) for i in window for opening in prompt.openings_for(source.sentences[i], title, source.english)
        ]
        seen = tried.get((source.document.id, kind), frozenset())
        fresh = [pair for pair in pairs if pair not in seen]
        chosen = fresh or pairs
        Random(f"{s.seed}/call/{number}").shuffle(chosen)
        temperature = 0.0 if fresh else self.style.repeat_temperature
        return Call(number, source, window, prompt, tuple(chosen[: self.per_call]), (temperature,), bool(silent))

    def window(
        self, number: int, silent: Sequence[SplitDocument] = (), ends: Sequence[int] | np.ndarray | None = None
    ) -> tuple[SplitDocument, range]:
        """The document and sentences that call ``number`` reads, at most ``chunk_tokens`` tokens around a point of the
        walk, which passes documents that end at ``ends``, or over the silent documents in turn."""
        ends = self._ends if ends is None else ends
        along = (self._start + number * GOLDEN_RATIO) % 1.0
        if silent:
            source = silent[number % len(silent)]
            point = int(along * sum(source.lengths))
        else:
            point = int(along * ends[-1])
            index = bisect_right(ends, point)
            source, point = self.sources[index], point - (ends[index] - self.lengths[index])
        center = bisect_right(list(accumulate(source.lengths)), point)
        random = Random(f"{self.settings.seed}/window/{number}")
        return source, grow_window(source.lengths, center, self.settings.chunk_tokens, random)

    def progress(self, history: History) -> tuple[int, int]:
        """(conversations kept of those wanted, conversations wanted), without those that exhausted documents fail to
        give."""
        if self.settings.conversations is not None:
            return min(history.kept, self.target), self.target
        coverage = self.coverage(history)
        return coverage.kept, coverage.wanted

    def most_questions(self, history: History) -> int:
        """What exhausts all documents."""
        return self.coverage(history).questions_left

    def coverage(self, history: History) -> Coverage:
        """What a history says about every document: brought up to date where it is the history of the last call, so that
        a unit costs as much as its own documents and not as all of them."""
        if self._coverage is None or self._coverage.history is not history:
            ids, most = [s.document.id for s in self.sources], [self._most(s) for s in self.sources]
            owed = None if self.settings.conversations is not None else [self._owed(s) for s in self.sources]
            self._coverage = Coverage(history, ids, self.lengths, most, owed, MAX_RETRIES_PER_DOCUMENT)
        self._coverage.update()
        return self._coverage

    def _owed(self, source: SplitDocument) -> int:
        """Conversations that a document gets unless its text or the settings allow fewer."""
        effort = EFFORTS[self.settings.effort]
        return max(effort.least, int(sum(source.lengths) * effort.per_token))

    def _most(self, source: SplitDocument) -> int:
        most = len(source.sentences) * len(self.settings.kinds) * MAX_QUESTIONS_PER_SENTENCE
        return most if self.settings.conversations is not None else min(most, MAX_QUESTIONS_EACH * self._owed(source))
