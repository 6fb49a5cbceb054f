"""How many bytes of what are on which tier (device, host). Plain Python, no tensors."""

from __future__ import annotations

from collections import OrderedDict


class Ledger:
    """Bytes by tier and name, in order of last use, against a limit per tier.

    A tier without a limit is unbounded. The caller must make room before it adds something; exceeding a limit is an
    assertion error.
    """

    def __init__(self, limits: dict[str, int | None]) -> None:
        self.limits = dict(limits)
        self.peak = dict.fromkeys(limits, 0)
        self._sizes: dict[str, OrderedDict[str, int]] = {tier: OrderedDict() for tier in limits}
        self._used = dict.fromkeys(limits, 0)

    def used(self, tier: str) -> int:
        """Bytes on a tier now."""
        return self._used[tier]

    def fits(self, tier: str, size: int) -> bool:
        """Whether ``size`` more bytes stay within the tier's limit."""
        limit = self.limits[tier]
        return limit is None or self._used[tier] + size <= limit

    def put(self, tier: str, name: str, size: int) -> None:
        """Add ``size`` bytes of ``name``, which must not be on the tier yet and must fit."""
        assert name not in self._sizes[tier], f"{name} is on {tier} already"
        assert self.fits(tier, size), f"{tier}: {self._used[tier]} + {size} bytes exceed {self.limits[tier]}"
        self._sizes[tier][name] = size
        self._used[tier] += size
        self.peak[tier] = max(self.peak[tier], self._used[tier])

    def use(self, tier: str, name: str) -> None:
        """Mark ``name`` as the most recently used."""
        self._sizes[tier].move_to_end(name)

    def take(self, tier: str, name: str) -> int:
        """Remove ``name``. Returns: its bytes."""
        size = self._sizes[tier].pop(name)
        self._used[tier] -= size
        return size

    def names(self, tier: str) -> list[str]:
        """Everything on a tier, the least recently used first."""
        return list(self._sizes[tier])
