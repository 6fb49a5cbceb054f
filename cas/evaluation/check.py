"""Recompute every published metric from its predictions: ``python -m cas.evaluation.check [RUN ...]``.

RUN is a folder with ``predictions.jsonl`` and ``results.json``; without one, all of ``experiments/results/*/*``.
Exit status: 0 when all agree to 1e-6; 1 when one differs or a file is missing or broken; 2 for a wrong command line.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cas.errors import CasError, RunError
from cas.evaluation.recording import INTERVAL, PREDICTIONS_FILE, RESULTS_FILE, is_estimate, read_run, recompute

RESULTS = Path(__file__).parents[2] / "experiments" / "results"  # of a checkout
TOLERANCE = 1e-6


def check_run(folder: Path) -> list[tuple[str, str]]:
    """(metric, complaint) for every metric of a run, "" when it agrees; raises CasError when the run is broken."""
    results, predictions = read_run(folder)
    if results["interval"] != INTERVAL:
        raise RunError(f"{RESULTS_FILE}: interval must be {INTERVAL}, not {results['interval']}")
    recorded = results["metrics"]
    expected = recompute(predictions, results["metric_names"], results["compare"], results["seeds"])
    report = [(key, _complaint(recorded.get(key), figure)) for key, figure in expected.items()]
    return report + [(key, f"does not follow from {PREDICTIONS_FILE}") for key in recorded if key not in expected]


def _complaint(stated: Any, expected: dict[str, float]) -> str:
    if not is_estimate(stated):
        return f"{RESULTS_FILE} has {stated!r} in place of {{mean, low, high, n}}"
    differences = {part: value for part, value in expected.items() if abs(stated[part] - value) > TOLERANCE}
    return ", ".join(f"{part} is {stated[part]}, recomputed {value}" for part, value in differences.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the runs named, or all; print a line per metric; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cas.evaluation.check", description="Recompute every published metric from its predictions."
    )
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="folder of a run (default: all published)")
    # A folder with only one of the two files is a broken run and must not be skipped.
    recorded = {path.parent for name in (RESULTS_FILE, PREDICTIONS_FILE) for path in RESULTS.glob(f"*/*/{name}")}
    folders = parser.parse_args(arguments).runs or sorted(recorded)
    if not folders:
        print(f"nothing to check in {RESULTS}")
    status = 0
    for folder in folders:
        try:
            report = check_run(folder)
        except CasError as error:
            print(f"{folder}: {error}", file=sys.stderr)
            status = 1
            continue
        print(folder)
        width = max(len(key) for key, _ in report)
        for key, complaint in report:
            print(f"  {key.ljust(width)}  " + (f"DIFFERS  {complaint}" if complaint else "ok"))
            status |= bool(complaint)
    return status


if __name__ == "__main__":
    sys.exit(main())
