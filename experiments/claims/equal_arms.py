"""An exact zero is an alarm: two arms with the same answers from the same cartridges were most likely never different.

A difference of 0.00 [0.00, 0.00] says nothing about the paper if both arms are one and the same by construction, as when
an option changes nothing under a claim's other settings. Arms whose cartridges differ may well answer alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from cas.evaluation.recording import Prediction
from cas.store.records import checksum
from cas.store.store import Store

EQUAL = "arms are equal by construction?"

Checksums = dict[str, dict[str, int]]
"""Of every arm: what it loads, by cartridge id."""


def checksums(cartridges: Store | Mapping[str, Tensor]) -> dict[str, int]:
    """Checksums of a store's cartridges as of its last checkpoint, or of given ones."""
    if isinstance(cartridges, Store):
        return {i: row.kv_hash for i, row in cartridges.rows().items() if row.kv_hash is not None}
    return {i: checksum(kv.detach().float().cpu().contiguous().numpy().tobytes()) for i, kv in cartridges.items()}


def equal_arms(
    predictions: Sequence[Prediction], loaded: Sequence[Checksums], compare: Sequence[tuple[str, str]]
) -> list[tuple[str, str]]:
    """The compared pairs of arms with the same answer and scores for every question, and no cartridge that differs.

    Args: loaded: for every seed, of every arm, as far as known; cartridges that one arm alone has are not compared.
    """
    outcomes: dict[str, dict[str, tuple[object, ...]]] = {}
    for p in predictions:
        outcomes.setdefault(p["arm"], {})[p["question_id"]] = (p.get("answer"), *sorted(p["scores"].items()))
    return [
        (a, b)
        for a, b in compare
        if outcomes[a] == outcomes[b] and not any(_differ(arms.get(a, {}), arms.get(b, {})) for arms in loaded)
    ]


def _differ(a: Mapping[str, int], b: Mapping[str, int]) -> bool:
    return any(a[i] != b[i] for i in a.keys() & b.keys())
