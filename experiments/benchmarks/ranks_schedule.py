"""Whether ranks cover a large collection evenly: the real deals and schedules, without a model.

python -m experiments.benchmarks.ranks_schedule --documents 100000 --ranks 8 --output DIR

Every rank's schedule is gone through step by step, and documents are dealt out anew as in training. Counted are the
conversations that every document was trained on, those of other documents that saw it as a distractor, the ranks that it
has been on, and which pairs of documents have been on one rank together.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from cas import console
from cas.evaluation.machine import hardware, versions
from cas.evaluation.recording import flags
from cas.options import Training, parse
from cas.store.files import write_atomically
from cas.training.ranks.deals import Deal, begin_deal, dealt, next_deal, steps_of_a_rank
from cas.training.schedule import Schedule

PAIRS = 100_000  # of documents that are followed


@dataclass(frozen=True)
class Config:
    """Go through the schedule of a training by ranks, without a model."""

    documents: int = 100_000
    """Documents of the collection."""
    ranks: int = 8
    """Processes that train."""
    conversations: int = 16
    """Conversations of each document."""
    epochs: float = 1.0
    """Passes over all conversations."""
    exchange_every: int = 500
    """Steps between deals."""
    seed: int = 0
    """Of deals and schedules."""
    output: str | None = None
    """Folder of the results."""


@dataclass
class Coverage:
    """Counts of a simulation, by document; ``together``: for each pair that is followed, whether they have met."""

    ids: Sequence[str]
    drawn: dict[str, int]
    seen: Counter[str]
    ranks: dict[str, set[int]]
    pairs: Sequence[tuple[str, str]]
    together: list[bool]
    half: list[int]
    deals: int = 0


def simulate(config: Config) -> Coverage:
    """Every step of every rank."""
    training = Training(epochs=config.epochs, seed=config.seed, pool=20)
    ids, random = [f"{n:06d}" for n in range(config.documents)], Random(config.seed)
    pairs = [(a, b) for a, b in (random.sample(ids, 2) for _ in range(min(PAIRS, config.documents**2)))]
    found = Coverage(ids, dict.fromkeys(ids, 0), Counter(), {i: set() for i in ids}, pairs, [False] * len(pairs), [])
    steps = steps_of_a_rank(training, config.conversations * len(ids), len(ids), config.ranks)
    deal = Deal(parts=0, world=config.ranks)
    while not deal.finished:
        deal = begin_deal(deal, training, steps, config.ranks, 0.0)
        until = next_deal(deal.step, steps, config.exchange_every, training.rotate_every)
        owner = {}
        for rank, names in enumerate(dealt(ids, config.seed, deal.number, config.ranks)):
            for name in names:
                owner[name] = rank
                found.ranks[name].add(rank)
            _stretch(found, Schedule(dict.fromkeys(names, config.conversations), training), deal.step, until)
        found.together = [met or owner[a] == owner[b] for met, (a, b) in zip(found.together, found.pairs)]
        found.deals = deal.number
        if not found.half and until >= steps / 2:
            found.half = sorted(found.drawn.values())
        deal = Deal(0, deal.number, config.ranks, until, steps)
        print(f"deal {deal.number}: step {until} of {steps}", file=sys.stderr, flush=True)
    return found


def _stretch(found: Coverage, schedule: Schedule, step: int, until: int) -> None:
    pool: tuple[str, ...] = ()
    guests: tuple[str, ...] = ()
    while step < until:
        if schedule.rotates(step):
            pool, guests = schedule.rotate(step, pool, found.drawn)
        work = schedule.step(step, pool, guests, found.drawn)
        for example in work.examples:
            found.drawn[example.document] += 1
            found.seen.update(name for name in example.visible if name != example.document)
        step += 1


def figures(found: Coverage) -> Mapping[str, Mapping[str, float]]:
    """``{what: {mean, least, most}}`` of the counts, and the 1st and 99th percentile."""
    counts = {
        "conversations": list(found.drawn.values()),
        "conversations_at_half_time": found.half,
        "seen_as_distractor": [found.seen[i] for i in found.ids],
        "ranks_visited": [len(found.ranks[i]) for i in found.ids],
    }
    table = {name: _spread(sorted(values)) for name, values in counts.items()}
    return table | {"pairs_that_met": {"mean": sum(found.together) / len(found.together)}}


def _spread(values: Sequence[int]) -> dict[str, float]:
    """Of sorted counts."""
    places = {"least": 0, "p1": len(values) // 100, "p99": len(values) * 99 // 100, "most": len(values) - 1}
    return {"mean": sum(values) / len(values), **{name: values[place] for name, place in places.items()}}


def run(config: Config) -> int:
    """Simulate, print the figures, and record them."""
    started = time.monotonic()
    found = simulate(config)
    table = figures(found)
    for name, figure in table.items():
        print(f"{name:<28}" + "".join(f"  {key} {value:.5g}" for key, value in figure.items()))
    print(f"{found.deals} deals, {time.monotonic() - started:.0f} s")
    if config.output is not None:
        command = "python -m experiments.benchmarks.ranks_schedule " + flags(config, "output")
        about = {"command": command, "hardware": hardware(), "versions": versions(), "deals": found.deals}
        settings = {name: value for name, value in asdict(config).items() if name != "output"}
        Path(config.output).mkdir(parents=True, exist_ok=True)
        text = json.dumps({**about, "settings": settings, "figures": table}, indent=1)
        write_atomically(Path(config.output) / "results.json", f"{text}\n".encode())
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status."""
    return console.run(lambda: run(parse(Config, "python -m experiments.benchmarks.ranks_schedule", arguments)))


if __name__ == "__main__":
    sys.exit(main())
