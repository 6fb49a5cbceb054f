"""The books, the moves, the plan: against dictionaries, counted reads and writes, and sums by hand."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from budget.free_memory import host_free
from budget.ledger import Ledger
from budget.manager import Manager, guest_bytes, trainee_bytes
from budget.memory_plan import (
    RUNTIME_BYTES,
    DoesNotFit,
    Sizes,
    activation_bytes,
    decoding_bytes,
    make_plan,
    matching_bytes,
    size,
)

# -- ledger -------------------------------------------------------------------------------------------------------------


def test_ledger_adds_up() -> None:
    ledger = Ledger({"device": 100, "host": None})
    ledger.put("device", "a", 60)
    ledger.put("device", "b", 40)
    assert (ledger.used("device"), ledger.peak["device"]) == (100, 100)
    assert ledger.fits("device", 0) and not ledger.fits("device", 1)
    assert ledger.take("device", "a") == 60
    assert (ledger.used("device"), ledger.peak["device"]) == (40, 100)
    ledger.put("device", "c", 60)
    ledger.put("host", "a", 10**15)
    assert ledger.fits("host", 10**18)
    assert (ledger.names("device"), ledger.names("host")) == (["b", "c"], ["a"])


def test_ledger_refuses_what_its_caller_got_wrong() -> None:
    ledger = Ledger({"device": 100})
    ledger.put("device", "a", 60)
    with pytest.raises(AssertionError, match="a is on device already"):
        ledger.put("device", "a", 1)
    with pytest.raises(AssertionError, match=r"60 \+ 41 bytes exceed 100"):
        ledger.put("device", "b", 41)
    with pytest.raises(KeyError):
        ledger.take("device", "b")
    assert (ledger.used("device"), ledger.names("device")) == (60, ["a"])


def test_ledger_knows_the_longest_unused() -> None:
    ledger = Ledger({"host": None})
    for name in "abc":
        ledger.put("host", name, 1)
    ledger.use("host", "a")
    assert ledger.names("host") == ["b", "c", "a"]
    ledger.take("host", "c")
    ledger.put("host", "c", 1)
    assert ledger.names("host") == ["b", "a", "c"]


# -- manager ------------------------------------------------------------------------------------------------------------

ELEMENTS = 8
SLOT = trainee_bytes(ELEMENTS)
STATE = 3 * 4 * ELEMENTS  # kv and two moments in host memory


class Shelf:
    """A backing store in a dictionary, that writes down what is asked of it."""

    def __init__(self, names: Sequence[str]) -> None:
        self.tensors = {name: {"kv": torch.full((ELEMENTS,), float(n))} for n, name in enumerate(names)}
        self.calls: list[str] = []

    def read_tensors(self, name: str, parts: Sequence[str] | None = None) -> dict[str, Tensor]:
        self.calls.append(f"read {name}")
        return {k: t.clone() for k, t in self.tensors[name].items() if parts is None or k in parts}

    def write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.calls.append(f"write {name}")
        assert all(t.device.type == "cpu" and not t.requires_grad for t in tensors.values())
        self.tensors[name] = {k: t.clone() for k, t in tensors.items()}

    def take_calls(self) -> list[str]:
        calls, self.calls = self.calls, []
        return calls


def manager(names: str = "abcdef", **limits: Any) -> tuple[Manager, Shelf]:
    shelf = Shelf(names)
    return Manager(shelf, torch.device("cpu"), **limits), shelf


def train(m: Manager, name: str, amount: float = 0.5) -> None:
    slot = m.trainees[name]
    slot.kv += amount
    slot.exp_avg += 10 * amount
    slot.exp_avg_sq += 100 * amount
    m.touch(name)


def test_admit_starts_without_moments() -> None:
    m, _ = manager()
    m.rotate("ab", "")
    slot = m.trainees["b"]
    assert slot.kv.tolist() == [1.0] * ELEMENTS
    assert slot.exp_avg.tolist() == slot.exp_avg_sq.tolist() == [0.0] * ELEMENTS
    assert slot.pending is None
    assert m.ledger.used("device") == 2 * SLOT == 2 * 16 * ELEMENTS


def test_without_host_memory_everything_goes_to_the_store() -> None:
    m, shelf = manager(host_bytes=0)
    m.rotate("ab", "")
    train(m, "a")
    m.rotate("cd", "")
    assert shelf.take_calls() == [
        "read a",
        "read b",
        "write a",
        "read c",
        "read d",
    ]  # leavers first, clean ones unwritten
    m.rotate("ab", "")
    slot = m.trainees["a"]
    assert (slot.kv[0], slot.exp_avg[0], slot.exp_avg_sq[0]) == (0.5, 5, 50)
    assert (m.ledger.peak["host"], m.ledger.peak["device"]) == (0, 2 * SLOT)
    assert (m.counters.store_reads, m.counters.store_writes, m.counters.device_loads, m.counters.rotations) == (
        6,
        1,
        6,
        3,
    )


def test_host_memory_spares_reads_and_writes() -> None:
    m, shelf = manager(host_bytes=None)
    m.rotate("ab", "")
    train(m, "a")
    m.rotate("cd", "")
    m.rotate("ab", "")
    m.rotate("cd", "")
    assert shelf.take_calls() == ["read a", "read b", "read c", "read d"]
    assert m.ledger.used("host") == 2 * STATE
    assert m.flush() == ["a"]
    assert shelf.tensors["a"]["exp_avg_sq"].tolist() == [50.0] * ELEMENTS
    assert shelf.take_calls() == ["write a"]
    assert m.flush() == []
    m.rotate("ab", "")
    assert m.trainees["a"].exp_avg[0] == 5
    assert m.flush() == []  # written while in host memory, unchanged since


def test_full_host_memory_spills_the_longest_unused() -> None:
    m, shelf = manager(host_bytes=2 * STATE + 1)
    m.rotate("abc", "")
    for name in "abc":
        train(m, name)
    m.rotate("bc", "")
    m.rotate("c", "")
    assert shelf.take_calls() == ["read a", "read b", "read c"]
    m.rotate("", "")  # c comes, a is the longest unused
    assert shelf.take_calls() == ["write a"]
    assert m.ledger.used("host") == 2 * STATE
    m.rotate("", "b")  # b is used, as a guest
    m.rotate("d", "")
    train(m, "d")
    shelf.take_calls()
    m.rotate("", "")  # d comes, c goes
    assert shelf.take_calls() == ["write c"]
    m.rotate("abcd", "")
    assert shelf.take_calls() == ["read a", "read c"]
    assert [m.trainees[name].exp_avg[0].item() for name in "abcd"] == [5.0] * 4
    assert m.ledger.peak["host"] == 2 * STATE


def test_a_clean_entry_is_spilled_without_a_write() -> None:
    m, shelf = manager(host_bytes=STATE)
    m.rotate("ab", "")
    m.rotate("b", "")
    m.rotate("", "")
    assert shelf.take_calls() == ["read a", "read b"]
    assert m.ledger.names("host") == ["b"]


def test_flush_writes_residents_and_host_once() -> None:
    m, shelf = manager(host_bytes=None)
    m.rotate("abc", "")
    for name in "ab":
        train(m, name)
    m.rotate("bc", "")
    shelf.take_calls()
    seen: list[str] = []
    assert m.flush(before_write=seen.append) == seen == ["b", "a"]
    assert shelf.take_calls() == ["write b", "write a"]
    m.rotate("", "")
    assert m.flush() == []
    assert shelf.tensors["c"].keys() == {"kv"}


def test_pending_gradients_travel() -> None:
    for host_bytes in (0, None):
        m, shelf = manager(host_bytes=host_bytes)
        m.rotate("a", "")
        m.trainees["a"].pending = torch.arange(ELEMENTS, dtype=torch.float32)
        m.touch("a")
        m.rotate("b", "")
        m.rotate("a", "")
        pending = m.trainees["a"].pending
        assert pending is not None and pending.tolist() == list(range(ELEMENTS))
        m.trainees["a"].pending = None
        m.touch("a")
        m.flush()
        assert "pending" not in shelf.tensors["a"]


def test_guests_are_16_bit_copies_of_the_newest_values() -> None:
    m, shelf = manager(host_bytes=None)
    m.rotate("ab", "cd")
    assert m.guests["d"].dtype == torch.bfloat16
    assert m.ledger.used("device") == 2 * SLOT + 2 * 2 * ELEMENTS == 2 * SLOT + 2 * guest_bytes(ELEMENTS)
    train(m, "a")
    m.rotate("bc", "ad")  # a's newest values are in host memory alone
    assert (m.guests["a"][0], m.guests["d"][0], m.trainees["c"].kv[0]) == (0.5, 3, 2)
    assert shelf.take_calls() == [
        "read c",
        "read d",
        "read a",
        "read b",
        "read c",
    ]  # a guest has no state to train on with
    m.guests["a"] += 1
    m.rotate("a", "")
    assert m.trainees["a"].kv[0] == 0.5
    assert m.ledger.names("device") == ["a"]


def test_the_device_never_holds_leavers_and_newcomers() -> None:
    m, _ = manager(device_bytes=2 * SLOT + guest_bytes(ELEMENTS), host_bytes=None)
    m.rotate("ab", "c")
    m.rotate("cd", "a")
    m.rotate("ef", "b")
    assert m.ledger.peak["device"] == m.device_bytes
    with pytest.raises(AssertionError, match="exceed"):
        m.rotate("efa", "b")


def test_who_is_trained_is_no_guest() -> None:
    m, _ = manager()
    with pytest.raises(AssertionError):
        m.rotate("ab", "b")
    with pytest.raises(AssertionError):
        m.touch("a")


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("entries", [0, 1, 2, 4, None])
def test_any_memory_keeps_every_value(entries: int | None, ahead: bool) -> None:
    """Random moves against a plain dictionary of what was trained; of what is read ahead, half is what will enter."""
    names = "abcdefgh"
    m, shelf = manager(names, host_bytes=None if entries is None else entries * STATE, ahead=ahead)
    truth, chance = {name: float(n) for n, name in enumerate(names)}, random.Random(1)
    for _ in range(60):
        chosen = chance.sample(names, 5)
        if ahead:
            some = chance.sample(names, 4)
            m.prefetch(some[:2], some[2:])
        pool, guests = chosen[:3], chosen[3:]
        m.rotate(pool, guests)
        assert set(m.trainees) == set(pool) and set(m.guests) == set(guests)
        for name in chosen:
            values = m.trainees[name].kv if name in pool else m.guests[name].float()
            assert values[0].item() == truth[name]
        for name in chance.sample(pool, 2):
            train(m, name, 1.0)
            truth[name] += 1
        if chance.random() < 0.2:
            m.flush()
    m.flush()
    m.close()
    assert {name: t["kv"][0].item() for name, t in shelf.tensors.items()} == truth
    assert m.ledger.used("device") == 3 * SLOT + 2 * guest_bytes(ELEMENTS)


def test_an_error_beside_the_steps_is_raised_at_the_next_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    m, shelf = manager(ahead=True)
    m.rotate("ab", "")
    train(m, "a")

    def full(name: str, tensors: Mapping[str, Tensor]) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(shelf, "write_tensors", full)
    m.rotate("cd", "")
    with pytest.raises(OSError, match="full"):
        m.rotate("ef", "")
    m.close()


# -- planner ------------------------------------------------------------------------------------------------------------

MIB = 2**20
SIZES = Sizes(
    weights=500 * MIB, element=2, largest=MIB, total=60 * MIB, documents=80, tokens=100_000, kept=1200 * MIB, per_token=MIB,
    seen=0, logit_rows=600, layers=30, hidden=576, intermediate=1536, vocabulary=49_152, query_heads=9, kv_heads=3, head_dim=64,
    longest=110,
)  # fmt: skip


def plan(sizes: Sizes = SIZES, **options: Any) -> Any:
    return make_plan(sizes, **({"pool": None, "guests": 0, "budget": None, "host_budget": 0, "on_cpu": True} | options))


def test_plan_adds_up() -> None:
    p = plan(pool=7, guests=3, host_budget=None)
    assert p.runtime == RUNTIME_BYTES and p.weights == 500 * MIB and p.activations == activation_bytes(SIZES)
    assert p.trainees == 7 * 16 * MIB and p.guest_copies == 3 * 2 * MIB
    assert p.device == p.runtime + p.weights + p.activations + p.trainees + p.guest_copies
    assert (p.host, p.pool, p.guests, p.documents, p.tokens) == (12 * 60 * MIB, 7, 3, 80, 100_000)
    assert 2 * 12 * 60 * MIB <= p.disk <= 2.2 * 12 * 60 * MIB  # measured on the demo: the file grows to 2.06 times
    seeing = plan(replace(SIZES, seen=4), pool=7, guests=3)  # cast, with two columns more a head, and their gradient
    assert seeing.activations - p.activations == seeing.device - p.device == 4 * 2 * (2 * MIB + MIB // 32)
    gpu = plan(pool=7, guests=3, on_cpu=False)
    assert gpu.runtime == 0 and gpu.host == (2 * 12 * 7 + 3 * 4) * MIB  # those on the way
    assert gpu.activations == activation_bytes(SIZES) + 10 * 3 * 2 * MIB
    assert gpu.device == gpu.weights + gpu.activations + gpu.trainees + gpu.guest_copies
    assert plan(host_budget=5).host == 5 and plan(host_budget=0).host == 0


def test_plan_is_told_in_figures() -> None:
    text = "\n".join(plan(replace(SIZES, conversations=5 * MIB), pool=7, guests=3, host_budget=None).lines())
    figures = (
        "80 (100,000 tokens)",
        "4.0 MiB",
        "12.0 MiB",
        "pool of 7 112.0 MiB",
        "3 frozen distractors 6.0 MiB",
        "weights 500.0 MiB",
        "720.0 MiB",
        "up to 5.0 MiB for conversations",
    )
    for figure in figures:
        assert figure in text


def test_without_a_budget_the_paper_s_pool() -> None:
    assert plan().pool == 20
    assert plan(replace(SIZES, documents=5), guests=10).pool == 5
    assert plan(replace(SIZES, documents=5), guests=10).guests == 0
    assert plan(replace(SIZES, documents=24), guests=10).guests == 4
    assert plan(replace(SIZES, documents=5), pool=9).pool == 5


@pytest.mark.parametrize("guests", [0, 10])
def test_the_largest_pool_that_fits(guests: int) -> None:
    for pool in range(1, 21):
        needed = plan(pool=pool, guests=guests).device
        for budget, expected in ((needed, pool), (needed + 16 * MIB - 1, pool), (needed - 1, pool - 1)):
            if expected:
                p = plan(budget=budget, guests=guests)
                assert p.pool == min(20, expected)
                assert p.device <= budget


def test_a_smaller_collection_has_fewer_guests_to_pay_for() -> None:
    few = replace(SIZES, documents=10)
    budget = plan(few, pool=9).device + guest_bytes(MIB)  # nine in the pool leave one guest
    p = plan(few, guests=10, budget=budget)
    assert (p.pool, p.guests, p.device) == (9, 1, budget)


def test_layers_are_computed_twice_where_it_fits_only_so() -> None:
    full, fewer = plan(pool=1), activation_bytes(SIZES) - activation_bytes(SIZES, recompute=True)
    assert fewer > activation_bytes(SIZES) / 2 and not full.recompute
    assert not plan(pool=1, budget=full.device).recompute
    p = plan(pool=1, budget=full.device - 1)
    assert p.recompute and p.device == full.device - fewer and "computed twice" in "\n".join(p.lines())


def test_does_not_fit_has_the_figures() -> None:
    recomputed = activation_bytes(SIZES, recompute=True)
    least = plan(pool=1).device - activation_bytes(SIZES) + recomputed
    with pytest.raises(DoesNotFit) as caught:
        plan(budget=least - 1)
    message = str(caught.value)
    assert isinstance(caught.value, ValueError) and "\n" not in message
    figures = (least - 1, 500 * MIB, RUNTIME_BYTES, recomputed, least)
    for figure in (*map(size, figures), "pool of 1 16.0 MiB", "raise --budget"):
        assert figure in message
    with pytest.raises(DoesNotFit, match=r"pool of 7 112\.0 MiB .*lower --pool"):
        plan(pool=7, budget=least + 6 * 16 * MIB - 1)


def test_what_the_machine_has_free_is_a_limit_but_chooses_no_pool() -> None:
    needed = plan(pool=7).device
    assert plan(pool=7, device_free=needed, host_free=needed) == plan(pool=7)
    assert plan(pool=7, device_free=needed - 1).recompute
    least = plan(pool=7, device_free=needed - 1).device
    for limits in ({"pool": 7}, {"budget": needed}):
        with pytest.raises(DoesNotFit, match=r"this machine has free cannot hold this: .*lower --pool") as caught:
            plan(**{**limits, "device_free": least - 1})
        assert size(least) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(DoesNotFit, match=r"host memory .*lower --host-memory"):
        plan(pool=7, host_budget=None, device_free=needed, host_free=needed + 1)
    with pytest.raises(DoesNotFit, match="host memory"):
        plan(pool=7, on_cpu=False, host_free=RUNTIME_BYTES)


def test_free_memory_is_the_least_of_kernel_and_cgroups(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    assert host_free(tmp_path) is None
    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:  4000 kB\n")
    write("proc/self/status", "VmHWM:\t 900 kB\nVmRSS:\t 100 kB\n")
    assert host_free(tmp_path) == 4100 * 1024
    write("proc/self/cgroup", "0::/user/job\n")
    write("sys/fs/cgroup/user/job/memory.max", "max\n")
    write("sys/fs/cgroup/user/job/memory.current", "1\n")
    write("sys/fs/cgroup/user/job/memory.stat", "inactive_file 0\n")
    assert host_free(tmp_path) == 4100 * 1024
    write("sys/fs/cgroup/user/memory.max", str(3000 * 1024))  # a parent's limit
    write("sys/fs/cgroup/user/memory.current", str(1000 * 1024))
    write("sys/fs/cgroup/user/memory.stat", f"anon 5\ninactive_file {200 * 1024}\n")
    assert host_free(tmp_path) == 2300 * 1024
    write("proc/self/cgroup", "11:cpu,cpuacct:/x\n4:memory:/elsewhere\n")  # version 1, seen from inside a container
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", str(1500 * 1024))
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", str(1400 * 1024))
    write("sys/fs/cgroup/memory/memory.stat", "total_inactive_file 0\n")
    assert host_free(tmp_path) == 200 * 1024


def test_activations_grow_with_the_step() -> None:
    base = activation_bytes(SIZES)
    for larger in ({"kept": 2400 * MIB}, {"logit_rows": 1_200}, {"vocabulary": 100_000}):
        assert activation_bytes(replace(SIZES, **larger)) > base
    assert activation_bytes(replace(SIZES, logit_rows=600, whole_logits=True)) > base
    # Logits and a layer's gradients are not there at the same time.
    assert activation_bytes(replace(SIZES, logit_rows=0)) == activation_bytes(replace(SIZES, logit_rows=1)) < base


def test_decoding_and_matching_grow_with_what_they_hold() -> None:
    decoding = decoding_bytes(SIZES)
    for larger in ({"decoded": 100}, {"decoded_rows": 1}, {"chunks": 1}):
        assert decoding_bytes(replace(SIZES, **larger)) > decoding
    assert matching_bytes(SIZES) == 0 < matching_bytes(replace(SIZES, matched=1))
    one = replace(SIZES, matched=1000, matched_on=8192, scores_at_once=1 << 22)
    for larger in ({"matched": 9000}, {"matched_on": 9000}, {"scores_at_once": 1 << 23}):
        assert matching_bytes(replace(one, **larger)) > matching_bytes(one)
    assert plan(replace(SIZES, decoded=1 << 20)).activations == decoding_bytes(replace(SIZES, decoded=1 << 20))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3.4 * 2**30, "3.4 GiB"),
        (5 * 2**40, "5.0 TiB"),
        (-2048, "-2.0 KiB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert size(count) == text
