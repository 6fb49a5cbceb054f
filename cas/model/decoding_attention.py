"""Attention of prompts and of decoding steps over [prefix ; own tokens].

Rows with the same prefix form a group and read its keys and values in place, in one matrix product. A batch is a
rectangle of G groups with R slots each, so that one product serves all groups.

Shape legend: G groups, R slots of a group, B = G * R, H key/value heads, Q query heads, S prefix positions, T own
tokens, N own tokens so far, D head dimension.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from cas.model.attention import causal_mask
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

SLOT_COST = 512  # what a slot costs in a step besides reading its prefix, in positions of a prefix that it alone reads
FUSED_FROM = 256  # tokens of a single prompt from which PyTorch's fused attention is faster than plain products


@dataclass(frozen=True)
class Prompt:
    """What one question puts behind the shared header: cartridges (ids in loading order), then tokens.

    Without cartridges the tokens stand directly behind the header, as in any ordinary prompt.
    """

    tokens: tuple[int, ...]
    cartridges: tuple[str, ...] = ()


def group_rows(prefixes: Sequence[Hashable], width: int) -> list[list[int]]:
    """Row numbers in groups with the same prefix of at most ``width`` positions; groups much larger than others are
    split."""
    rows: dict[Hashable, list[int]] = {}
    for row, prefix in enumerate(prefixes):
        rows.setdefault(prefix, []).append(row)
    counts = [len(members) for members in rows.values()]

    def cost(size: int) -> int:
        return sum(-(-count // size) for count in counts) * (width + size * SLOT_COST)

    largest = max(counts)
    size = min({-(-largest >> i) for i in range(largest.bit_length() + 1)}, key=lambda s: (cost(s), -s))
    return [members[i : i + size] for members in rows.values() for i in range(0, len(members), size)]


class Prefix:
    """The header and the cartridges that each group sees: [G, H, S, D] keys and values a layer."""

    def __init__(
        self,
        model: FrozenModel,
        groups: Sequence[tuple[str, ...]],
        cartridges: Mapping[str, Tensor],
        layout: Layout,
    ) -> None:
        start, device = model.layout_header, model.device
        sizes = {name: cartridges[name].shape[3] for group in groups for name in group}
        shifted = [list(zip(group, layout.shifts([sizes[name] for name in group]), strict=True)) for group in groups]
        # Every cartridge once for every shift of its keys, side by side behind the header.
        pool = list(dict.fromkeys(part for parts in shifted for part in parts))
        begins = dict(zip(pool, accumulate((sizes[name] for name, _ in pool), initial=start), strict=False))
        kv = torch.cat([model.header_kv, *(cartridges[name].to(device, model.dtype) for name, _ in pool)], dim=3)
        shifts = torch.tensor([0] * start + [shift for name, shift in pool for _ in range(sizes[name])])
        self.widths = [start + sum(sizes[name] for name in group) for group in groups]
        # Of every column its place there, its position, and its cartridge (1 is the group's first); padding repeats a
        # column.
        columns, positions, owner = torch.zeros(3, len(groups), max(self.widths), dtype=torch.long)
        columns[:, :start] = positions[:, :start] = torch.arange(start)
        for g, parts in enumerate(shifted):
            at = start
            for number, (name, shift) in enumerate(parts, 1):
                place, end = torch.arange(sizes[name]), at + sizes[name]
                columns[g, at:end] = place + begins[name, shift]
                positions[g, at:end] = place + layout.header + shift
                owner[g, at:end] = number
                at = end
        _, _, heads, length, dim = kv.shape
        rows = (columns[:, None] + length * torch.arange(heads)[:, None]).flatten().to(device)
        shape = (len(groups), heads, max(self.widths), dim)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for layer, (keys, values) in enumerate(kv):
            keys = model.rope.shift(keys, shifts, layer) if shifts.any() else keys
            self.layers.append(
                (
                    keys.flatten(0, 1).index_select(0, rows).view(shape),
                    values.flatten(0, 1).index_select(0, rows).view(shape),
                )
            )
        self.positions, self.owner = positions.to(device), owner.to(device)
        self.valid = self._valid()

    def take(self, groups: range | list[int]) -> Prefix:
        """These groups alone; a range copies nothing."""
        taken = object.__new__(Prefix)
        taken.widths = [self.widths[g] for g in groups]
        rows, width = slice(groups.start, groups.stop) if isinstance(groups, range) else groups, max(taken.widths)
        taken.layers = [(keys[rows, :, :width], values[rows, :, :width]) for keys, values in self.layers]
        taken.positions, taken.owner = self.positions[rows, :width], self.owner[rows, :width]
        taken.valid = taken._valid()
        return taken

    def _valid(self) -> Tensor | None:
        """Which columns [G, S] are no padding; None where there is none."""
        if min(self.widths) == max(self.widths):
            return None
        valid = torch.arange(max(self.widths)) < torch.tensor(self.widths)[:, None]
        return valid.to(self.positions.device)

    def bias(self, positions: Tensor, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """0 or -inf for tokens at positions [G, R, T], as [G, 1, R, 1, T, S]; None where all is visible."""
        if window is None:
            return None if self.valid is None else hide(~self.valid, dtype)[:, None, None, None, None]
        seen = causal_mask(positions.flatten(1), self.positions, window)
        seen = seen if self.valid is None else seen & self.valid[:, None]
        return hide(~seen, dtype).unflatten(1, positions.shape[1:])[:, None, :, None]


def hide(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """A bias of scores: -inf where hidden, else 0."""
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -torch.inf)


def attention(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    prefix: tuple[Tensor, Tensor],
    scale: float,
    own_bias: Tensor | None,
    prefix_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Softmax attention over prefix and own tokens, whose keys and values are never put side by side; only the scores
    are.

    Args:
        query: [B, Q, T, D]; own: keys and values [G, H, R, N, D]; prefix: [G, H, S, D].
        own_bias, prefix_bias: 0 or -inf, broadcast to [G, H, R, Q / H, T, N] and [G, H, R, Q / H, T, S].
    Returns: output [B, T, Q, D]; float32 weights [G, H, R, Q / H * T, S + N].
    """
    groups, heads, rows, n, d = own[0].shape
    width, t, repeat = prefix[0].shape[2], query.shape[2], query.shape[1] // heads
    shape = (groups, heads, rows, repeat, t)
    q = query.view(groups, rows, heads, repeat, t, d).transpose(1, 2).contiguous()
    by_group, by_row = (groups * heads, rows * repeat * t), (groups * heads * rows, repeat * t)
    on_prefix = torch.bmm(q.view(*by_group, d), prefix[0].flatten(0, 1).mT)
    on_own = torch.bmm(q.view(*by_row, d), own[0].flatten(0, 2).mT)
    if prefix_bias is not None:
        on_prefix.view(*shape, width).add_(prefix_bias)
    if own_bias is not None:
        on_own.view(*shape, n).add_(own_bias)
    scores = torch.cat([on_prefix.view(*by_row, width), on_own], dim=2).float().mul_(scale)
    weights = scores.softmax(-1)
    w = weights.to(query.dtype)
    out = torch.bmm(w.view(*by_group, width + n)[..., :width], prefix[1].flatten(0, 1))
    out.view(*by_row, d).baddbmm_(w[..., width:], own[1].flatten(0, 2))
    out = out.view(*shape, d).permute(0, 2, 4, 1, 3, 5).reshape(groups * rows, t, heads * repeat, d)
    return out, weights.view(groups, heads, rows, repeat * t, width + n)


