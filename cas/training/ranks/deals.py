"""How documents are dealt out to ranks, and dealt out anew.

::

    STORE/ranks/parts/00003/      self-study, first values and index of a part of the documents: an ordinary store
    STORE/ranks/deal-00002/1/     what rank 1 trains until the next deal: an ordinary store, its *shard*
    STORE/ranks/deal.json         which deal counts
    STORE/ranks/logs/             of the steps of earlier deals

A deal copies every cartridge with its Adam state from the parts, or from the shards of the deal before, into new shards.
The old ones stay until ``deal.json`` names the new ones, so a training that is killed at any instant goes on from whole
shards; on another number of ranks it deals out anew. Which document goes where follows from the seed and the number of
the deal.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from cas.errors import ConfigError, StoreLocked
from cas.options import Training
from cas.store.files import write_atomically
from cas.store.merge import copy_documents, create_like
from cas.store.store import Store
from cas.training.ranks import FOLDER
from cas.training.schedule import MAX_DEFAULT_POOL, guest_count

PART = 256  # documents of a part, at most


@dataclass(frozen=True)
class Deal:
    """What ``deal.json`` says.

    Attributes:
        parts: how many there are. number: of the deal; 0: none yet, self-study is on.
        world: ranks. step: of every rank, where the deal begins. steps: of every rank's whole training.
        skipped, restored: of the loss guard, on all ranks before this deal.
    """

    parts: int
    number: int = 0
    world: int = 0
    step: int = 0
    steps: int = 0
    skipped: int = 0
    restored: int = 0

    @classmethod
    def load(cls, store: Path) -> Deal | None:
        """The deal that counts; None before the first."""
        file = store / FOLDER / "deal.json"
        return cls(**json.loads(file.read_text())) if file.exists() else None

    def save(self, store: Path) -> None:
        """From now on this one counts."""
        write_atomically(store / FOLDER / "deal.json", json.dumps(asdict(self)).encode())

    def shards(self, store: Path) -> list[Path]:
        """The folders of its shards, by rank."""
        return [store / FOLDER / f"deal-{self.number:05d}" / str(rank) for rank in range(self.world)]

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return self.number > 0 and self.step >= self.steps


def part_folders(store: Path, parts: int) -> list[Path]:
    """The folders of the parts."""
    return [store / FOLDER / "parts" / f"{n:05d}" for n in range(parts)]


def count_parts(documents: int, world: int) -> int:
    """How many parts a collection is cut into: as many for every rank."""
    return min(documents, world * math.ceil(documents / (PART * world)))


def cut(tokens: Mapping[str, int], parts: int) -> list[list[str]]:
    """Ids in parts of about as many documents and tokens each. ``tokens``: of every document."""
    ordered = sorted(tokens, key=lambda name: (-tokens[name], name))
    return [sorted(ordered[n::parts]) for n in range(parts)]


def dealt(ids: Sequence[str], seed: int, number: int, world: int) -> list[list[str]]:
    """Ids by rank, at random by seed and number of the deal; ranks get as many, or one more."""
    shuffled = sorted(ids)
    Random(f"{seed}/deal/{number}").shuffle(shuffled)
    return [sorted(shuffled[rank::world]) for rank in range(world)]


def steps_of_a_rank(training: Training, conversations: int, documents: int, world: int) -> int:
    """Steps of every rank's training, as :attr:`cas.training.schedule.Schedule.steps` says for one process. ``--steps``
    are steps of all ranks together."""
    if training.steps is not None:
        return max(1, math.ceil(training.steps / world))
    targets = min(training.targets, training.pool or MAX_DEFAULT_POOL, documents // world)
    return max(1, round(training.epochs * conversations / (world * targets * training.per_target)))


def deals_every(given: int | None, documents: int, steps: int, world: int) -> int:
    """Steps between deals: as given, or such that deals copy at most half of what rotations do (each step of a pool of
    20 moves one cartridge in and one out), and at least eight times. A rank alone has nothing to exchange."""
    if world == 1:
        return steps
    return given or max(1, min(2 * documents // world, steps // 8))


def next_deal(step: int, steps: int, every: int, rotate_every: int) -> int:
    """The step at which documents are dealt out again: with a rotation, since pools change."""
    every = math.ceil(every / rotate_every) * rotate_every
    return min(steps, (step // every + 1) * every)


def begin_deal(before: Deal, training: Training, steps: int, world: int, done: float, **guard: int) -> Deal:
    """The deal after another one. ``done``: the share of the training that is done; ``steps``: of a rank of this world."""
    step = before.step
    if world != before.world:
        step = math.floor(done * steps / training.rotate_every) * training.rotate_every
    return replace(before, number=before.number + 1, world=world, step=step, steps=steps, **guard)


def make_shard(
    folder: Path, store: Store, sources: Sequence[Path], names: Sequence[str], frozen: Sequence[str], deal: Deal
) -> None:
    """This rank's shard of a deal.

    Args: store: what is trained; sources: where the cartridges are; names: of the documents that it trains; frozen: of
        cartridges of earlier rounds that distract.
    """
    if folder.exists():  # of a deal that was interrupted
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    wanted, settings = set(names), dict[str, Any]()
    with create_like(store, folder) as shard:
        for source in sources:
            with Store.open(source) as opened:
                copy_documents(opened, wanted & opened.rows().keys(), shard)
                settings = (opened.run_state() or {}).get("settings", settings)
        copy_documents(store, frozen, shard, state=False)
        # Steps are of this world; everything else has to stay.
        settings = {k: v for k, v in settings.items() if k not in ("steps", "total_steps")}
        with shard.training():
            shard.commit({}, {"step": deal.step, "pool": (), "guests": (), "settings": settings})
        assert len(shard.rows()) == len(names) + len(frozen)


def distractors(frozen: Sequence[str], training: Training, steps: int, deal: Deal) -> list[list[str]]:
    """Cartridges of earlier rounds that each rank gets for so many steps: no more than its rotations can show."""
    wanted = guest_count(training, len(frozen)) * math.ceil(steps / training.rotate_every)
    return [ids[:wanted] for ids in dealt(frozen, training.seed, deal.number, deal.world)]


def clean(store: Path, deal: Deal) -> None:
    """Remove what no deal that counts has, but for the logs."""
    folder = store / FOLDER
    logs = folder / "logs"
    logs.mkdir(exist_ok=True)
    for old in sorted(folder.glob("deal-*")):
        if old.name == f"deal-{deal.number:05d}" or not old.is_dir():
            continue
        if old.name < f"deal-{deal.number:05d}":  # a later one has not begun
            for log in sorted(old.glob("*/metrics*.jsonl")):
                log.replace(logs / f"{old.name}-{log.parent.name}-{log.name}")
        shutil.rmtree(old)


@contextlib.contextmanager
def alone(store: Path) -> Iterator[None]:
    """Hold the ranks' folder as the only training. Raises: StoreLocked if another one has it."""
    folder = store / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreLocked(f"{store}: another training is running on this store; wait for it or stop it") from error
        yield


def refuse_world(documents: int, world: int) -> None:
    """Raise ConfigError if there are more ranks than documents to train."""
    if documents < world:
        raise ConfigError(f"{world} ranks cannot share {documents} documents; start at most {documents}")
