"""Attention for training on a CPU: every cartridge's keys are read where they lie, by all tokens that see it at once.

What a token sees are *parts*: its own conversation up to it, behind the header, and some cartridges. Softmax attention over
all of them is the mean of what each part gives alone, weighted by the sum of exponentials of its scores. So each part is one
batched product over the rows that see it. No cartridge is copied or padded, or multiplied with rows that may not see it:
the cost follows what is visible. The backward pass uses the weights kept by the forward one, and computes gradients only
of cartridges that learn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cas.attention import Batch, causal_mask, packed_positions
from cas.cartridge import Layout, Rope

PADDING = 2.0  # own tokens of a group of conversations are padded to at most so many times the shortest one's
LOW = -1e30  # below every score, and a number: what is left of a maximum over nothing


@dataclass(frozen=True)
class _Cartridge:
    """A cartridge as some rows see it."""

    name: str
    rows: Tensor  # [R] of the packed tokens
    turn: int  # by how many positions its keys are turned
    positions: Tensor  # [P] where its keys stand

    @property
    def real_rows(self) -> Tensor:
        """[R], none of them twice."""
        return self.rows

    def grouped(self, x: Tensor, kv_heads: int) -> Tensor:
        """The part's rows of x [Q, N, D] as [H, rep * R, D]."""
        return self.shaped(x.index_select(1, self.rows), kv_heads)

    def shaped(self, x: Tensor, kv_heads: int) -> Tensor:
        """[Q, R, D] -> [H, rep * R, D]: query heads that share a key head side by side."""
        return x.reshape(kv_heads, -1, x.shape[2])

    def flat(self, x: Tensor, kv_heads: int) -> Tensor:
        """And back."""
        return x.view(-1, len(self.rows), x.shape[2])


