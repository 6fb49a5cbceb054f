"""The benchmarks run, and their rivals do the work that they are said to do."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cas.model.attention import Batch
from cas.model.attention_gpu import GpuAttention
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout
from cas.training.schedule import Step
from cas.training.trainer import StepResult
from experiments.benchmarks import serving, training
from experiments.benchmarks.work import Alone, Work, frozen, timed_steps


@pytest.fixture(scope="module")
def work() -> Work:
    return Work.load("reader", 16)


@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_the_frozen_rival_is_the_model_itself(tiny: Callable[..., FrozenModel]) -> None:
    """Packed, grouped and without a prefix, every conversation has the logits of Hugging Face's own forward."""
    for kind in ("llama", "qwen3"):
        model = tiny(kind)
        batch = Batch((9, 4, 31, 1, 17), ((),) * 5)
        ids = torch.randint(3, 384, (1, sum(batch.lengths)), generator=torch.Generator().manual_seed(0))
        positions = torch.cat([torch.arange(n) for n in batch.lengths])[None]
        empty = model.header_kv[:, :, :, :0]
        for rival in (
            Alone(batch),
            GpuAttention(batch, empty, {}, Layout("offset", 0, 0), model.dtype),
        ):  # on a CPU, on a GPU
            with torch.no_grad():
                logits = model.forward(ids, positions, rival)[0]
            for start, n in zip(batch.starts(), batch.lengths, strict=True):
                with torch.no_grad():
                    own = model.hf(ids[:, start : start + n]).logits[0]
                torch.testing.assert_close(logits[start : start + n], own, atol=1e-4, rtol=1e-4)


def test_rivals_see_the_conversations_of_their_step(work: Work) -> None:
    seen: list[int] = []
    frozen_pass = frozen(work.model)

    def rival(examples: object) -> None:
        seen.append(sum(len(c.tokens(work.model)) for c in examples))  # type: ignore[attr-defined]
        frozen_pass(examples)  # type: ignore[arg-type]

    with work.store(4) as store:
        timed = timed_steps(work, store, 4, 2, {"frozen": rival}, targets=2, per_target=3)
    assert len(timed) == 2 and [one.tokens for one in timed] == seen[1:]
    assert all(one.step > 0 and one.rivals["frozen"] > 0 for one in timed)


def test_products_are_those_that_a_step_multiplies(work: Work) -> None:
    """Counted by hand from shapes, against what is really multiplied (padding included)."""

    class Counter(TorchDispatchMode):
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.mm.out):
                self.total += 2 * args[0].numel() * args[1].shape[-1]
            return func(*args, **(kwargs or {}))

    with work.store(4) as store:
        trainer = work.trainer(store, 8, 1, isolation=1.0, pool=4)
        train_step, found = trainer.train_step, []

        def counted(step: int, planned: Step) -> StepResult:
            examples = [trainer.conversations.by_document[e.document][e.index] for e in planned.examples]
            with Counter() as counter:
                result = train_step(step, planned)
            found.append(counter.total / work.products(examples))
            return result

        trainer.train_step = counted  # type: ignore[assignment, method-assign]
        trainer.run()
    assert found == [pytest.approx(1, abs=0.1)]


def test_the_plot_and_its_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "docs"))
    page = importlib.import_module("make_performance")
    page.plot(tmp_path / "plot.svg")
    assert "<svg" in (tmp_path / "plot.svg").read_text()
    for value, target, good in (
        (1.1, "<= 1.10", True),
        (1.11, "<= 1.10", False),
        (0.7, ">= 0.70", True),
        (9, "", True),
    ):
        assert page.met(value, target) == good


@pytest.mark.parametrize(
    ("expected", "measure"),
    [
        ({"residents3_vs_2"}, lambda work: training.residents(work, 1, (2, 3))),
        pytest.param({"rotation_overhead"}, lambda work: training.rotation(work, 1, every=2), marks=pytest.mark.slow),
        pytest.param({"documents6_vs_3"}, lambda work: training.documents(work, 1, (3, 6)), marks=pytest.mark.slow),
        ({"store_write_vs_copy", "store_read_vs_copy"}, lambda work: serving.store_speed(work, 3, 1)),
        ({"decode_many"}, lambda work: serving.decode_many(work, 1, tokens=2)),
        (
            {f"first_token_vs_{a}_{b}" for a in ("full", "rag") for b in ("cold", "warm")},
            lambda work: serving.first_token(work, 1),
        ),
    ],
)
def test_every_benchmark_yields_its_ratios(
    work: Work, expected: set[str], measure: Callable[[Work], list[tuple[str, str, float]]]
) -> None:
    found = list(measure(work))
    assert {metric for metric, what, _ in found if what == "ratio"} == expected
    assert all(value > 0 for _, what, value in found if what == "ratio")
