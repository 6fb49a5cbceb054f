"""The loss guard: a step with a non-finite loss or gradient, or with a loss above 2 log V, is skipped.

A skipped step changes no cartridge and is counted; its conversations are not drawn again in this pass. A cartridge that
causes several skipped steps in a row is restored, with its Adam moments, from the last checkpoint. A training whose
steps are all skipped ends with one line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from cas.errors import RunError

RESTORE_AFTER = 3  # skipped steps in a row because of one cartridge
END_AFTER = 12  # skipped steps in a row


@dataclass
class LossGuard:
    """What was skipped so far; part of a checkpoint, which fixes the names of the fields.

    Attributes:
        skipped: steps, in all; in_a_row: up to now.
        back: cartridges that were restored, in all.
        spoilt: skipped steps in a row, by the cartridge that caused them.
    """

    skipped: int = 0
    in_a_row: int = 0
    back: int = 0
    spoilt: dict[str, int] = field(default_factory=dict)

    def causes(self, loss: float, gradients: Mapping[str, Tensor], vocabulary: int) -> list[str]:
        """The cartridges because of which a step must be skipped; none if it may be taken.

        All of them where the loss (nats per token) is not finite or above 2 log V, twice the loss of a uniform guess;
        else those with a non-finite gradient.
        """
        if not loss <= 2 * math.log(vocabulary):
            return sorted(gradients)
        # The sum is enough: it is not finite if any number is not.
        return sorted(name for name, g in gradients.items() if not math.isfinite(float(g.sum())))

    def count_skipped(self, step: int, loss: float, causes: Iterable[str]) -> list[str]:
        """Count a skipped step. Returns: the cartridges to restore. Raises: RunError after END_AFTER in a row."""
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row >= END_AFTER:
            raise RunError(
                f"at step {step} the loss is {loss:.3g} or its gradient is not finite, "
                f"for the {END_AFTER}th time in a row; give a new --store and a lower --lr"
            )
        restore = []
        for name in causes:
            self.spoilt[name] = self.spoilt.get(name, 0) + 1
            if self.spoilt[name] >= RESTORE_AFTER:
                restore.append(name)
                del self.spoilt[name]
        self.back += len(restore)
        return restore

    def count_taken(self, names: Iterable[str]) -> None:
        """Count a step that was taken with these cartridges."""
        self.in_a_row = 0
        for name in names:
            self.spoilt.pop(name, None)
