"""The books: how many bytes of what are on which tier. Plain Python, no tensors."""

from __future__ import annotations

from collections import OrderedDict


class Ledger:
    """Bytes by tier and name, in order of last use, against a limit per tier.

    A tier without a limit is unbounded. Going over a limit is a bug of the caller (it must make room first), so it
    asserts: the budget the user gave is never exceeded.
    """

    def __init__(self, limits: dict[str, int | None]) -> None:
        self.limits = dict(limits)
        self.peak = dict.fromkeys(limits, 0)
        self._books: dict[str, OrderedDict[str, int]] = {tier: OrderedDict() for tier in limits}
        self._used = dict.fromkeys(limits, 0)

    def used(self, tier: str) -> int:
        """Bytes on a tier now."""
        return self._used[tier]

    def fits(self, tier: str, size: int) -> bool:
        """Whether ``size`` more bytes stay within the tier's limit."""
        limit = self.limits[tier]
        return limit is None or self._used[tier] + size <= limit

    def put(self, tier: str, name: str, size: int) -> None:
        """Enter ``size`` bytes of ``name``; it must not be there yet, and must fit."""
        assert name not in self._books[tier], f"{name} is on {tier} already"
        assert self.fits(tier, size), f"{tier}: {self._used[tier]} + {size} bytes exceed {self.limits[tier]}"
        self._books[tier][name] = size
        self._used[tier] += size
        self.peak[tier] = max(self.peak[tier], self._used[tier])

    def use(self, tier: str, name: str) -> None:
        """Make ``name`` the last used."""
        self._books[tier].move_to_end(name)

    def take(self, tier: str, name: str) -> int:
        """Strike ``name`` out; returns its bytes."""
        size = self._books[tier].pop(name)
        self._used[tier] -= size
        return size

    def names(self, tier: str) -> list[str]:
        """Everything on a tier, the longest unused first."""
        return list(self._books[tier])
