"""Who is in the pool, who is target, who is visible: pure functions of seed, step and what was trained so far.

Memory plays no part here: once the pool is chosen, where cartridges are kept never changes a bit.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random


@dataclass(frozen=True)
class Example:
    """One conversation of a step: which document's, which of its conversations, and what it sees."""

    document: str
    index: int
    visible: tuple[str, ...]  # ordered by document id; holds the document itself


@dataclass(frozen=True)
class Step:
    """What one training step works on."""

    targets: tuple[str, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Schedule:
    """The training schedule of 2606.04557 as accounts of it tell (mixed visibility, least-trained-first rotation).

    Attributes:
        conversations: how many training conversations each document has.
        pool: cartridges trained at a time; targets: of these, how many a step trains; per_target: conversations each.
        isolation: probability that a conversation sees its own cartridge alone; else it also sees k ~ U(1,
            max_distractors) others, drawn from the pool and the guests. 1 is isolated training.
        guests: read-only cartridges from outside the pool that can be distractors; exchanged at every rotation.
        rotate_every, rotate_fraction: every so many steps this share of the pool leaves, the most trained first, and
            the least trained from outside enter.
        frozen: cartridges that learn no more, which are guests too (see cas/living.py).
    """

    conversations: Mapping[str, int]
    seed: int = 0
    pool: int = 20
    targets: int = 4
    per_target: int = 8
    isolation: float = 0.75
    max_distractors: int = 10
    guests: int = 0
    rotate_every: int = 10
    rotate_fraction: float = 0.5
    frozen: tuple[str, ...] = ()

    def _random(self, *purpose: object) -> Random:
        return Random("/".join(map(str, (self.seed, *purpose))))  # seeded by the string's hash, the same everywhere

    def _by_need(self, ids: Sequence[str], drawn: Mapping[str, int], purpose: Random) -> list[str]:
        """Least trained first, in passes over the document's own conversations, so that long documents get their share."""
        shuffled = sorted(ids)
        purpose.shuffle(shuffled)
        return sorted(shuffled, key=lambda i: drawn.get(i, 0) / self.conversations[i])

    def rotates(self, step: int) -> bool:
        """Whether pool and guests are chosen anew before this step."""
        return step % self.rotate_every == 0

    def rotate(
        self, step: int, pool: Sequence[str], drawn: Mapping[str, int]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The pool and the guests from this step on. ``drawn``: conversations trained so far by document."""
        inside = set(pool)
        outside = [i for i in self.conversations if i not in inside]
        need = self._by_need(outside, drawn, self._random(step, "enter"))
        if not pool:
            chosen = need[: self.pool]
        else:
            free = max(0, self.pool - len(pool))
            leaving = min(math.ceil(self.rotate_fraction * len(pool)), max(0, len(need) - free))
            stay = self._by_need(pool, drawn, self._random(step, "leave"))[: len(pool) - leaving]
            chosen = stay + need[: self.pool - len(stay)]
        left = sorted({*self.conversations, *self.frozen} - set(chosen))
        guests = self._random(step, "guests").sample(left, min(self.guests, len(left)))
        return tuple(sorted(chosen)), tuple(sorted(guests))

    def step(self, step: int, pool: Sequence[str], guests: Sequence[str], drawn: Mapping[str, int]) -> Step:
        """The targets of a step, their conversations and what each of these sees."""
        targets = self._targets(step, pool, drawn)
        others = sorted({*pool, *guests})
        random = self._random(step, "visibility")
        examples = []
        for target in targets:
            for n in range(self.per_target):
                index = self._conversation(target, drawn.get(target, 0) + n)
                visible = {target}
                candidates = [i for i in others if i != target]
                if random.random() >= self.isolation and candidates and self.max_distractors > 0:
                    k = random.randint(1, self.max_distractors)
                    visible |= set(random.sample(candidates, min(k, len(candidates))))
                examples.append(Example(target, index, tuple(sorted(visible))))
        return Step(targets, tuple(examples))

    def next_rotation(
        self, step: int, pool: Sequence[str], drawn: Mapping[str, int]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Pool and guests from the first rotation after this step on: what may be read meanwhile."""
        drawn = dict(drawn)
        while True:
            for target in self._targets(step, pool, drawn):
                drawn[target] = drawn.get(target, 0) + self.per_target
            step += 1
            if self.rotates(step):
                return self.rotate(step, pool, drawn)

    def _targets(self, step: int, pool: Sequence[str], drawn: Mapping[str, int]) -> tuple[str, ...]:
        return tuple(sorted(self._by_need(pool, drawn, self._random(step, "targets"))[: self.targets]))

    def _conversation(self, document: str, n: int) -> int:
        """Index of the n-th conversation drawn for a document: shuffled anew in every pass."""
        count = self.conversations[document]
        return _shuffled(f"{self.seed}/order/{document}/{n // count}", count)[n % count]


@lru_cache(256)  # as many passes of as many residents; a step asks for many places of few
def _shuffled(purpose: str, count: int) -> list[int]:
    order = list(range(count))
    Random(purpose).shuffle(order)
    return order
