"""Time everything against what it could cost, side by side in one run, and record the ratios.

python -m experiments.benchmarks --output DIR
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cas import console
from cas.errors import ConfigError
from cas.options import parse

if TYPE_CHECKING:
    from cas.evaluation.recording import Prediction

MODELS = ("reader", "smollm2", "qwen3-8b")


@dataclass(frozen=True)
class Config:
    """Run the benchmarks."""

    output: str = "runs/benchmarks"
    """Folder of the results."""
    models: tuple[str, ...] = MODELS[:2]
    """Models to time: reader, smollm2, qwen3-8b (its shape, random weights; for a GPU)."""
    only: tuple[str, ...] = ()
    """Names of single benchmarks (default: all)."""
    tokens: int = 256
    """Positions of a cartridge in the benchmarks of a training step."""
    repeats: int = 8
    """How often each ratio is measured."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit status."""
    return console.run(lambda: run(parse(Config, "python -m experiments.benchmarks", arguments)))


def run(config: Config) -> int:
    """Every benchmark for every model; writes the results, prints the table."""
    from cas.evaluation.recording import flags, table, write_run
    from experiments.benchmarks import serving, training
    from experiments.benchmarks.training import Sample
    from experiments.benchmarks.work import Work

    n = config.repeats
    benchmarks: dict[str, Callable[[Work], Iterator[Sample]]] = {
        "steps": lambda work: training.steps(work, n),
        "rotation": lambda work: training.rotation(work, n),
        "residents": lambda work: training.residents(work, n),
        "largest_pool": training.largest_pool,
        "store": lambda work: serving.store_speed(work, 1000, n),
        "first_token": lambda work: serving.first_token(work, n),
        "decode_many": lambda work: serving.decode_many(work, n),
        "synthesis": lambda work: serving.synthesis(work, n),
        "documents": lambda work: training.documents(work, n),
    }
    if unknown := [*set(config.only) - set(benchmarks), *set(config.models) - set(MODELS)]:
        raise ConfigError(f"unknown {unknown[0]!r}; benchmarks: {', '.join(benchmarks)}; models: {', '.join(MODELS)}")
    predictions: list[Prediction] = []
    figures: dict[str, list[float]] = {}
    for name in config.models:
        work = Work.load(name, config.tokens)
        for benchmark in config.only or benchmarks:
            if (benchmark, name) in TOO_LONG and not (config.only or work.on_gpu):
                continue
            print(f"{name}: {benchmark}", file=sys.stderr, flush=True)
            for metric, what, value in benchmarks[benchmark](work):
                arm = f"{metric}_{name}"
                if what != "ratio":
                    figures.setdefault(f"{arm}.{what}", []).append(value)
                    continue
                number = f"{sum(p['arm'] == arm for p in predictions):04d}"
                predictions.append(
                    {
                        "arm": arm,
                        "seed": 0,
                        "question_id": number,
                        "document_id": number,
                        "scores": {"ratio": value},
                    }
                )
    found = write_run(
        Path(config.output),
        name="benchmarks",
        command="python -m experiments.benchmarks " + flags(config),
        seeds=[0],
        model=list(config.models),
        collection={"name": "random tokens", "sha256": hashlib.sha256(b"random tokens").hexdigest()},
        settings={k: v for k, v in asdict(config).items() if k != "output"},
        predictions=predictions,
        metric_names=["ratio"],
        compare=[],
        extra_metrics={
            key: {"mean": sum(some) / len(some), "low": min(some), "high": max(some), "n": len(some)}
            for key, some in figures.items()
        },
        keep_answers=False,
    )
    print(table(found, list(dict.fromkeys(p["arm"] for p in predictions)), ["ratio"]))
    return 0


# A 135M model on a CPU would be timed for hours here, and what is measured does not depend on its size.
TOO_LONG = {("documents", "smollm2"), ("store", "smollm2"), ("residents", "smollm2")}


if __name__ == "__main__":
    sys.exit(main())
