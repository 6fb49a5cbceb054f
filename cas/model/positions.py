"""Sizes and positions of cartridges: how many positions one has, where its keys and the tokens behind it stand.

A cartridge is one tensor ``kv`` of shape [L, 2, H, P, D] (layers; key, value; key/value heads; positions; head
dimension). Keys are stored after RoPE, at the positions that their initialization gave them: directly behind the header,
or (``matched``) as far from the question as in the document.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cas.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Positions = Literal["fixed", "offset", "sequential"]

MULTIPLE = 4  # sizes are multiples of this: rows of keys and values stay aligned in memory


@dataclass(frozen=True)
class Layout:
    """Positions of keys and tokens. ``header``: size of the shared header; ``span``: size of the largest cartridge.

    ``fixed``: every cartridge starts at the header's end, tokens at header + span, whatever is loaded.
    ``offset``: the same keys, tokens start behind the total of the visible cartridges (2606.04557).
    ``sequential``: keys are shifted to consecutive positions, tokens start behind them.
    Where nothing is loaded, tokens stand directly behind the header, as in any ordinary prompt.
    """

    policy: Positions
    header: int
    span: int

    def shifts(self, sizes: Sequence[int]) -> list[int]:
        """By how many positions each loaded cartridge's keys are shifted from where they are stored."""
        if self.policy != "sequential":
            return [0] * len(sizes)
        return [sum(sizes[:i]) for i in range(len(sizes))]

    def token_start(self, sizes: Sequence[int]) -> int:
        """Position of the first token behind the loaded cartridges."""
        return self.header + (self.span if self.policy == "fixed" and sizes else sum(sizes))


def unseen_layers(layout: Layout, sizes: Sequence[int], windows: Sequence[int | None]) -> str | None:
    """One line about layers whose sliding window never reaches some cartridges, loaded alone; None where all do.

    Args: sizes: positions of each cartridge; windows: of each layer, in positions.
    """
    # A token sees the window's last positions, its own included; the first token behind a cartridge sees most of it.
    distance = {p: layout.token_start([p]) - layout.header - p + 1 for p in sizes}
    blind = {i: window for i, window in enumerate(windows) if window is not None and window <= max(distance.values())}
    if not sizes or not blind:
        return None
    narrowest = min(blind.values())
    count = sum(distance[p] >= narrowest for p in sizes)
    names = ", ".join(map(str, blind)) if len(blind) < 9 else f"{len(blind)} of {len(windows)}"
    return (
        f"{count} of {len(sizes)} cartridges are out of sight of layers {names}, whose sliding windows have "
        f"{narrowest} positions: with --positions {layout.policy} the question starts {layout.span} positions behind "
        f"the header, and these cartridges end before the window; give a --span below {narrowest}, or --positions offset"
    )


@dataclass(frozen=True)
class Rope:
    """Rotary frequencies: ``frequencies[layer]`` float32 [R/2], R <= D rotated dimensions in half-split pairs."""

    frequencies: tuple[Tensor, ...]

    def shift(self, keys: Tensor, by: Tensor, layer: int) -> Tensor:
        """Move keys that are already rotated by ``by`` further positions (RoPE angles add).

        Args:
            keys: [..., S, D]; by: integer [..., S], broadcast against keys. Computed in float32.
        Returns: keys' shape and dtype.
        """
        import torch  # here: a store's cartridges are listed without it

        frequency = self.frequencies[layer].to(keys.device)
        half = frequency.shape[0]
        angle = by.to(keys.device, torch.float32)[..., None] * frequency
        cos, sin = angle.cos(), angle.sin()
        x = keys.float()
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(keys.dtype)


def cartridge_size(document_tokens: int, tokens: int | None, ratio: float | None, span: int | None) -> int:
    """Positions p of a document's cartridge: ``tokens``, or document_tokens / ``ratio``, rounded down to a multiple of
    4 but at least 4, at most ``span``. Exactly one of tokens and ratio is given."""
    if (tokens is None) == (ratio is None):
        raise ConfigError("give the cartridge size either as --tokens or as --ratio")
    if tokens is not None and (tokens < MULTIPLE or tokens % MULTIPLE):
        raise ConfigError(f"--tokens {tokens}: a cartridge has a multiple of {MULTIPLE} positions, at least {MULTIPLE}")
    if ratio is not None and not (math.isfinite(ratio) and ratio >= 1):
        raise ConfigError(f"--ratio {ratio}: the compression ratio is at least 1")
    wanted = tokens if tokens is not None else document_tokens / (ratio or 1)
    if span is not None and (span < MULTIPLE or span % MULTIPLE):
        raise ConfigError(f"--span {span}: a multiple of {MULTIPLE}, at least {MULTIPLE}")
    p = max(MULTIPLE, int(wanted / MULTIPLE) * MULTIPLE)
    return min(p, span) if span is not None else p
