"""Write docs/results.md from the recorded runs of the claims: ``python docs/make_results.py``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from cas.evaluation.recording import read_run
from experiments.claims.lab import NAMES, load, report

PAGE = Path(__file__).with_name("results.md")
RUNS = Path(__file__).parents[1] / "experiments" / "results" / "claims"


def recorded(name: str) -> Path | None:
    """The newest recorded run of a claim."""
    return max((RUNS / name).glob("*/results.json"), default=None)


def text() -> str:
    """The page."""
    parts = [
        """# The claims of the papers, run again

Made by `python docs/make_results.py`. Each claim has the paper's figure, ours, and a verdict on the whole 95 % interval (documents
resampled, with all their questions and seeds): *confirmed* if it is on the right side of the limit, *contradicted* if on the
wrong side, else *undecided*. Figures are percent of test questions that are answered exactly, unless said otherwise. Fictional worlds, the
embedded reader, a CPU: the papers' models are a thousand times larger, so what is compared are effects, not heights. `make claims` runs
all, in hours; each command runs one, in minutes; both go on where they were stopped.
"""
    ]
    for name in NAMES:
        claim, file = load(name), recorded(name)
        if file is None:
            reason = claim.not_run or "no run is recorded yet"
            parts.append(f"## {NAMES.index(name) + 1}. {claim.title}\n\n*Paper:* {claim.paper}\n\nNot run: {reason}.\n")
            continue
        run, _ = read_run(file.parent)
        link = Path("..") / file.relative_to(RUNS.parents[2])
        parts.append(
            report(claim, run)
            + f"\n[Recorded run]({link.as_posix()}): `{run['command']}`, {run['date'][:10]}, {run['hardware']['cpu']}, seeds "
            f"{', '.join(map(str, run['seeds']))}.\n"
        )
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(text(), encoding="utf-8")
