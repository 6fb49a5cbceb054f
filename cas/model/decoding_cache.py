"""Prefixes, KV cache and attention of a batch that is decoded.

Rows with the same prefix form a group and read its keys and values in place, in one matrix product. A batch is a rectangle of G
groups with R slots each, so that one product serves all groups; slots without a row of their own repeat another row. Rows
that have ended stay in their slots until an eighth of the slots can be saved.

Prompts end in the same column of the cache, so that all rows write their next key into the same one; positions are explicit, so
padding does not shift them. Equal prompts are read once, packed without padding.

Shape legend: G groups, R slots of a group, B = G * R, H key/value heads, Q query heads, S prefix positions, T own tokens,
N own tokens so far, D head dimension, L layers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from cas.model.attention import causal_mask
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

PREFILL_TOKENS = (
    512,
    1 << 15,
)  # tokens that one forward pass of prompts takes, on a CPU (more leave its caches) and on a GPU
PREFILL_SCORES = 1 << 22, 1 << 27  # attention scores that it holds
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
    """Row numbers in groups with the same prefix of at most ``width`` positions; groups much larger than others are split."""
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
        names: Sequence[str],
        layout: Layout,
    ) -> None:
        """``names``: of all cartridges, numbered from 1 in ``owner``."""
        start, device = model.layout_header, model.device
        pool = torch.cat([model.header_kv, *(cartridges[name].to(device, model.dtype) for name in names)], dim=3)
        sizes = [cartridges[name].shape[3] for name in names]
        ends = torch.tensor([start, *sizes]).cumsum(0).tolist()
        numbers = {name: number for number, name in enumerate(names, start=1)}
        self.widths = [start + sum(sizes[numbers[name] - 1] for name in group) for group in groups]
        # Of every column its place in the pool, position, shift, and cartridge; padding repeats the first.
        columns, positions, shifts, owner = torch.zeros(4, len(groups), max(self.widths), dtype=torch.long)
        columns[:, :start] = positions[:, :start] = torch.arange(start)
        for g, group in enumerate(groups):
            at = start
            for name, shift in zip(group, layout.shifts([sizes[numbers[name] - 1] for name in group]), strict=True):
                number = numbers[name]
                size = sizes[number - 1]
                place = torch.arange(size)
                columns[g, at : at + size] = place + ends[number - 1]
                positions[g, at : at + size] = place + layout.header + shift
                shifts[g, at : at + size] = shift
                owner[g, at : at + size] = number
                at += size
        heads, length, dim = pool.shape[2:]
        rows = (columns[:, None] + length * torch.arange(heads)[:, None]).flatten().to(device)
        shape = (len(groups), heads, max(self.widths), dim)
        self.layers: list[tuple[Tensor, Tensor]] = []
        for layer, kv in enumerate(pool):
            keys, values = (x.flatten(0, 1).index_select(0, rows).view(shape) for x in kv)
            self.layers.append((model.rope.shift(keys, shifts[:, None], layer) if shifts.any() else keys, values))
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
    """Softmax attention over prefix and own tokens, whose keys and values are never put side by side; only the scores are.

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
    """Context of one forward pass that reads prompts, packed without padding; inside attention they are padded at the end to a
    rectangle of G groups with R of them each."""

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


