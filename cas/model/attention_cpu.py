"""Attention for training on a CPU: every cartridge's keys are read where they lie, by all tokens that see it at once.

What a token sees are *parts*: its own conversation up to it, the header, and some cartridges. Softmax attention over
all of them is the sum of what each part's exponentials give, over their sum. So each part is one batched product over
the rows that see it. No cartridge is gathered for every conversation, or multiplied with rows that may not see it:
the cost follows what is visible. The backward pass uses the weights kept by the forward one, and computes gradients
only of cartridges that learn, from the rows that they learn from.

Work on whole matrices of scores costs as much as the products, so little of it is left. Keys carry a column of ones,
which meets minus a row's *reference* in the queries: exponentials come out relative to it. Values carry one too,
which gives their sums. Softmax is the same for any reference, but for rounding in bfloat16, which is the finer the
nearer the reference is to the highest score; the row's highest score in the header, the attention sink, is at hand
and keeps exponentials in range nearly always. Rows where it does not get their true maximum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cas.model.attention import Batch, causal_mask, packed_positions
from cas.model.positions import Layout, Rope

PADDING = 2.0  # own tokens of a group of conversations are padded to at most so many times the shortest one's
SPARE = 2  # columns behind the head dimension: the one described above, and one that keeps their number even
HEADER = ""


@dataclass(frozen=True)
class _Prefix:
    """The header or a cartridge, as some rows see it."""

    name: str
    rows: Tensor | slice  # [R] of the packed tokens; a slice where they follow each other, which copies less
    turn: int  # by how many positions its keys are turned
    positions: Tensor  # [P] where its keys stand
    learns_from: slice | Tensor | None = None  # which of its R rows give it a gradient; None: all

    def take(self, x: Tensor, kv_heads: int) -> Tensor:
        """The part's rows of x [Q, N, C] as [H, rep * R, C]: query heads that share a key head side by side."""
        x = x[:, self.rows] if isinstance(self.rows, slice) else x.index_select(1, self.rows)
        return x.reshape(kv_heads, -1, x.shape[2])

    def learned(self, x: Tensor, heads: int) -> Tensor:
        """Of x [H, rep * R, C], those of the rows that give the cartridge a gradient. ``heads``: H * rep."""
        if self.learns_from is None:
            return x
        return x.view(heads, -1, x.shape[2])[:, self.learns_from].reshape(len(x), -1, x.shape[2])

    def add(self, total: Tensor, x: Tensor) -> None:
        """Add x [H, rep * R, C] to the part's rows of total [Q, N, C]."""
        x = x.view(total.shape[0], -1, x.shape[2]).to(total.dtype)
        if isinstance(self.rows, slice):
            total[:, self.rows].add_(x)
        else:
            total.index_add_(1, self.rows, x)

    def raise_to(self, highest: Tensor, top: Tensor) -> None:
        """Raise the part's rows of highest [Q, N] to top [H, rep * R]."""
        highest[:, self.rows] = torch.maximum(highest[:, self.rows], top.reshape(highest.shape[0], -1))


