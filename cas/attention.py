"""Attention over [header ; visible cartridges ; own tokens], plugged into any Hugging Face decoder.

Hugging Face models look their attention function up by name and hand every extra keyword of ``forward`` on to it.
We register one function, ``"cas"``, and pass an :class:`AttentionContext` as the keyword ``cas``: the context holds
the prefix, decides what every query may see, and so owns the mathematics, with no model code of our own.

Shape legend: B batch, T own tokens, S prefix positions, H key/value heads, Q query heads, D head dimension, L layers.

Contexts in this file:

* :class:`Reference` -- the truth: one conversation at a time, nothing shared, padded or clever. Tests only.
* :class:`Masked`    -- all residents as one prefix for everybody, visibility as a dense mask.
* :class:`Gathered`  -- the CPU path: conversations packed without padding for the model's matrix products; attention
  in groups of similar size over a gather of the visible positions.

Decoding has its own context, in :mod:`cas.decoding`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cas.cartridge import Layout, Rope


class AttentionContext(Protocol):
    """What the registered function calls in every layer."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        """query [B, Q, T, D], key and value [B, H, T, D] after RoPE -> output [B, T, Q, D]."""
        ...


def cas_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    cas: AttentionContext | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function that Hugging Face's attention layers call under the name ``"cas"``."""
    assert cas is not None, "the 'cas' attention needs its context: call FrozenModel.forward"
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    # The keyword, None included, goes before the attribute: some mixed models give that one to every layer.
    window = kwargs.get("sliding_window", getattr(module, "sliding_window", None))
    record = getattr(cas, "record", None)
    if record is not None:  # the probe at load wants to see the keywords too
        record(module.layer_idx, query, key, window, kwargs)
    return cas.attend(module.layer_idx, query, key, value, scale, window), None


def register() -> None:
    """Make ``"cas"`` known to transformers (idempotent). Our contexts build their own masks."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("cas", cas_attention)
    AttentionMaskInterface.register("cas", lambda *args, **kwargs: None)


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Who may see whom by position alone: key <= query, and within the sliding window if there is one.

    Args: query_positions [..., T] and key_positions [..., S], integer. Returns bool [..., T, S].
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


@dataclass(frozen=True)
class Batch:
    """Conversations packed one behind the other without padding.

    Attributes:
        lengths: tokens of each conversation.
        visible: ids of the cartridges each conversation sees, in the order of loading.
    """

    lengths: tuple[int, ...]
    visible: tuple[tuple[str, ...], ...]

    def starts(self) -> list[int]:
        starts, total = [], 0
        for length in self.lengths:
            starts.append(total)
            total += length
        return starts


def packed_positions(batch: Batch, sizes: Mapping[str, int], layout: Layout) -> Tensor:
    """Positions [1, sum T] of the own tokens of every packed conversation under the store's layout."""
    rows = [
        torch.arange(length) + layout.token_start([sizes[name] for name in seen])
        for length, seen in zip(batch.lengths, batch.visible, strict=True)
    ]
    return torch.cat(rows)[None]