class Prefill:
    """Context of one forward pass that reads prompts, packed without padding; inside attention they are padded at the
    end to a rectangle of G groups with R of them each."""

    def __init__(self, prefix: Prefix, prompts: Sequence[Sequence[Prompt]], starts: Mapping[Prompt, int]) -> None:
        """prompts: of every group, at most R; starts: position of each one's first token."""
        device = prefix.positions.device
        flat = [prompt for group in prompts for prompt in group]
        lengths = [len(prompt.tokens) for prompt in flat]
        self.prefix, self.size, self.length = prefix, max(map(len, prompts)), max(lengths)
        self.tokens = torch.tensor([[token for prompt in flat for token in prompt.tokens]], device=device)
        self.ends = torch.tensor(lengths).cumsum(0).tolist()  # where each prompt ends among the tokens
        positions = [torch.arange(n) + starts[prompt] for prompt, n in zip(flat, lengths, strict=True)]
        self.positions = torch.cat(positions)[None].to(device)
        # Token of every place of the rectangle, 0 where there is none; and place of every token.
        rectangle = torch.zeros(len(prompts), self.size, self.length, dtype=torch.long)
        placed = torch.zeros(len(prompts), self.size, self.length, dtype=torch.long)
        inside = torch.zeros(rectangle.shape, dtype=torch.bool)
        numbers = iter(range(len(flat)))
        for g, group in enumerate(prompts):
            for r, number in zip(range(len(group)), numbers):
                n = lengths[number]
                rectangle[g, r, :n] = torch.arange(self.ends[number] - n, self.ends[number])
                placed[g, r] = torch.arange(self.length) + starts[flat[number]]
                inside[g, r, :n] = True
        self.rectangle, self.placed = rectangle.to(device).flatten(), placed.to(device)
        self.place = inside.flatten().nonzero()[:, 0].to(device)
        self.biases: dict[int | None, tuple[Tensor, Tensor | None]] = {}
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}  # [tokens, H, D]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        self.kv[layer] = key[0].transpose(0, 1), value[0].transpose(0, 1)
        keys, values = self.prefix.layers[layer]
        groups, width, tokens = keys.shape[0], keys.shape[2], key.shape[2]
        if len(self.rectangle) == tokens == self.length >= FUSED_FROM:
            if (
                window is None and 4 * width <= tokens
            ):  # the prefix gets queries, too: a triangle is a mask that kernels know
                query, mask = pad(query, (0, 0, width, 0)), None
            else:
                placed = self.positions[0]
                mask = causal_mask(placed, torch.cat([self.prefix.positions[0], placed]), window)[None, None]
            k, v = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            out = scaled_dot_product_attention(
                query, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
            )
            return out[:, :, -tokens:].transpose(1, 2)
        if window not in self.biases:
            columns = torch.arange(self.length, device=key.device)
            hidden = ~causal_mask(columns, columns, window)
            self.biases[window] = hide(hidden, key.dtype), self.prefix.bias(self.placed, window, key.dtype)
        asked, own_keys, own_values = (
            x[0].index_select(1, self.rectangle).view(x.shape[1], groups, self.size, self.length, -1)
            for x in (query, key, value)
        )
        own = own_keys.transpose(0, 1).contiguous(), own_values.transpose(0, 1).contiguous()
        asked = asked.permute(1, 2, 0, 3, 4).flatten(0, 1)
        out = attention(asked, own, (keys, values), scale, *self.biases[window])[0]
        return out.flatten(0, 1).index_select(0, self.place)[None]