@dataclass(frozen=True)
class _Own:
    """Conversations of similar length, padded to the longest: each sees its own tokens."""

    rows: Tensor  # [B * T] rows of the packed tokens, 0 where padded
    size: int  # B
    inside: Tensor  # the real ones among them
    positions: Tensor  # [B, T]; padding keeps counting
    bias: Tensor  # [B, 1, T, T], 0 or -inf: causal, and padding sees nothing

    def take(self, x: Tensor, kv_heads: int) -> Tensor:
        """The group's rows of x [Q, N, C] as [H * B, rep * T, C]; of keys and values, whose Q is H, as [H * B, T,
        C]."""
        x = x.index_select(1, self.rows)
        x = x.view(kv_heads, -1, self.size, x.shape[1] // self.size, x.shape[2]).transpose(1, 2)
        return x.reshape(kv_heads * self.size, -1, x.shape[4])

    def add(self, total: Tensor, x: Tensor) -> None:
        """Add x, in that shape and 0 where padded, to the group's rows of total [Q, N, C]."""
        total.index_add_(1, self.rows, self._flat(x, total.shape[0]).to(total.dtype))

    def raise_to(self, highest: Tensor, top: Tensor) -> None:
        """Raise the real rows of highest [Q, N] to top [H * B, rep * T]."""
        rows, top = self.rows[self.inside], self._flat(top[..., None], highest.shape[0])[:, self.inside, 0]
        highest.index_copy_(1, rows, torch.maximum(highest.index_select(1, rows), top))

    def _flat(self, x: Tensor, heads: int) -> Tensor:
        t = len(self.rows) // self.size
        x = x.view(-1, self.size, x.shape[1] // t, t, x.shape[2]).transpose(1, 2)
        return x.reshape(heads, -1, x.shape[4])


_Part = _Prefix | _Own


class CpuAttention:
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
        kv = {HEADER: header, **{name: cartridges[name] for name in used}}
        self.layers: dict[str, tuple[Tensor, ...]] = {name: _Layers.apply(x, dtype) for name, x in kv.items()}
        self.learning = [name for name in used if cartridges[name].requires_grad]
        self.rope = rope
        self.positions = packed_positions(batch, sizes, layout)[0].to(device)
        seen_at: dict[tuple[str, int], list[int]] = {}
        starts = batch.starts()
        for number, seen in enumerate(batch.visible):
            for name, shift in zip(seen, layout.shifts([sizes[n] for n in seen]), strict=True):
                seen_at.setdefault((name, shift), []).append(number)
        self.prefixes = [_Prefix(HEADER, slice(None), 0, torch.arange(header.shape[3], device=device))]
        for (name, shift), numbers in sorted(seen_at.items()):
            rows = [range(starts[n], starts[n] + batch.lengths[n]) for n in numbers]
            learns = [batch.learns(n, name) for n in numbers for _ in range(batch.lengths[n])]
            learns_from = None if all(learns) else _rows([i for i, one in enumerate(learns) if one], device)
            placed = torch.arange(sizes[name], device=device) + layout.header + shift
            self.prefixes.append(_Prefix(name, _rows([i for r in rows for i in r], device), shift, placed, learns_from))
        self.own = [self._own(members, batch.lengths, starts) for members in similar_lengths(batch.lengths)]
        self.parts: list[_Part] = [*self.prefixes, *self.own]
        self._biases: dict[tuple[int, int], Tensor | None] = {}

    def _own(self, members: Sequence[int], lengths: Sequence[int], starts: Sequence[int]) -> _Own:
        t, device = max(lengths[i] for i in members), self.positions.device
        rows, positions = torch.zeros(2, len(members), t, dtype=torch.long)
        inside = torch.zeros(len(members), t, dtype=torch.bool)
        for b, i in enumerate(members):
            rows[b, : lengths[i]] = torch.arange(starts[i], starts[i] + lengths[i])
            inside[b, : lengths[i]] = True
            positions[b] = self.positions[starts[i]].cpu() + torch.arange(t)
        real = inside.flatten().nonzero()[:, 0].to(device)
        bias = self._hiding(
            inside[:, None, :, None].to(device) & torch.ones(t, t, dtype=torch.bool, device=device).tril()
        )
        return _Own(rows.flatten().to(device), len(members), real, positions.to(device), bias)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        leaves = [self.layers[name][layer] for name in self.learning]
        out: Tensor = _Attention.apply(query[0], key[0], value[0], self, layer, scale, window, *leaves)
        return out[None]

    def keys_values(self, part: _Part, layer: int, own: Tensor) -> tuple[Tensor, Tensor]:
        """What a part's rows see: of a prefix where it stands, [H, P, C]; of conversations, out of ``own`` [2, H, N,
        C], their own keys and values, [H * B, T, C]."""
        if isinstance(part, _Own):
            return part.take(own[0], own.shape[1]), part.take(own[1], own.shape[1])
        keys, values = self.layers[part.name][layer].detach()
        return self.turned(keys, part.turn, layer), values

    def turned(self, keys: Tensor, by: int, layer: int) -> Tensor:
        """Keys [H, P, C] moved by so many positions; gradients are moved back by as many."""
        return self.rope.shift(keys, torch.full(keys.shape[1:2], by), layer) if by else keys

    def scores(self, number: int, query: Tensor, keys: Tensor, window: int | None) -> Tensor:
        """Of the number-th part's rows, less their reference, -inf where they may not see."""
        part, scores = self.parts[number], torch.bmm(query, keys.transpose(1, 2))
        bias = self._bias(number, window)
        if bias is not None:
            heads = (len(scores) // part.size, part.size) if isinstance(part, _Own) else (len(scores),)
            scores.view(*heads, -1, *bias.shape[-2:]).add_(bias)  # [H, B, rep, T, T], or of a prefix [H, rep, R, P]
        return scores

    def _bias(self, number: int, window: int | None) -> Tensor | None:
        part = self.parts[number]
        if window is None:
            return part.bias if isinstance(part, _Own) else None
        if (number, window) not in self._biases:
            if isinstance(part, _Own):
                seen = causal_mask(part.positions, part.positions, window)[:, None]
                self._biases[number, window] = part.bias + self._hiding(seen)
            else:
                seen = causal_mask(self.positions[part.rows], part.positions, window)
                self._biases[number, window] = None if bool(seen.all()) else self._hiding(seen)
        return self._biases[number, window]

    def _hiding(self, seen: Tensor) -> Tensor:
        return self.layers[HEADER][0].new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)


def _rows(numbers: list[int], device: torch.device) -> Tensor | slice:
    """Rising row numbers; a slice where they follow each other."""
    if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:
        return slice(numbers[0], numbers[-1] + 1)
    return torch.tensor(numbers, dtype=torch.long, device=device)


def _with_ones(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[..., D] -> [..., D + SPARE] in this dtype, with ones in the first of the new columns."""
    d = x.shape[-1]
    padded = x.new_empty((*x.shape[:-1], d + SPARE), dtype=dtype)
    padded[..., :d], padded[..., d], padded[..., d + 1 :] = x, 1, 0
    return padded


class _Layers(torch.autograd.Function):
    """[L, 2, H, P, D] -> L tensors [2, H, P, D + SPARE] of another dtype; one copy forward and one backward."""

    @staticmethod
    def forward(ctx: Any, kv: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
        ctx.cas = kv.shape, kv.dtype
        return _with_ones(kv, dtype).unbind(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        shape, dtype = ctx.cas
        gradient = gradients[0].new_empty(shape, dtype=dtype)
        for layer, x in enumerate(gradients):
            gradient[layer] = x[..., : shape[-1]]
        return gradient, None


def similar_lengths(lengths: Sequence[int]) -> list[list[int]]:
    """Conversations in groups of similar length."""
    groups: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if not groups or lengths[i] > PADDING * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(i)
    return groups


class _Attention(torch.autograd.Function):
    """CpuAttention softmax attention of packed tokens: query [Q, N, D], key and value [H, N, D] -> [N, Q, D].

    Gradients flow to query, key, value and to the layers of learning cartridges, [2, H, P, D + SPARE] each, in their
    order.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        context: CpuAttention,
        layer: int,
        scale: float,
        window: int | None,
        *leaves: Tensor,
    ) -> Tensor:
        (heads, n, d), kv_heads = query.shape, key.shape[0]
        asked = query.new_zeros(heads, n, d + SPARE)
        torch.mul(query, scale, out=asked[..., :d])
        own = _with_ones(torch.stack([key, value]), key.dtype)
        header = context.keys_values(context.prefixes[0], layer, own)[0]
        top = context.scores(0, context.prefixes[0].take(asked, kv_heads), header, window).amax(-1)
        asked[..., d] = -top.view(heads, n)
        weights, total = _exponentials(context, asked, own, layer, window)
        sums = total[..., d]
        wrong = ~((sums > 1e-30) & (sums < 1e30))
        if bool(wrong.any()):
            asked[..., d] = torch.where(wrong, -_maximum(context, asked, own, layer, window), asked[..., d])
            weights, total = _exponentials(context, asked, own, layer, window)
        out = (total[..., :d] / total[..., d, None]).to(query.dtype)
        ctx.save_for_backward(asked, own, out, total[..., d].contiguous(), *weights)
        ctx.cas = (context, layer, scale)
        return out.transpose(0, 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        asked, own, out, sums, *weights = ctx.saved_tensors
        context, layer, scale = ctx.cas
        kv_heads, d = own.shape[1], out.shape[2]
        # A score's gradient is its softmax times (what its value would give - what the row got). The spare column of
        # ones in the values subtracts the latter; a row's weights are its softmax times its sum.
        given = torch.zeros_like(asked)
        grad = torch.mul(gradients[0].transpose(0, 1), sums.reciprocal().to(asked.dtype)[..., None], out=given[..., :d])
        given[..., d] = -(grad * out).sum(-1)
        by_query = torch.zeros_like(asked)
        by_own = torch.zeros_like(own)
        by_cartridge: dict[str, Tensor] = {}
        for part, kept in zip(context.parts, weights, strict=True):
            keys, values = context.keys_values(part, layer, own)
            by_given = part.take(given, kv_heads)
            by_scores = torch.bmm(by_given, values.transpose(1, 2)).mul_(kept)
            part.add(by_query, torch.bmm(by_scores, keys))
            if isinstance(part, _Prefix) and part.name not in context.learning:
                continue
            by_asked = part.take(asked, kv_heads)
            if isinstance(part, _Prefix):
                by_scores, by_asked, kept, by_given = (
                    part.learned(x, len(asked)) for x in (by_scores, by_asked, kept, by_given)
                )
            by_keys = torch.bmm(by_scores.transpose(1, 2), by_asked)
            by_values = torch.bmm(kept.transpose(1, 2), by_given)
            if isinstance(part, _Own):
                part.add(by_own[0], by_keys)
                part.add(by_own[1], by_values)
                continue
            by_kv = torch.stack([context.turned(by_keys, -part.turn, layer), by_values])
            by_cartridge[part.name] = by_cartridge[part.name] + by_kv if part.name in by_cartridge else by_kv
        others = (by_cartridge[name] for name in context.learning)
        return (by_query[..., :d] * scale, by_own[0, ..., :d], by_own[1, ..., :d], None, None, None, None, *others)


def _exponentials(
    context: CpuAttention, asked: Tensor, own: Tensor, layer: int, window: int | None
) -> tuple[list[Tensor], Tensor]:
    """Every part's weights, exponentials of scores, and float32 [Q, N, D + SPARE]: what they give, and their sums."""
    total, found = torch.zeros(asked.shape, dtype=torch.float32, device=asked.device), []
    for number, part in enumerate(context.parts):
        keys, values = context.keys_values(part, layer, own)
        weights = context.scores(number, part.take(asked, own.shape[1]), keys, window).exp_()
        part.add(total, torch.bmm(weights, values))
        found.append(weights)
    return found, total


def _maximum(context: CpuAttention, asked: Tensor, own: Tensor, layer: int, window: int | None) -> Tensor:
    """Every row's highest score, [Q, N]."""
    plain = asked.clone()
    plain[..., -SPARE] = 0
    highest = torch.full_like(asked[..., 0], -torch.inf)
    for number, part in enumerate(context.parts):
        keys, _ = context.keys_values(part, layer, own)
        part.raise_to(highest, context.scores(number, part.take(plain, own.shape[1]), keys, window).amax(-1))
    return highest
