"""Which cartridges are in the pool, which a step trains, and what each conversation sees.

Pure functions of the seed, the step and what was trained so far. Memory plays no part here: where cartridges are stored
between their turns never changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random

from cas.options import Training

MAX_DEFAULT_POOL = 20  # as in 2606.04557


@dataclass(frozen=True)
class Example:
    """One conversation of a step: which document's, which of its conversations, and what it sees."""

    document: str
    index: int
    visible: tuple[str, ...]  # ordered by document id; includes the document itself


@dataclass(frozen=True)
class Step:
    """What one training step works on."""

    targets: tuple[str, ...]
    examples: tuple[Example, ...]


def guest_count(training: Training, frozen: int) -> int:
    """How many frozen distractors are resident: as set, but beside ``frozen`` cartridges of earlier rounds at least as
    many as one conversation may see."""
    return max(training.guests, min(frozen, training.max_distractors if training.isolation < 1 else 0))


@dataclass(frozen=True)
class Schedule:
    """The training schedule of 2606.04557, as far as public accounts describe it.

    Attributes:
        conversations: how many training conversations each document has.
        training: the settings; :class:`cas.options.Training` explains each.
        frozen: cartridges of earlier rounds, which do not learn; frozen distractors are drawn from them too.

    ``guests`` are the frozen distractors: read-only cartridges from outside the pool, exchanged at every rotation.
    """

    conversations: Mapping[str, int]
    training: Training = field(default_factory=Training)
    frozen: tuple[str, ...] = ()

    @property
    def pool(self) -> int:
        """Cartridges that are trained at a time."""
        return min(self.training.pool or MAX_DEFAULT_POOL, len(self.conversations))

    @property
    def targets(self) -> int:
        """Cartridges that one step trains."""
        return min(self.training.targets, self.pool)

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        t = self.training
        if t.steps is not None:
            return t.steps
        return max(1, round(t.epochs * sum(self.conversations.values()) / (self.targets * t.per_target)))

    @property
    def warmup(self) -> int:
        """Steps of a cartridge's own until its learning rate peaks: at most half of those that it gets."""
        each = self.steps * self.targets // len(self.conversations)
        return min(self.training.warmup, max(1, each // 2))

    def _random(self, *purpose: object) -> Random:
        return Random(
            "/".join(map(str, (self.training.seed, *purpose)))
        )  # seeded by the string, the same on every machine

    def _by_need(self, ids: Sequence[str], drawn: Mapping[str, int], purpose: Random) -> list[str]:
        """Least trained first, in passes over a document's own conversations, so that long ones get their share."""
        shuffled = sorted(ids)
        purpose.shuffle(shuffled)
        return sorted(shuffled, key=lambda i: drawn.get(i, 0) / self.conversations[i])

    def rotates(self, step: int) -> bool:
        """Whether pool and guests are chosen again before this step."""
        return step % self.training.rotate_every == 0

    def rotate(
        self, step: int, pool: Sequence[str], drawn: Mapping[str, int]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Pool and guests from this step on. ``drawn``: conversations trained so far, by document."""
        inside = set(pool)
        outside = [i for i in self.conversations if i not in inside]
        need = self._by_need(outside, drawn, self._random(step, "enter"))
        if not pool:
            chosen = need[: self.pool]
        else:
            free = max(0, self.pool - len(pool))
            leaving = min(math.ceil(self.training.rotate_fraction * len(pool)), max(0, len(need) - free))
            stay = self._by_need(pool, drawn, self._random(step, "leave"))[: len(pool) - leaving]
            chosen = stay + need[: self.pool - len(stay)]
        left = sorted({*self.conversations, *self.frozen} - set(chosen))
        guests = self._random(step, "guests").sample(left, min(guest_count(self.training, len(self.frozen)), len(left)))
        return tuple(sorted(chosen)), tuple(sorted(guests))

    def step(self, step: int, pool: Sequence[str], guests: Sequence[str], drawn: Mapping[str, int]) -> Step:
        """The targets of a step, their conversations and what each of these sees."""
        t, targets = self.training, self._targets(step, pool, drawn)
        others = sorted({*pool, *guests})
        random = self._random(step, "visibility")
        examples = []
        for target in targets:
            for n in range(t.per_target):
                index = self._conversation(target, drawn.get(target, 0) + n)
                visible = {target}
                candidates = [i for i in others if i != target]
                if random.random() >= t.isolation and candidates and t.max_distractors > 0:
                    k = random.randint(1, t.max_distractors)
                    visible |= set(random.sample(candidates, min(k, len(candidates))))
                examples.append(Example(target, index, tuple(sorted(visible))))
        return Step(targets, tuple(examples))

    def next_rotation(
        self, step: int, pool: Sequence[str], drawn: Mapping[str, int]
    ) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Pool and guests of the next rotation after this step, for reading them ahead."""
        drawn = dict(drawn)
        while True:
            for target in self._targets(step, pool, drawn):
                drawn[target] = drawn.get(target, 0) + self.training.per_target
            step += 1
            if self.rotates(step):
                return self.rotate(step, pool, drawn)

    def _targets(self, step: int, pool: Sequence[str], drawn: Mapping[str, int]) -> tuple[str, ...]:
        return tuple(sorted(self._by_need(pool, drawn, self._random(step, "targets"))[: self.targets]))

    def _conversation(self, document: str, n: int) -> int:
        """Index of the n-th conversation drawn for a document; every pass has its own order."""
        count = self.conversations[document]
        return _shuffled(f"{self.training.seed}/order/{document}/{n // count}", count)[n % count]


@lru_cache(256)  # a step reads many places of the orders of few documents
def _shuffled(purpose: str, count: int) -> list[int]:
    order = list(range(count))
    Random(purpose).shuffle(order)
    return order
