"""What a training step costs: against the frozen model alone, against PEFT, with rotation, with many residents, with many
documents."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator

from cas.trainer import Report, Trainer
from experiments.benchmarks.work import Work, frozen, peft, timed_steps

Sample = tuple[str, str, float]  # metric, what (ratio, or a figure with its unit), value


def steps(work: Work, count: int) -> Iterator[Sample]:
    """One visible cartridge, and a mix of 0.75 alone with up to 10 distractors, 20 resident."""
    model, p = work.model, work.p
    rivals = {"frozen": frozen(model), "peft": peft(model, p)}
    with work.store(24) as store:
        for one in timed_steps(work, store, work.conversations(store), count, rivals, isolation=1.0, pool=20):
            yield "step_vs_frozen", "ratio", one.step / one.rivals["frozen"]
            yield "step_vs_peft", "ratio", one.step / one.rivals["peft"]
            yield "step_vs_frozen", "seconds", one.step
            yield "step_vs_frozen", "tokens", one.tokens
            yield "step_vs_peft", "peft_seconds", one.rivals["peft"]
    with work.store(24) as store:
        rivals.pop("peft")
        for one in timed_steps(work, store, work.conversations(store), count, rivals, pool=20):
            yield "mixed_vs_frozen", "ratio", one.step / one.rivals["frozen"]
            yield "mixed_vs_frozen", "seconds", one.step


def residents(work: Work, count: int, pools: tuple[int, ...] = (8, 32, 128)) -> Iterator[Sample]:
    """The same visibility with more residents: up to 5 distractors of 8, 32 and 128, against the fewest."""
    found: dict[int, list[float]] = {}
    for pool in pools:
        with work.store(pool, p=16) as store:
            timed = timed_steps(work, store, work.conversations(store, 8), count, pool=pool, max_distractors=5, warm=3)
            found[pool] = [one.step for one in timed]
    for pool in pools[1:]:
        for few, many in zip(found[pools[0]], found[pool]):
            yield f"residents{pool}_vs_{pools[0]}", "ratio", many / few


def rotation(work: Work, turns: int, every: int = 10) -> Iterator[Sample]:
    """Ten steps with half of the pool of 20 exchanged before them, through the store, against ten steps without."""
    seconds: dict[str, list[float]] = {}
    with work.store(40) as rotating, work.store(20) as resting:
        made = {"rotating": (rotating, every), "resting": (resting, 10**6)}
        trainers = {}
        for name, (store, rotate_every) in made.items():
            trainers[name] = Trainer(
                work.model, store, work.conversations(store), steps=every * (turns + 1), isolation=1.0, pool=20,
                rotate_every=rotate_every, checkpoint_every=10**6,
            )  # fmt: skip
        for turn in range(turns + 1):  # side by side
            for name, trainer in trainers.items():
                taken: list[float] = []

                def stepped(report: Report, taken: list[float] = taken) -> None:
                    taken.append(report.tokens / report.tokens_per_s)

                trainer.on_step = stepped
                trainer.run(until=every * (turn + 1))
                if turn:  # the first fills the pool
                    seconds.setdefault(name, []).append(sum(taken))
    for a, b in zip(seconds["rotating"], seconds["resting"]):
        yield "rotation_overhead", "ratio", a / b


def documents(work: Work, count: int, sizes: tuple[int, ...] = (256, 1024, 4096)) -> Iterator[Sample]:
    """Seconds a step, and memory it adds, with more documents: pool 20, a rotation every 10 steps."""
    found: dict[int, list[float]] = {}
    memory: dict[int, float] = {}
    for size in sizes:
        with work.store(size, p=16) as store:
            before, started = _anonymous(), time.perf_counter()
            talks = work.conversations(store, 4)
            timed = timed_steps(work, store, talks, count, pool=20, rotate_every=10, warm=10)
            found[size], memory[size] = [one.step for one in timed], _anonymous() - before
            print(f"{size} documents: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    for size in sizes[1:]:
        for few, many in zip(found[sizes[0]], found[size]):
            yield f"documents{size}_vs_{sizes[0]}", "ratio", many / few
        yield f"documents{size}_vs_{sizes[0]}", "more_bytes", memory[size] - memory[sizes[0]]


def _anonymous() -> float:
    """Bytes of anonymous memory of this process now (Linux), else its peak."""
    try:
        with open("/proc/self/status") as status:
            return 1024.0 * next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))
    except OSError:
        return 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