class _Pool:
    """Header and residents side by side, [L, 2, H, S, D] in the compute dtype, with each one's place in it."""

    def __init__(self, header: Tensor, cartridges: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self.places: dict[str, range] = {}
        end = header.shape[3]
        for name, kv in cartridges.items():
            self.places[name] = range(end, end + kv.shape[3])
            end += kv.shape[3]
        # One cat and one unbind: slicing each layer out of each leaf would make autograd fill a whole zero tensor a slice.
        self.layers = torch.cat([header.to(dtype), *(kv.to(dtype) for kv in cartridges.values())], dim=3).unbind(0)
        self.header = range(header.shape[3])
        self.size = end


def _visible_columns(pool: _Pool, seen: Sequence[str], layout: Layout) -> tuple[list[int], list[int], list[int]]:
    """Pool columns of one conversation's prefix, the position each key is placed at, and by how much it must turn."""
    columns, placed, turn = list(pool.header), list(pool.header), [0] * len(pool.header)
    for name, shift in zip(seen, layout.shifts([len(pool.places[n]) for n in seen]), strict=True):
        place = pool.places[name]
        columns += place
        placed += range(layout.header + shift, layout.header + shift + len(place))
        turn += [shift] * len(place)
    return columns, placed, turn


class Reference:
    """The plain truth for every fast path: one conversation at a time over exactly what it sees."""

    def __init__(
        self, batch: Batch, header: Tensor, cartridges: Mapping[str, Tensor], layout: Layout, rope: Rope
    ) -> None:
        self.batch, self.header, self.cartridges, self.layout, self.rope = batch, header, cartridges, layout, rope

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        outputs = []
        for start, length, seen in zip(self.batch.starts(), self.batch.lengths, self.batch.visible, strict=True):
            sizes = [self.cartridges[name].shape[3] for name in seen]
            keys, values = [self.header[layer, 0]], [self.header[layer, 1]]
            positions = [torch.arange(self.layout.header)]
            for name, shift in zip(seen, self.layout.shifts(sizes), strict=True):
                kv = self.cartridges[name][layer]
                p = kv.shape[2]
                keys.append(self.rope.turn(kv[0], torch.full((p,), shift), layer))
                values.append(kv[1])
                positions.append(torch.arange(p) + self.layout.header + shift)
            own = slice(start, start + length)
            own_positions = torch.arange(length) + self.layout.token_start(sizes)
            k = torch.cat([x.to(query.dtype) for x in keys] + [key[0, :, own]], dim=1)
            v = torch.cat([x.to(query.dtype) for x in values] + [value[0, :, own]], dim=1)
            mask = causal_mask(own_positions, torch.cat([*positions, own_positions]), window).to(query.device)
            repeat = query.shape[1] // k.shape[0]
            scores = (query[0, :, own].float() @ k.repeat_interleave(repeat, 0).float().transpose(1, 2)) * scale
            weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            outputs.append((weights @ v.repeat_interleave(repeat, 0).float()).to(query.dtype).transpose(0, 1))
        return torch.cat(outputs)[None]


class Masked:
    """All residents as one prefix, what each token sees as one dense mask. No conversation may need turned keys."""

    def __init__(
        self, batch: Batch, header: Tensor, cartridges: Mapping[str, Tensor], layout: Layout, dtype: torch.dtype
    ) -> None:
        assert layout.policy != "sequential", "turned keys cannot be shared between conversations"
        self.pool = _Pool(header, cartridges, dtype)
        total = sum(batch.lengths)
        owner = torch.repeat_interleave(torch.arange(len(batch.lengths)), torch.tensor(batch.lengths))
        self.sees = torch.zeros(len(batch.lengths), self.pool.size, dtype=torch.bool)
        self.sees[:, list(self.pool.header)] = True
        placed = list(self.pool.header)
        for name, place in self.pool.places.items():
            placed += range(layout.header, layout.header + len(place))
            for row, seen in enumerate(batch.visible):
                if name in seen:
                    self.sees[row, list(place)] = True
        self.sees = torch.cat([self.sees[owner], owner[:, None] == owner[None]], dim=1)
        own = packed_positions(batch, {n: len(r) for n, r in self.pool.places.items()}, layout)[0]
        self.query_positions, self.key_positions = own, torch.cat([torch.tensor(placed), own])
        # Conversations side by side share positions, so "key <= query" alone is not causal across them: `sees` is.
        assert self.sees.shape == (total, self.pool.size + total)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        prefix = self.pool.layers[layer]
        k = torch.cat([prefix[0], key[0]], dim=1)[None]
        v = torch.cat([prefix[1], value[0]], dim=1)[None]
        mask = (self.sees & causal_mask(self.query_positions, self.key_positions, window)).to(query.device)
        return scaled_dot_product_attention(query, k, v, attn_mask=mask, scale=scale, enable_gqa=True).transpose(1, 2)


@dataclass(frozen=True)
class _Group:
    """Conversations attended together: padded to the longest, only inside attention."""

    rows: Tensor  # [B, T] rows of the packed batch, 0 where padded
    columns: Tensor  # [B, S] pool columns, 0 where padded
    turn: Tensor | None  # [B, S] by how many positions each key must be turned; None where none must
    own_positions: Tensor  # [B, T]
    key_positions: Tensor  # [B, S + T]
    valid: Tensor  # [B, 1, S + T] false where padded
    inside: Tensor  # [B, T] true for real rows


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """``x[:, index]`` of x [H, N, D], index [B, S] -> [H, B, S, D]. Unlike indexing, whose backward lets threads add in
    any order, the gradient has the same bits every time; and it is faster."""
    return x.index_select(1, index.flatten()).unflatten(1, index.shape)


class Gathered:
    """The CPU path. The model's matrix products see the packed conversations without padding; attention runs in a few
    groups of conversations with similar visible sizes, each over a gather of its visible pool columns."""

    def __init__(
        self,
        batch: Batch,
        header: Tensor,
        cartridges: Mapping[str, Tensor],
        layout: Layout,
        rope: Rope,
        dtype: torch.dtype,
    ) -> None:
        used = {name for seen in batch.visible for name in seen}
        self.pool = _Pool(header, {n: kv for n, kv in cartridges.items() if n in used}, dtype)
        self.rope = rope
        prefixes = [_visible_columns(self.pool, seen, layout) for seen in batch.visible]
        order = sorted(range(len(prefixes)), key=lambda i: (len(prefixes[i][0]), batch.lengths[i], i))
        self.groups: list[_Group] = []
        starts = batch.starts()
        group: list[int] = []
        for i in order:
            # A group may pad its prefixes to at most twice the shortest one: few groups, little waste.
            if group and len(prefixes[i][0]) > 2 * len(prefixes[group[0]][0]):
                self.groups.append(self._group(group, batch, starts, prefixes, layout))
                group = []
            group.append(i)
        self.groups.append(self._group(group, batch, starts, prefixes, layout))
        # Where each packed row finds its output among the concatenated rows of the groups, padding included.
        inside = torch.cat([g.inside.flatten() for g in self.groups]).nonzero()[:, 0]
        self.biases: dict[tuple[int, int | None], Tensor] = {}
        self.back = torch.empty_like(inside)
        self.back[torch.cat([g.rows.flatten() for g in self.groups])[inside]] = inside

    def _group(
        self,
        members: list[int],
        batch: Batch,
        starts: list[int],
        prefixes: list[tuple[list[int], list[int], list[int]]],
        layout: Layout,
    ) -> _Group:
        s = max(len(prefixes[i][0]) for i in members)
        t = max(batch.lengths[i] for i in members)
        rows, columns, turn = (torch.zeros(len(members), n, dtype=torch.long) for n in (t, s, s))
        key_positions = torch.zeros(len(members), s + t, dtype=torch.long)
        own_positions = torch.zeros(len(members), t, dtype=torch.long)
        valid = torch.zeros(len(members), 1, s + t, dtype=torch.bool)
        inside = torch.zeros(len(members), t, dtype=torch.bool)
        for b, i in enumerate(members):
            cols, placed, turned = prefixes[i]
            n, length = len(cols), batch.lengths[i]
            columns[b, :n], turn[b, :n], key_positions[b, :n] = (
                torch.tensor(cols),
                torch.tensor(turned),
                torch.tensor(placed),
            )
            rows[b, :length] = torch.arange(starts[i], starts[i] + length)
            # Padded queries keep counting, so that every row sees at least itself and no softmax is empty.
            start = layout.token_start([len(self.pool.places[name]) for name in batch.visible[i]])
            own_positions[b] = torch.arange(start, start + t)
            key_positions[b, s:] = own_positions[b]
            valid[b, 0, :n] = True
            valid[b, 0, s:] = True
            inside[b, :length] = True
        device = self.pool.layers[0].device
        return _Group(
            rows.to(device),
            columns.to(device),
            turn.to(device) if bool(turn.any()) else None,
            own_positions.to(device),
            key_positions.to(device),
            valid.to(device),
            inside.to(device),
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        prefix_k, prefix_v = self.pool.layers[layer].unbind(0)
        outputs = []
        for number, group in enumerate(self.groups):
            k = _gather(prefix_k, group.columns)
            if group.turn is not None:
                k = self.rope.turn(k, group.turn, layer)
            k = torch.cat([k, _gather(key[0], group.rows)], dim=2).transpose(0, 1)
            v = torch.cat([_gather(prefix_v, group.columns), _gather(value[0], group.rows)], dim=2).transpose(0, 1)
            q = _gather(query[0], group.rows).transpose(0, 1)  # [B, Q, T, D]
            out = _attention(q, k, v, self._bias(number, window, q, k), scale)
            outputs.append(out.transpose(1, 2).flatten(0, 1))  # [B * T, Q, D]
        return torch.cat(outputs).index_select(0, self.back)[None]

    def _bias(self, number: int, window: int | None, query: Tensor, key: Tensor) -> Tensor:
        """The mask of a group as something to add to the scores, [B * H, Q/H * T, S + T]: made once a window, not once a layer."""
        if (number, window) not in self.biases:
            group = self.groups[number]
            mask = causal_mask(group.own_positions, group.key_positions, window) & group.valid
            bias = torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
            (b, heads), repeat = key.shape[:2], query.shape[1] // key.shape[1]
            spread = bias[:, None, None].expand(b, heads, repeat, *bias.shape[1:])
            self.biases[number, window] = spread.reshape(b * heads, repeat * bias.shape[1], -1)
        return self.biases[number, window]


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax attention [B, Q, T, D] by plain batched products, the query heads that share a key head side by side.

    On a CPU this takes half the time forward, and a fifth backward, of torch's fused kernel at the sizes of a training step.
    """
    (b, heads, t, d), kv_heads = q.shape, k.shape[1]
    queries = (q * scale).reshape(b * kv_heads, heads // kv_heads * t, d)
    weights = torch.baddbmm(bias, queries, k.reshape(b * kv_heads, -1, d).transpose(1, 2)).softmax(-1)
    return torch.bmm(weights, v.reshape(b * kv_heads, -1, d)).view(b, heads, t, d)