@dataclass(frozen=True)
class _Own:
    """Conversations of similar length, padded to the longest: each sees the header and its own tokens."""

    rows: Tensor  # [B * T] rows of the packed tokens, 0 where padded
    size: int  # B
    inside: Tensor | None  # the real ones among them; None if all are
    padded: Tensor | None  # [B * T] the others as a mask
    positions: Tensor  # [B, T]; padding keeps counting
    bias: Tensor  # [T, header + T], 0 or -inf: causal

    @property
    def real_rows(self) -> Tensor:
        """[R] without the padding."""
        return self.rows if self.inside is None else self.rows[self.inside]

    def shaped(self, x: Tensor, kv_heads: int) -> Tensor:
        """[Q, B * T, D] -> [H * B, rep * T, D]: query heads that share a key head side by side."""
        x = x.view(kv_heads, -1, self.size, x.shape[1] // self.size, x.shape[2]).transpose(1, 2)
        return x.reshape(kv_heads * self.size, -1, x.shape[4])

    def flat(self, x: Tensor, kv_heads: int) -> Tensor:
        """And back."""
        t = len(self.rows) // self.size
        x = x.view(kv_heads, self.size, -1, t, x.shape[2]).transpose(1, 2)
        return x.reshape(-1, self.size * t, x.shape[4])


class Merged:
    """The context of a training step over packed conversations (batch size 1)."""

    def __init__(
        self,
        batch: Batch,
        header: Tensor,
        cartridges: Mapping[str, Tensor],
        layout: Layout,
        rope: Rope,
        dtype: torch.dtype,
    ) -> None:
        used = sorted({name for seen in batch.visible for name in seen})
        sizes = {name: kv.shape[3] for name, kv in cartridges.items()}
        device = header.device
        # One cast and one unbind each: slicing every layer out of a leaf would make autograd fill a zero tensor a slice.
        self.header = header.to(dtype).unbind(0)
        self.layers = {name: cartridges[name].to(dtype).unbind(0) for name in used}
        self.learning = [name for name in used if cartridges[name].requires_grad]
        self.rope = rope
        self.positions = packed_positions(batch, sizes, layout)[0].to(device)
        seen_at: dict[tuple[str, int], list[range]] = {}
        starts = batch.starts()
        for start, length, seen in zip(starts, batch.lengths, batch.visible, strict=True):
            for name, shift in zip(seen, layout.shifts([sizes[n] for n in seen]), strict=True):
                seen_at.setdefault((name, shift), []).append(range(start, start + length))
        self.cartridges = []
        for (name, shift), spans in sorted(seen_at.items()):
            rows = torch.tensor([row for span in spans for row in span], device=device)
            placed = torch.arange(sizes[name], device=device) + layout.header + shift
            self.cartridges.append(_Cartridge(name, rows, shift, placed))
        self.own = [self._own(members, batch.lengths, starts) for members in _similar(batch.lengths)]
        self._biases: dict[tuple[str, int, int], Tensor | None] = {}

    def _own(self, members: Sequence[int], lengths: Sequence[int], starts: Sequence[int]) -> _Own:
        t, h, device = max(lengths[i] for i in members), self.header[0].shape[2], self.positions.device
        rows, positions = torch.zeros(2, len(members), t, dtype=torch.long)
        inside = torch.zeros(len(members), t, dtype=torch.bool)
        for b, i in enumerate(members):
            rows[b, : lengths[i]] = torch.arange(starts[i], starts[i] + lengths[i])
            inside[b, : lengths[i]] = True
            positions[b] = self.positions[starts[i]].cpu() + torch.arange(t)
        padded = None if bool(inside.all()) else ~inside.flatten().to(device)
        real = None if padded is None else inside.flatten().nonzero()[:, 0].to(device)
        bias = torch.full((t, t), -torch.inf, dtype=self.header[0].dtype, device=device).triu_(1)
        bias = torch.cat([bias.new_zeros(t, h), bias], dim=1)
        return _Own(rows.flatten().to(device), len(members), real, padded, positions.to(device), bias)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        leaves = [self.layers[name][layer] for name in self.learning]
        out: Tensor = _Attention.apply(query[0], key[0], value[0], self, layer, scale, window, *leaves)
        return out[None]

    def keys_values(self, part: _Cartridge, layer: int) -> tuple[Tensor, Tensor]:
        """Of a cartridge where it stands, [H, P, D]."""
        keys, values = self.layers[part.name][layer].detach()
        return self.turned(keys, part.turn, layer), values

    def turned(self, keys: Tensor, by: int, layer: int) -> Tensor:
        """Keys [H, P, D] moved by so many positions; gradients are moved back by as many."""
        return self.rope.turn(keys, torch.full(keys.shape[1:2], by), layer) if by else keys

    def hidden(self, number: int, window: int | None) -> Tensor | None:
        """What a sliding window hides of the number-th cartridge, [R, P] of 0 and -inf; None if nothing."""
        if window is None:
            return None
        if ("cartridge", number, window) not in self._biases:
            part = self.cartridges[number]
            seen = causal_mask(self.positions[part.rows], part.positions, window)
            self._biases["cartridge", number, window] = None if bool(seen.all()) else self._bias(seen)
        return self._biases["cartridge", number, window]

    def own_bias(self, number: int, window: int | None) -> Tensor:
        """What the number-th group's tokens may not see of the header and of themselves, [1 or B, 1, T, header + T]."""
        group = self.own[number]
        if window is None:
            return group.bias[None, None]
        if ("own", number, window) not in self._biases:
            header = torch.arange(group.bias.shape[1] - group.positions.shape[1], device=group.rows.device)
            keys = torch.cat([header.expand(group.size, -1), group.positions], dim=1)
            seen = causal_mask(group.positions, keys, window)
            self._biases["own", number, window] = self._bias(seen)[:, None]
        found = self._biases["own", number, window]
        assert found is not None
        return found

    def _bias(self, seen: Tensor) -> Tensor:
        return self.header[0].new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _similar(lengths: Sequence[int]) -> list[list[int]]:
    """Conversations in groups of similar length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not groups or lengths[i] > PADDING * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return groups


class _Attention(torch.autograd.Function):
    """Merged softmax attention of packed tokens: query [Q, N, D], key and value [H, N, D] -> [N, Q, D].

    Gradients flow to query, key, value and to the layers of learning cartridges, [2, H, P, D] each, in their order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: Merged,
        layer: int,
        scale: float,
        window: int | None,
        *leaves: Tensor,
    ) -> Tensor:
        (heads, n, d), kv_heads = query.shape, key.shape[0]
        query = (query * scale).contiguous()
        kept: list[tuple[Tensor, Tensor]] = []  # of every part, what the backward pass needs: weights and their maximum
        found: list[
            tuple[Tensor, Tensor, Tensor, Tensor]
        ] = []  # rows; of these maximum, sum of weights, what they give

        def add(scores: Tensor, values: Tensor, part: _Own | _Cartridge) -> None:
            top = scores.amax(-1, keepdim=True)
            top = top if window is None else top.clamp_min(LOW)  # a row may see nothing of a part
            weights = scores.sub_(top).exp_()
            total = part.flat(weights.sum(-1, keepdim=True), kv_heads)[..., 0].float()
            out, top = part.flat(torch.bmm(weights, values), kv_heads), part.flat(top, kv_heads)[..., 0].float()
            kept.append((weights, top))
            if isinstance(part, _Own) and part.inside is not None:
                top, total, out = (x.index_select(1, part.inside) for x in (top, total, out))
            found.append((part.real_rows, top, total, out))

        for number, group in enumerate(context.own):
            q, k, v = _own_tokens(query, key, value, context.header[layer], group)
            scores = torch.bmm(q, k.transpose(1, 2))
            scores.view(kv_heads, group.size, -1, *group.bias.shape).add_(context.own_bias(number, window))
            add(scores, v, group)
        for number, part in enumerate(context.cartridges):
            keys, values = context.keys_values(part, layer)
            scores = torch.bmm(part.grouped(query, kv_heads), keys.transpose(1, 2))
            if (bias := context.hidden(number, window)) is not None:
                scores.view(heads, *bias.shape).add_(bias)
            add(scores, values, part)
        # A part's weights count by where its maximum stands below that of all parts.
        highest = query.new_full((heads, n), LOW, dtype=torch.float32)
        for rows, top, _, _ in found:
            highest.index_copy_(1, rows, torch.maximum(highest.index_select(1, rows), top))
        sums, out = torch.zeros_like(highest), query.new_zeros((heads, n, d), dtype=torch.float32)
        for rows, top, total, given in found:
            share = (top - highest.index_select(1, rows)).exp_()
            sums.index_add_(1, rows, total * share)
            out.index_add_(1, rows, given * share[..., None])
        out.div_(sums[..., None])
        tensors = [tensor for pair in kept for tensor in pair]
        ctx.save_for_backward(query, key, value, out, highest.add_(sums.log_()), *tensors)
        ctx.cas = (context, layer, scale)
        return out.to(query.dtype).transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        query, key, value, out, normaliser, *tensors = ctx.saved_tensors
        context, layer, scale = ctx.cas
        kept = list(zip(tensors[::2], tensors[1::2], strict=True))
        kv_heads, d, dtype = key.shape[0], key.shape[2], query.dtype
        grad = gradients[0].transpose(0, 1).contiguous()  # [Q, N, D]
        delta = (grad * out).sum(-1)
        by_query, by_key, by_value = (torch.zeros_like(x) for x in (query, key, value))
        by_cartridge: dict[str, Tensor] = {}

        def scores_gradient(
            weights: Tensor, top: Tensor, values: Tensor, part: _Own | _Cartridge
        ) -> tuple[Tensor, Tensor]:
            """Gradients of what a part's weights give [X, Y, D], and of its scores [X, Y, P]."""
            share = top - normaliser.index_select(1, part.rows)
            if isinstance(part, _Own) and part.padded is not None:
                share.masked_fill_(part.padded, -torch.inf)
            share.exp_()  # a row's weights times its share are its softmax
            by_given = part.shaped(grad.index_select(1, part.rows).mul_(share[..., None].to(dtype)), kv_heads)
            offset = part.shaped((share * delta.index_select(1, part.rows))[..., None].to(dtype), kv_heads)
            return by_given, torch.bmm(by_given, values.transpose(1, 2)).sub_(offset).mul_(weights)

        for group, (weights, top) in zip(context.own, kept):
            q, k, v = _own_tokens(query, key, value, context.header[layer], group)
            by_given, by_scores = scores_gradient(weights, top, v, group)
            by_query.index_add_(1, group.rows, group.flat(torch.bmm(by_scores, k), kv_heads))
            own = slice(group.bias.shape[1] - group.bias.shape[0], None)  # not the header
            for sums, left, right in ((by_key, by_scores, q), (by_value, weights, by_given)):
                part_sum = torch.bmm(left.transpose(1, 2), right)[:, own].reshape(kv_heads, -1, d)
                sums.index_add_(1, group.rows, part_sum)
        for part, (weights, top) in zip(context.cartridges, kept[len(context.own) :]):
            keys, values = context.keys_values(part, layer)
            by_given, by_scores = scores_gradient(weights, top, values, part)
            by_query.index_add_(1, part.rows, part.flat(torch.bmm(by_scores, keys), kv_heads))
            if part.name in context.learning:
                by_turned = torch.bmm(by_scores.transpose(1, 2), part.grouped(query, kv_heads))
                by_kv = torch.stack(
                    [context.turned(by_turned, -part.turn, layer), torch.bmm(weights.transpose(1, 2), by_given)]
                )
                by_cartridge[part.name] = by_cartridge[part.name] + by_kv if part.name in by_cartridge else by_kv
        others = (by_cartridge[name] for name in context.learning)
        return (by_query.mul_(scale), by_key, by_value, None, None, None, None, *others)


def _own_tokens(
    query: Tensor, key: Tensor, value: Tensor, header: Tensor, group: _Own
) -> tuple[Tensor, Tensor, Tensor]:
    """A group's queries, [H * B, rep * T, D], and twice what they see: the header's and own tokens, [H * B, header + T, D]."""
    (kv_heads, _, d), b = key.shape, group.size
    kv = []
    for shared, own in zip(header, (key, value)):
        own = own.index_select(1, group.rows).view(kv_heads, b, -1, d)
        shared = shared[:, None].expand(-1, b, -1, -1)
        kv.append(torch.cat([shared, own], dim=2).view(kv_heads * b, -1, d))
    return group.shaped(query.index_select(1, group.rows), kv_heads), kv[0], kv[1]
