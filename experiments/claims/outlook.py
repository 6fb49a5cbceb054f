"""How long the claims take: what is still to run, with minutes where they were measured in this folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def outlook(output: str, names: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """Lines that say what is to run: of every claim its seeds that are done, and rough minutes for the others.

    A seed that is to run is taken to need as long as the same claim's seeds before it on the same machine; where no seed
    of a claim is done, as long as the mean seed of the other claims. Trainings that claims share count for the first.
    """
    measured = {name: _seconds(Path(output) / name, seeds) for name in names}
    every = [s for seconds in measured.values() for s in seconds.values() if s is not None]
    lines, total, unknown = list[str](), 0.0, False
    for name, seconds in measured.items():
        left = [seed for seed in seeds if seed not in seconds]
        known = [s for s in seconds.values() if s is not None] or every
        line = f"{name:20s} {len(seeds) - len(left)} of {len(seeds)} seeds done"
        if left and known:
            minutes = len(left) * sum(known) / len(known) / 60
            line, total = f"{line}, about {minutes:.0f} min to go", total + minutes
        unknown |= bool(left and not known)
        lines.append(line)
    lines.append(
        "no seed is timed in this folder yet: a claim makes several trainings a seed, minutes to hours each"
        if unknown
        else f"about {total:.0f} min to go in all, on this machine as busy as it was"
    )
    return lines


def _seconds(folder: Path, seeds: Sequence[int]) -> dict[int, float | None]:
    """Of every seed that is done, the seconds it took; None if it was not timed."""
    files = {seed: folder / f"seed-{seed}.json" for seed in seeds}
    return {seed: json.loads(file.read_text()).get("seconds") for seed, file in files.items() if file.exists()}
