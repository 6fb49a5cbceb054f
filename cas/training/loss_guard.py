"""Steps that would spoil cartridges are not taken: their loss is no number, or beyond any that guessing could have.

Such a step moves nothing and is counted; its conversations are not drawn again in this pass. A cartridge that spoils several in a row
goes back to its last checkpoint, moments and all. A training that takes no step any more ends with one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cas.errors import RunError

BACK_AFTER = 3  # spoilt steps in a row of one cartridge
END_AFTER = 12  # spoilt steps in a row of all


@dataclass
class LossGuard:
    """What has gone wrong so far; part of a checkpoint. ``skipped`` steps in all, ``in_a_row`` up to now, ``spoilt`` in a row by
    cartridge; ``back``: cartridges that went back, in all."""

    skipped: int = 0
    in_a_row: int = 0
    back: int = 0
    spoilt: dict[str, int] = field(default_factory=dict)

    def spoils(self, loss: float, gradients: Mapping[str, Tensor], vocabulary: int) -> list[str]:
        """The cartridges because of which a step must not be taken: all of them where the loss (nats a token) is no number or more
        than twice a blind guess's, else those whose gradient is no number."""
        if not loss <= 2 * math.log(vocabulary):
            return sorted(gradients)
        # One pass: nothing that is no number adds up to one.
        return sorted(name for name, g in gradients.items() if not math.isfinite(float(g.sum())))

    def count(self, step: int, loss: float, spoilers: Iterable[str]) -> list[str]:
        """Count a skipped step. Returns: the cartridges that are to go back. Raises: RunError when nothing helps."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= END_AFTER:
            raise RunError(
                f"at step {step} the loss is {loss:.3g} or its gradient no number, for the {END_AFTER}th time in a row; give a new "
                "--store and a lower --lr"
            )
        back = []
        for name in spoilers:
            self.spoilt[name] = self.spoilt.get(name, 0) + 1
            if self.spoilt[name] >= BACK_AFTER:
                back.append(name)
                del self.spoilt[name]
        self.back += len(back)
        return back

    def taken(self, names: Iterable[str]) -> None:
        """A step was taken with these."""
        self.in_a_row = 0
        for name in names:
            self.spoilt.pop(name, None)
