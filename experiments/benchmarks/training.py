"""What a training step costs: against the frozen model alone, against PEFT, with rotation, with many residents, with many
documents."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import ExitStack

import torch

from budget.manager import trim_host_memory
from cas.errors import BudgetError
from cas.evaluation.machine import PeakMemory
from cas.options import TrainConfig
from cas.training.memory_sizes import plan_memory
from cas.training.trainer import Report, Trainer
from experiments.benchmarks.work import Work, ceiling, fictional, frozen, in_turn, peft, profiled, timed_steps

Sample = tuple[str, str, float]  # metric, what (ratio, or a figure with its unit), value


def steps(work: Work, count: int) -> Iterator[Sample]:
    """One visible cartridge, and a mix of 0.75 alone with up to 10 distractors, 20 resident."""
    model, p = work.model, work.p
    rivals = {"frozen": frozen(model), "peft": peft(model, p)}
    with work.store(24) as store:
        for one in timed_steps(work, store, 32, count, rivals, isolation=1.0, pool=20):
            yield "step_vs_frozen", "ratio", one.step / one.rivals["frozen"]
            yield "step_vs_peft", "ratio", one.step / one.rivals["peft"]
            yield "step_vs_frozen", "seconds", one.step
            yield "step_vs_frozen", "tokens", one.tokens
            yield "step_vs_frozen", "tflops", one.products / one.step / 1e12
            yield "step_vs_peft", "peft_seconds", one.rivals["peft"]
    yield "step_vs_frozen", "tflops_ceiling", ceiling(model.device, model.dtype, 8192 if work.on_gpu else 2048) / 1e12
    if not work.on_gpu:  # where the CPU's clock tells nothing about kernels
        with work.store(24) as store:
            for who, taken in profiled(work, store, rivals["frozen"], isolation=1.0, pool=20).items():
                for what, value in taken.items():
                    yield "step_vs_frozen", f"profile_{who}_{what}", value
    with work.store(24) as store:
        rivals.pop("peft")
        for one in timed_steps(work, store, 32, count, rivals, pool=20):
            yield "mixed_vs_frozen", "ratio", one.step / one.rivals["frozen"]
            yield "mixed_vs_frozen", "seconds", one.step


def residents(work: Work, count: int, pools: tuple[int, ...] = (8, 32, 128)) -> Iterator[Sample]:
    """The same visibility with more residents: up to 5 distractors of 8, 32 and 128, against the fewest."""
    with ExitStack() as stack:
        trainers = {}
        for pool in pools:
            store = stack.enter_context(work.store(pool, p=16))
            trainers[pool] = work.trainer(store, 8, 4 * (count + 1), pool=pool, max_distractors=5)
        for taken in in_turn(trainers, 4, count):
            for pool in pools[1:]:
                yield f"residents{pool}_vs_{pools[0]}", "ratio", taken[pool] / taken[pools[0]]


def rotation(work: Work, turns: int, every: int = 10) -> Iterator[Sample]:
    """Ten steps with half of the pool of 20 exchanged before them, through the store, against ten steps without."""
    with work.store(40) as rotating, work.store(20) as resting:
        moving = work.trainer(rotating, 32, every * (turns + 1), isolation=1.0, pool=20, rotate_every=every)
        still = work.trainer(resting, 32, every * (turns + 1), isolation=1.0, pool=20)
        taken, ratios, rest = 0.0, list[float](), in_turn({"still": still}, every, turns)

        def stepped(report: Report) -> None:
            nonlocal taken  # the other trainer's steps come between: one run, whose evicted cartridges are written
            taken += report.tokens / report.tokens_per_s
            if (report.step + 1) % every == 0:
                if report.step >= every:  # the first ten fill the pool
                    ratios.append(taken / next(rest)["still"])
                taken = 0.0

        moving.on_step = stepped
        moving.run()
        assert moving.manager.counters.store_writes > 10 * turns
    for ratio in ratios:
        yield "rotation_overhead", "ratio", ratio


def documents(work: Work, count: int, sizes: tuple[int, ...] = (256, 1024, 4096)) -> Iterator[Sample]:
    """Seconds a step, and memory it adds, with more documents: pool 20, a rotation every 10 steps."""
    with ExitStack() as stack:
        trainers: dict[int, Trainer] = {}
        memory: dict[int, float] = {}
        for size in (sizes[0], *sizes):  # the first warms up
            store = stack.enter_context(work.store(size, p=16))
            before = _anonymous()
            trainers[size] = work.trainer(store, 4, 10 * (count + 2), pool=20, rotate_every=10)
            trainers[size].run(until=10)
            memory[size] = _anonymous() - before
        for taken in in_turn(trainers, 10, count):
            for size in sizes[1:]:
                yield f"documents{size}_vs_{sizes[0]}", "ratio", taken[size] / taken[sizes[0]]
        for size in sizes[1:]:
            yield f"documents{size}_vs_{sizes[0]}", "more_bytes", memory[size] - memory[sizes[0]]


def largest_pool(work: Work) -> Iterator[Sample]:
    """On a GPU: the pool that the planner says fits all its memory, against the largest that does, tried upwards from there."""
    if not work.on_gpu:
        return
    device = work.model.device
    config = TrainConfig(tokens=work.p, budget=str(torch.cuda.get_device_properties(device).total_memory))
    planned, step, recompute = 0, 1 << 12, False
    while step:
        try:
            recompute = plan_memory(config, work.model, fictional(planned + step), None, planned + step).recompute
            planned += step
        except BudgetError:
            step //= 2
    fits = 0
    for factor in (1.0, 1.1, 1.2, 1.4, 1.7, 2.0):
        pool = int(factor * planned)
        try:
            with work.store(pool) as store:
                trainer = work.trainer(store, 8, 2, pool=pool)
                trainer.recompute = recompute
                trainer.run()
        except torch.OutOfMemoryError:
            break
        finally:
            torch.cuda.empty_cache()
        fits = pool
    yield "largest_pool", "ratio", planned / max(1, fits)
    yield "largest_pool", "planned", planned


def _anonymous() -> int:
    """Bytes of memory of this process once what is free is given back."""
    gc.collect()
    trim_host_memory()
    return PeakMemory.now()