class Decoding:
    """A batch of prompts with their KV cache; the attention context of its decoding steps."""

    def __init__(
        self,
        model: FrozenModel,
        prompts: Sequence[Prompt],
        cartridges: Mapping[str, Tensor],
        layout: Layout,
        room: int,
        watch: bool = False,
    ) -> None:
        """``room``: how many tokens will be decoded behind the prompts; ``watch``: add up the attention shares."""
        self.model, self.prompts, self.watch = model, prompts, watch
        self.names = list(dict.fromkeys(name for prompt in prompts for name in prompt.cartridges))
        sizes = {name: cartridges[name].shape[3] for name in self.names}
        width = max(sum(sizes[n] for n in prompt.cartridges) for prompt in prompts)
        self.groups = group_rows([prompt.cartridges for prompt in prompts], width)
        self.starts = [layout.token_start([sizes[n] for n in prompt.cartridges]) for prompt in prompts]
        seen = [prompts[group[0]].cartridges for group in self.groups]
        self.prefix = Prefix(model, seen, cartridges, self.names, layout)
        self.size = max(map(len, self.groups))  # R
        self.rows = list(range(len(prompts)))  # those that go on
        self.slot_of = {row: g * self.size + r for g, group in enumerate(self.groups) for r, row in enumerate(group)}
        self.slots = self._live()
        slots = len(self.groups) * self.size
        lengths = torch.zeros(slots, dtype=torch.long)
        starts = torch.zeros(slots, dtype=torch.long)
        for row, slot in self.slot_of.items():
            lengths[slot], starts[slot] = len(prompts[row].tokens), self.starts[row]
        self.end = int(lengths.max())  # columns of the cache that are filled
        self.room = room
        self.last_position = int((starts + lengths).max()) + room - 1
        self.first = (self.end - lengths).to(model.device)  # column of a slot's first token
        self.offset = starts.to(model.device) - self.first  # from a column to a position
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # [G, H, R, N + room, D]
        self.shares = torch.zeros(slots, len(self.names) + 1, device=model.device)
        self.watched = 0
        self.biases: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}

    # -- reading the prompts ----------------------------------------------------------------------------------------

    def prefill(self) -> Tensor:
        """Read the prompts and fill the cache: next-token logits [rows, vocabulary] in the model's dtype."""
        logits = dict(self.read_prompts([1] * len(self.prompts)))
        return torch.cat([logits[row] for row in self.rows])

    def read_prompts(self, last: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
        """Read the prompts, equal ones once, and fill the cache if there is room for answers.

        Args: last: of each prompt, how many of its last tokens' logits are wanted.
        Yields: row, and its logits [last, vocabulary] in the model's dtype.
        """
        copies: dict[tuple[Prompt, int], list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            copies.setdefault((prompt, last[row]), []).append(row)
        starts = dict(zip(self.prompts, self.starts, strict=True))
        first = {rows[0]: rows for rows in copies.values()}
        for start, block in self._rectangles(first):
            prefix = self.prefix.take(range(start, start + len(block)))
            context = Prefill(prefix, [[self.prompts[row] for row in rows] for rows in block], starts)
            members = [row for rows in block for row in rows]
            wanted = [torch.arange(end - last[row], end) for row, end in zip(members, context.ends, strict=True)]
            logits = self.model.forward(context.tokens, context.positions, context, rows=torch.cat(wanted))[0]
            if self.room:
                self._store(
                    context,
                    [
                        (row, end)
                        for first_row, end in zip(members, context.ends, strict=True)
                        for row in first[first_row]
                    ],
                )
            for row, scores in zip(members, logits.split([last[row] for row in members]), strict=True):
                yield from ((copy, scores) for copy in first[row])

    def _rectangles(self, wanted: Mapping[int, object]) -> Iterator[tuple[int, list[list[int]]]]:
        """Wanted rows in rectangles with little padding that one forward pass takes: number of the first group, rows by group."""
        on_gpu, heads = self.model.device.type == "cuda", self.model.geometry.query_heads
        width = self.prefix.positions.shape[1]

        def fits(block: list[list[int]]) -> bool:
            lengths = [len(self.prompts[row].tokens) for rows in block for row in rows]
            longest, slots = max(lengths), len(block) * max(map(len, block))
            scores = slots * longest * heads * (width + longest)
            little_padding = slots * longest <= 1.5 * sum(lengths) + 64
            return little_padding and sum(lengths) <= PREFILL_TOKENS[on_gpu] and scores <= PREFILL_SCORES[on_gpu]

        block: list[list[int]] = []
        start = 0
        for g, group in enumerate(self.groups):
            rows = sorted((row for row in group if row in wanted), key=lambda row: len(self.prompts[row].tokens))
            if block and (not rows or not fits([*block, rows])):
                yield start, block
                block = []
            while rows and not fits([*block, rows]):  # too many for one pass
                count = 1
                while count < len(rows) and fits([rows[: count + 1]]):
                    count += 1
                yield g, [rows[:count]]
                rows = rows[count:]
            if rows:
                start = start if block else g
                block.append(rows)
        if block:
            yield start, block

    def _store(self, context: Prefill, read: Sequence[tuple[int, int]]) -> None:
        """Put what the context read into the cache: rows, and where their prompts end among its tokens."""
        slots, columns, tokens = [], [], []
        for row, end in read:
            n = len(self.prompts[row].tokens)
            slots.append(torch.full((n,), self.slot_of[row]))
            columns.append(torch.arange(self.end - n, self.end))
            tokens.append(torch.arange(end - n, end))
        slot, column, token = (torch.cat(x).to(self.first.device) for x in (slots, columns, tokens))
        for layer, kv in context.kv.items():
            _, heads, d = kv[0].shape
            if layer not in self.own:
                shape = (len(self.groups), heads, self.size, self.end + self.room, d)
                self.own[layer] = kv[0].new_empty(shape), kv[1].new_empty(shape)
                for cache in self.own[layer]:  # padding is read, but counts nothing
                    cache[:, :, :, : self.end] = 0
            for cache, x in zip(self.own[layer], kv, strict=True):
                cache.permute(0, 2, 3, 1, 4)[slot // self.size, slot % self.size, column] = x[token]

    # -- decoding ---------------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [rows, vocabulary] behind one more token [rows] of every row that goes on."""
        full = torch.zeros(len(self.first), 1, dtype=torch.long, device=self.first.device)
        full[self.slots, 0] = tokens.to(full.device)
        positions = self.offset[:, None] + self.end
        self.end += 1
        self.biases.clear()
        logits = self.model.forward(full, positions, self, rows=1)[:, 0]
        self.watched += self.watch
        return logits if len(self.slots) == len(full) else logits[self.slots]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        keys, values = self.own[layer]
        groups, heads, rows, _, d = keys.shape
        keys[:, :, :, self.end - 1] = key.view(groups, rows, heads, d).transpose(1, 2)
        values[:, :, :, self.end - 1] = value.view(groups, rows, heads, d).transpose(1, 2)
        own = keys[:, :, :, : self.end], values[:, :, :, : self.end]
        if window not in self.biases:
            self.biases[window] = self._bias(window, key.dtype)
        out, weights = attention(query, own, self.prefix.layers[layer], scale, *self.biases[window])
        if self.watch:
            width = self.prefix.owner.shape[1]
            shares = weights[..., :width].mean((1, 3)).flatten(0, 1)
            owner = self.prefix.owner.repeat_interleave(self.size, 0)
            self.shares.scatter_add_(1, owner, shares / self.model.geometry.layers)
        return out

    def _bias(self, window: int | None, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Of own tokens and of the prefix, once a step for all layers with this window."""
        groups = len(self.groups)
        first = self.first if window is None else self.first.clamp(min=self.end - window)
        columns = torch.arange(self.end, device=first.device)
        own = hide(columns < first[:, None], dtype).view(groups, 1, self.size, 1, 1, self.end)
        positions = (self.offset + self.end - 1).view(groups, self.size, 1)
        return own, self.prefix.bias(positions, window, dtype)

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows alone, in their order before."""
        self.rows = list(rows)
        going = set(rows)
        groups = [[row for row in group if row in going] for group in self.groups]
        numbers = [g for g, group in enumerate(groups) if group]
        size = max(map(len, groups))
        if len(numbers) * size <= 0.875 * len(self.first):
            self._compact(numbers, [groups[g] for g in numbers], size)
        self.slots = self._live()

    def _compact(self, numbers: list[int], groups: list[list[int]], size: int) -> None:
        """Lay out these rows of these groups anew, with ``size`` slots each."""
        device = self.first.device
        padded = [row for group in groups for row in group + group[:1] * (size - len(group))]
        slots = torch.tensor([self.slot_of[row] for row in padded], device=device)
        for layer, (keys, values) in self.own.items():
            heads = keys.shape[1]
            place = slots.view(len(groups), 1, size)
            # From (group, head, slot) to its place among all of the cache before.
            flat = (place // self.size * heads + torch.arange(heads, device=device)[:, None]) * self.size
            flat = (flat + place % self.size).flatten()
            shape = (len(groups), heads, size, *keys.shape[3:])
            self.own[layer] = (
                keys.flatten(0, 2).index_select(0, flat).view(shape),
                values.flatten(0, 2).index_select(0, flat).view(shape),
            )
        if len(numbers) < len(self.groups):
            self.prefix = self.prefix.take(numbers)
        self.first, self.offset, self.shares = self.first[slots], self.offset[slots], self.shares[slots]
        self.groups, self.size = groups, size
        self.slot_of = {row: g * size + r for g, group in enumerate(groups) for r, row in enumerate(group)}

    def _live(self) -> Tensor:
        return torch.tensor([self.slot_of[row] for row in self.rows], device=self.model.device)

    def attention_shares(self, row: int) -> dict[str, float]:
        """Mean share of the attention that a row's decoded tokens paid to each cartridge; empty where not measured."""
        if not self.watched:
            return {}
        share = (self.shares[self.slot_of[row]] / self.watched).tolist()
        return dict(zip(self.names, share[1:], strict=True))
