"""Who trains with whom: the same every time, mixed as asked for, and even for long and short documents."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cas.options import Training
from cas.training.schedule import Schedule, Step

IDS = [f"d{i:02d}" for i in range(12)]


def even(count: int = 12, conversations: int = 6, **options: Any) -> Schedule:
    return Schedule({f"d{i:02d}": conversations for i in range(count)}, Training(**options))


def play(
    schedule: Schedule, steps: int
) -> tuple[list[Step], dict[str, int], list[tuple[tuple[str, ...], tuple[str, ...]]]]:
    """Steps as the trainer takes them, conversations drawn by document, and pool and guests after every rotation."""
    pool: tuple[str, ...] = ()
    guests: tuple[str, ...] = ()
    drawn: dict[str, int] = {}
    taken, rotations = [], []
    for step in range(steps):
        if schedule.rotates(step):
            pool, guests = schedule.rotate(step, pool, drawn)
            rotations.append((pool, guests))
        work = schedule.step(step, pool, guests, drawn)
        for example in work.examples:
            drawn[example.document] = drawn.get(example.document, 0) + 1
        taken.append(work)
    return taken, drawn, rotations


OPTIONS: dict[str, Any] = {
    "seed": 3, "pool": 5, "targets": 2, "per_target": 3, "isolation": 0.4, "max_distractors": 4, "guests": 3, "rotate_every": 3,
}  # fmt: skip

PROGRAM = """
import json, sys
sys.path.insert(0, {tests!r})
from test_schedule import OPTIONS, Schedule, Training, play
ids = json.loads(sys.argv[1])
steps, drawn, rotations = play(Schedule({{i: 2 + int(i[1:]) for i in ids}}, Training(**OPTIONS)), 30)
print(json.dumps([repr(steps), sorted(drawn.items()), rotations]))
"""


def test_pure() -> None:
    """The same in processes with other hash seeds, and whatever the order of the documents."""
    program = PROGRAM.format(tests=str(Path(__file__).parent))
    outputs = []
    for seed, ids in (("0", IDS), ("1", IDS[::-1]), ("random", sorted(IDS, key=lambda i: i[::-1]))):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(ids)],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].count("Example(") == 30 * 2 * 3


def test_same_input_same_output() -> None:
    """No state: a step can be asked for again, and in any order."""
    schedule, drawn = even(**OPTIONS), {"d03": 4, "d01": 1}
    pool, guests = schedule.rotate(6, IDS[:5], drawn)
    first = schedule.step(6, pool, guests, drawn)
    schedule.step(7, pool, guests, drawn)
    assert schedule.rotate(6, IDS[4::-1], dict(reversed(drawn.items()))) == (pool, guests)
    assert schedule.step(6, pool[::-1], guests[::-1], drawn) == first
    other = even(**(OPTIONS | {"seed": 4}))
    assert other.step(6, pool, guests, drawn) != first


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=14), st.integers(1, 16), st.integers(1, 6), st.integers(1, 4),
    st.floats(0, 1), st.integers(0, 12), st.integers(0, 8), st.integers(1, 5), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=120, deadline=None)
def test_invariants(
    counts: list[int], pool: int, targets: int, per_target: int, isolation: float, max_distractors: int, guests: int,
    rotate_every: int, rotate_fraction: float, seed: int,
) -> None:  # fmt: skip
    schedule = Schedule(
        {f"d{i:02d}": n for i, n in enumerate(counts)},
        Training(
            seed=seed, pool=pool, targets=targets, per_target=per_target, isolation=isolation, max_distractors=max_distractors,
            guests=guests, rotate_every=rotate_every, rotate_fraction=rotate_fraction,
        ),
    )  # fmt: skip
    steps, _, rotations = play(schedule, 12)
    for now, beside in rotations:
        assert list(now) == sorted(set(now)) and list(beside) == sorted(set(beside))
        assert len(now) == min(pool, len(counts))
        assert set(now).isdisjoint(beside)
        assert len(beside) == min(guests, len(counts) - len(now))
    for n, step in enumerate(steps):
        now, beside = rotations[n // rotate_every]
        assert list(step.targets) == sorted(set(step.targets))
        assert set(step.targets) <= set(now) and len(step.targets) == min(targets, len(now))
        assert Counter(e.document for e in step.examples) == dict.fromkeys(step.targets, per_target)
        for example in step.examples:
            assert 0 <= example.index < schedule.conversations[example.document]
            assert example.document in example.visible
            assert list(example.visible) == sorted(set(example.visible))
            assert set(example.visible) <= {*now, *beside}
            assert len(example.visible) <= 1 + max_distractors


def test_isolated_training_sees_nothing_else() -> None:
    steps, _, _ = play(even(**(OPTIONS | {"isolation": 1.0})), 40)
    assert {e.visible == (e.document,) for s in steps for e in s.examples} == {True}


def test_visibility_has_the_paper_s_distribution() -> None:
    """Alone with probability 0.75, else k ~ U(1, 10) others, and every other one equally often."""
    schedule = even(30, pool=20, targets=20, per_target=10, isolation=0.75, max_distractors=10, guests=10)
    pool, guests = schedule.rotate(0, (), {})
    sizes, seen, total = Counter[int](), Counter[str](), 0
    for step in range(60):
        for example in schedule.step(step, pool, guests, {}).examples:
            sizes[len(example.visible) - 1] += 1
            seen.update(set(example.visible) - {example.document})
            total += 1
    assert total == 12_000
    assert sizes[0] / total == pytest.approx(0.75, abs=0.015)  # four standard deviations
    mixed = total - sizes[0]
    assert set(sizes) == set(range(11))
    for k in range(1, 11):
        assert sizes[k] / mixed == pytest.approx(0.1, abs=0.023)
    assert set(seen) == {*pool, *guests}
    for name in seen:  # 5.5 of 29 on average; a guest can be beside each of the 20 targets, a trainee beside 19
        assert seen[name] == pytest.approx(mixed * 5.5 / 29 * (0.95 if name in pool else 1), rel=0.2)


def test_a_small_pool_caps_the_distractors() -> None:
    schedule = even(**(OPTIONS | {"isolation": 0.0, "max_distractors": 10, "guests": 0, "pool": 3}))
    steps, _, _ = play(schedule, 30)
    sizes = Counter(len(e.visible) for s in steps for e in s.examples)
    assert set(sizes) == {2, 3} and sizes[3] > 5 * sizes[2]  # k >= 2 with probability 0.9


def test_rotation_brings_the_least_trained() -> None:
    schedule = even(**(OPTIONS | {"pool": 4, "rotate_fraction": 0.5, "guests": 0}))
    drawn = {name: 10 * n for n, name in enumerate(IDS)}
    pool, guests = schedule.rotate(3, ("d02", "d05", "d08", "d11"), drawn)
    assert pool == ("d00", "d01", "d02", "d05")  # the two most trained left, the two least trained of all others came
    assert guests == ()
    assert schedule.rotate(3, pool, drawn)[0] == ("d00", "d01", "d03", "d04")


@pytest.mark.parametrize(("fraction", "stay"), [(0.0, 4), (0.25, 3), (0.3, 2), (0.5, 2), (1.0, 0)])
def test_rotate_fraction(fraction: float, stay: int) -> None:
    schedule = even(**(OPTIONS | {"pool": 4, "rotate_fraction": fraction}))
    drawn = {name: 10 * n for n, name in enumerate(IDS)}
    pool, _ = schedule.rotate(3, tuple(IDS[8:]), drawn)
    assert pool == tuple(sorted(IDS[: 4 - stay] + IDS[8 : 8 + stay]))


def test_need_is_counted_in_passes() -> None:
    """A long document with as many draws as a short one is further behind."""
    schedule = Schedule({"long": 40, "short": 10, "other": 10}, Training(pool=1, targets=1))
    assert schedule.rotate(0, (), {"long": 20, "short": 10, "other": 9})[0] == ("long",)
    assert schedule.step(1, ("long", "short"), (), {"long": 20, "short": 4}).targets == ("short",)


def test_a_pool_of_all_documents_never_changes() -> None:
    schedule = even(**(OPTIONS | {"pool": 12}))
    _, _, rotations = play(schedule, 9)
    assert rotations == [(tuple(IDS), ())] * 3


def test_guests_are_exchanged() -> None:
    _, _, rotations = play(even(**(OPTIONS | {"rotate_fraction": 0.0})), 30)
    assert len({pool for pool, _ in rotations}) == 1
    assert len({guests for _, guests in rotations}) > 5


def test_a_pool_can_grow() -> None:
    """A run that goes on with a pool that is not full yet fills it."""
    pool, _ = even(**(OPTIONS | {"pool": 6})).rotate(3, ("d00", "d01"), {})
    assert len(pool) == 6


def test_all_documents_are_trained_evenly() -> None:
    """100 documents of very different lengths through a pool of 20, with the defaults: never more than 1.5 passes
    apart."""
    conversations = {f"d{i:03d}": 16 + (i * 37) % 100 for i in range(100)}
    schedule = Schedule(conversations, Training(pool=20, targets=4, per_target=8, rotate_every=10, guests=5))
    total = sum(conversations.values())
    steps, drawn, _ = play(schedule, 4 * total // 32)
    passes = [drawn[name] / n for name, n in conversations.items()]
    assert sum(drawn.values()) == 32 * len(steps)
    assert 4 - 1.5 < min(passes) <= max(passes) < 4 + 1.5
    spread = sorted(passes)[10:90]
    assert spread[-1] - spread[0] < 1.0


def test_every_pass_draws_every_conversation_once() -> None:
    steps, drawn, _ = play(Schedule({"a": 7, "b": 5}, Training(pool=2, targets=2, per_target=1, seed=9)), 35)
    assert drawn == {"a": 35, "b": 35}
    for name, count in (("a", 7), ("b", 5)):
        order = [e.index for s in steps for e in s.examples if e.document == name]
        passes = [order[i : i + count] for i in range(0, 35, count)]
        assert all(sorted(each) == list(range(count)) for each in passes)
        assert len({tuple(each) for each in passes}) > 1
