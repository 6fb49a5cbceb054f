"""The estimate of time: from speeds that a probe measures, and amounts that self-study plans."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from helpers_commands import TRAIN
from test_pipeline import Recorder

from cas.data.collection import Collection
from cas.model.frozen import FrozenModel
from cas.options import TrainConfig, parse
from cas.training import cost, pipeline
from cas.training.cost import Cost, Speed, estimate, measure

NONE = Speed(read=0, decoded=0, trained=0, step=0)


@pytest.fixture
def estimated(manuals: FrozenModel, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Cost]:
    """``estimated(speed, **options)`` of the folder ``manuals`` with the speeds of a machine that we make up."""
    documents = Collection.load("manuals")

    def of(speed: Speed, **options: Any) -> Cost:
        monkeypatch.setattr(cost, "measure", lambda *arguments: speed)
        options = {"reconstruction": "off", "question_tokens": 20, "answer_tokens": 40, "chunk_tokens": 60, **options}
        config = TrainConfig(collection="manuals", **options)
        result = estimate(config, manuals, documents, 16, None)
        assert result is not None
        return result

    return of


def test_the_estimate_is_amounts_times_speeds(estimated: Callable[..., Cost], manuals: FrozenModel) -> None:
    """100 conversations are 200 questions of 7 tokens and answers of 14, and with 3 epochs 300 shorter ones of a training."""
    decoding = estimated(replace(NONE, decoded=0.5), conversations=100)
    assert decoding.self_study == 200 * (7 + 14) * 0.5 and decoding.training == 0 and decoding.share == 0.5
    template = len(manuals.template.footer_ids) + len(manuals.template.suffix_ids)
    training = estimated(replace(NONE, trained=0.25), conversations=100, epochs=3.0)
    assert training.self_study == 0 and training.training == 300 * (template + 12) * 0.25
    assert (
        estimated(replace(NONE, trained=0.25), steps=5, targets=1, per_target=2).training == 10 * (template + 12) * 0.25
    )
    reading = [estimated(replace(NONE, read=1.0), conversations=n).self_study for n in (320, 640)]
    assert reading[1] == pytest.approx(2 * reading[0])
    # On a GPU a step takes its time whatever its rows: 200 questions are 200/32 calls, 20 steps each, and 40 for each two.
    assert estimated(replace(NONE, step=1.0), conversations=100).self_study == pytest.approx(200 / 32 * (20 + 40 / 2))


def test_reconstruction_reads_the_text_and_decodes_nothing(estimated: Callable[..., Cost]) -> None:
    alone = {"writer": "none", "reconstruction": "on"}
    assert estimated(replace(NONE, decoded=1.0, step=1.0), **alone) == Cost(0, 0, None)
    assert estimated(replace(NONE, read=1.0), **alone).self_study > 0
    once, twice = (estimated(replace(NONE, trained=1.0), epochs=n, **alone).training for n in (1.0, 2.0))
    assert twice == 2 * once > 0


@pytest.mark.parametrize(
    ("times", "line"),
    [
        (Cost(3600, 60, 0.5), "42 minutes to 1.5 hours of self-study if half of the questions are kept and 42 seconds to 2 minutes"),
        (Cost(0, 6000, None), "70 minutes to 2.5 hours of initialization and training on this machine"),
        (Cost(10, 10, None), "7 to 15 seconds of self-study and 7 to 15 seconds of initialization and training"),
    ],
)  # fmt: skip
def test_the_line_is_a_range_in_words(times: Cost, line: str) -> None:
    assert times.line().startswith("time        ") and line in times.line() and "\n" not in times.line()


def test_the_probe_measures_real_work_in_a_few_seconds(tiny: Callable[..., FrozenModel]) -> None:
    for kind in ("llama", "gemma3"):
        started = time.monotonic()
        speed = measure(tiny(kind), 8, 4)
        assert time.monotonic() - started < 30
        assert min(speed.read, speed.decoded, speed.trained) > 0 == speed.step


def test_a_slow_machine_is_not_probed_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, asked = [0.0], list[int]()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: clock[0])

    def work(n: int) -> None:
        asked.append(n)
        clock[0] += n * 0.02

    each, n = cost._timed(work, 32, 512)
    assert each == pytest.approx(0.02) and n == asked[-1] < 512 and clock[0] < 2 * cost.PROBE_SECONDS
    asked.clear()
    monkeypatch.setattr(cost, "PROBE_SECONDS", 0.5)
    cost._timed(work, 32, 512)
    assert asked == [32]


def test_a_plan_says_the_time_and_a_training_that_has_begun_does_not(manuals: FrozenModel) -> None:
    def lines(*words: str) -> list[str]:
        view = Recorder()
        pipeline.run(parse(TrainConfig, "train", [*TRAIN, *words]), view)
        return [line for line in view.lines if "probe" in line]

    assert "self-study" in lines("--dry-run")[0] and len(lines()) == 1
    assert lines("--dry-run") == lines() == []
