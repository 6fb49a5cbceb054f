"""What self-study has about every document so far, counted as it goes on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

import numpy as np


class Counts(Protocol):
    """Of a history (:class:`cas.selfstudy.planners.History`), what is counted here."""

    asked_about: Counter[str]
    questions: dict[str, set[str]]
    retries: Counter[str]
    changed: list[str]


class Coverage:
    """The figures of a history that a planner asks for at every unit.

    A document is exhausted when as many questions were asked about it as ``most`` allows, and open until then or until it
    has the conversations that it is owed.

    Attributes:
        asked: questions about all documents, dropped ones included. questions_left: those that would exhaust the open ones.
        kept, wanted: conversations, of each document at most those that it is owed; those of documents that are no longer
            open, and of the others what they are owed. Both 0 where nothing is owed.
        length, ends: tokens of all open documents, and where each ends among them, int64 [documents].
    """

    def __init__(
        self,
        history: Counts,
        ids: Sequence[str],
        lengths: Sequence[int],
        most: Sequence[int],
        owed: Sequence[int] | None,
        retries: int,
    ) -> None:
        """All of every document: ``ids``, ``lengths`` in tokens, the ``most`` questions about it, conversations that it is
        ``owed`` (None: any number). ``retries``: of a document about which nothing is kept."""
        self.history = history
        self._numbers = {name: number for number, name in enumerate(ids)}
        self._ids, self._most, self._owed, self._retries = ids, most, owed, retries
        self._lengths, self.length = np.array(lengths, np.int64), sum(lengths)
        self._figures = [(0, 0, 0, 0)] * len(ids)  # what each document has added to the four sums
        self._silent, self._closed = set[int](), [False] * len(ids)
        self._in_order: list[int] | None = None  # the silent ones
        self.asked = self.questions_left = self.kept = self.wanted = 0
        self._seen = len(history.changed)
        for number in range(len(ids)):
            self._count(number)
        self.ends = np.cumsum(self._lengths)

    def update(self) -> None:
        """Count what the history has got since the last call."""
        changed, self._seen = self.history.changed[self._seen :], len(self.history.changed)
        before = self.length
        for name in changed:
            self._count(self._numbers[name])
        if self.length != before:
            self.ends = np.cumsum(self._lengths)

    @property
    def silent(self) -> list[int]:
        """Documents (their numbers) about which nothing is kept, that have retries left and are not exhausted."""
        if self._in_order is None:
            self._in_order = sorted(self._silent)
        return self._in_order

    def _count(self, number: int) -> None:
        history, name = self.history, self._ids[number]
        asked, kept = history.asked_about[name], len(history.questions.get(name, ()))
        owed, exhausted = self._owed[number] if self._owed is not None else None, asked >= self._most[number]
        is_open = not exhausted and (owed is None or kept < owed)
        of_owed = min(kept, owed or 0)
        figures = asked, self._most[number] - asked if is_open else 0, of_owed, (owed or 0) if is_open else of_owed
        changes = [new - old for new, old in zip(figures, self._figures[number], strict=True)]
        self._figures[number] = figures
        self.asked, self.questions_left = self.asked + changes[0], self.questions_left + changes[1]
        self.kept, self.wanted = self.kept + changes[2], self.wanted + changes[3]
        if not is_open and not self._closed[number]:
            self.length -= int(self._lengths[number])
            self._closed[number], self._lengths[number] = True, 0
        silent = not kept and not exhausted and history.retries[name] < self._retries
        if silent != (number in self._silent):
            (self._silent.add if silent else self._silent.discard)(number)
            self._in_order = None
