"""What the approximate index finds of what the exact one finds: recall beyond ``EXACT_ROWS`` rows, and time.

python -m experiments.benchmarks.index_recall --output DIR

Made-up unit vectors of MiniLM's dimensions, no text: ``near`` ones lie about random centers, with noise as strong as the
centers, as vectors of texts have neighbors; ``noise`` has no neighbors at all, the worst there is. Questions are drawn alike.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cas import console
from cas.options import parse

if TYPE_CHECKING:
    from cas.evaluation.recording import Prediction

DIMENSION = 384
TOPS = (1, 10, 64)


@dataclass(frozen=True)
class Config:
    """Measure the recall of the approximate index."""

    rows: int = 110_000
    """Vectors of the index."""
    centers: int = 2_000
    """Random centers of the near vectors."""
    questions: int = 500
    """Questions asked."""
    output: str = "runs/index_recall"
    """Folder of the results."""


def unit_vectors(kind: str, count: int, centers: int, seed: int) -> np.ndarray:
    """float32 [count, DIMENSION]."""
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, DIMENSION), np.float32)
    if kind == "near":
        middle = np.random.default_rng(centers).standard_normal((centers, DIMENSION), np.float32)
        vectors += middle[random.integers(0, centers, count)]
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def measured(config: Config, kind: str) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Of both indexes: name, number of the question, recall of the best rows and milliseconds."""
    import retrieval.index
    from retrieval import ChunkIndex, HashEmbedder
    from retrieval.index import Entry

    vectors = unit_vectors(kind, config.rows, config.centers, 0)
    queries = unit_vectors(kind, config.questions, config.centers, 1)
    exact = np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, : max(TOPS)]
    limit = retrieval.index.EXACT_ROWS
    for name, rows in (("exact", config.rows), ("approximate", 0)):
        retrieval.index.EXACT_ROWS = rows
        try:
            index = ChunkIndex([], HashEmbedder(DIMENSION))
            index._set({"all": Entry("", ((0, 1),) * config.rows)}, vectors)
        finally:
            retrieval.index.EXACT_ROWS = limit
        for number in range(config.questions):
            started = time.process_time()
            _, found = index.nearest(queries[number : number + 1], max(TOPS))
            scores = {"milliseconds": 1000 * (time.process_time() - started)}
            for top in TOPS:
                shared = len({*found[0, :top].tolist()} & {*exact[number, :top].tolist()})
                scores[f"recall_{top}"] = shared / top
            yield name, number, scores


def run(config: Config) -> int:
    """Measure both kinds of vectors, write the run's two files and print the table."""
    from cas.evaluation.recording import flags, table, write_run

    predictions: list[Prediction] = []
    for kind in ("near", "noise"):
        print(f"{kind}: building and asking", file=sys.stderr, flush=True)
        for name, number, scores in measured(config, kind):
            place = f"{number:04d}"
            predictions.append(
                {"arm": f"{name}_{kind}", "seed": 0, "question_id": place, "document_id": place, "scores": scores}
            )
    metrics = [*(f"recall_{top}" for top in TOPS), "milliseconds"]
    results = write_run(
        Path(config.output),
        name="index_recall",
        command="python -m experiments.benchmarks.index_recall " + flags(config),
        seeds=[0],
        model="none",
        collection={"name": "made-up vectors", "sha256": sha256(b"made-up vectors").hexdigest()},
        settings={k: v for k, v in asdict(config).items() if k != "output"},
        predictions=predictions,
        compare=[],
        metric_names=metrics,
        keep_answers=False,
    )
    print(table(results, list(dict.fromkeys(p["arm"] for p in predictions)), metrics))
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure. Returns the exit status."""
    return console.run(lambda: run(parse(Config, "python -m experiments.benchmarks.index_recall", arguments)))


if __name__ == "__main__":
    sys.exit(main())
