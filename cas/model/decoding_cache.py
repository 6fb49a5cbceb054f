"""The KV cache of a batch that is decoded, and its attention context.

Slots without a row of their own repeat another row or hold padding. Rows that have ended stay in their slots until an
eighth of the slots can be saved. Prompts end in the same column of the cache, so that all rows write their next key
into the same one; positions are explicit, so padding does not shift them. Equal prompts are read once, packed without
padding.

Shape legend: G groups, R slots of a group, B = G * R, H key/value heads, N own tokens so far, D head dimension.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from cas.model.decoding_attention import Prefill, Prefix, Prompt, attention, group_rows, hide
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

# On a CPU and on a GPU: tokens that one forward pass of prompts takes (more would leave a CPU's caches), and scores
# it holds.
PREFILL_TOKENS = 512, 1 << 15
PREFILL_SCORES = 1 << 22, 1 << 27


class Decoding:
    """A batch of prompts with their KV cache; the attention context of its decoding steps."""

    first: Tensor  # [B] column of a slot's first token
    offset: Tensor  # [B] from a column to a position

    def __init__(
        self,
        model: FrozenModel,
        prompts: Mapping[int, Prompt],
        cartridges: Mapping[str, Tensor],
        layout: Layout,
        room: int,
        watch: bool = False,
    ) -> None:
        """``prompts``: by their row numbers; ``room``: how many tokens will be decoded behind them, or after how many the
        cache grows by as many; ``watch``: add up the attention shares."""
        self.model, self.cartridges, self.layout, self.room, self.watch = model, cartridges, layout, room, watch
        self.prompts = dict(prompts)
        self.rows = list(prompts)  # those that go on
        self.starts = {row: layout.token_start(self._sizes(prompt)) for row, prompt in prompts.items()}
        self.last_position = max(self.starts[row] + len(prompt.tokens) for row, prompt in prompts.items()) + room - 1
        self.end = max(len(prompt.tokens) for prompt in prompts.values())  # columns of the cache that are filled
        self._lay_out()
        for row, slot in self.slot_of.items():
            n = len(prompts[row].tokens)
            self.first[slot], self.offset[slot] = self.end - n, self.starts[row] + n - self.end
        self.first, self.offset = self.first.to(model.device), self.offset.to(model.device)

    def __len__(self) -> int:
        return len(self.rows)

    def _sizes(self, prompt: Prompt) -> list[int]:
        return [self.cartridges[name].shape[3] for name in prompt.cartridges]

    def _lay_out(self) -> None:
        """Groups, slots and prefixes of the rows, with an empty cache."""
        prompts = [self.prompts[row] for row in self.rows]
        groups = group_rows([p.cartridges for p in prompts], max(sum(self._sizes(p)) for p in prompts))
        self.groups = [[self.rows[i] for i in group] for group in groups]
        self.prefix = Prefix(
            self.model, [prompts[group[0]].cartridges for group in groups], self.cartridges, self.layout
        )
        self._assign(max(map(len, groups)))
        slots = len(groups) * self.size
        # A slot without a row begins behind the prompts.
        self.first, self.offset = torch.full((slots,), self.end), torch.full((slots,), -self.end)
        self.own: dict[int, tuple[Tensor, Tensor]] = {}  # [G, H, R, N + room, D]
        self.columns = self.end + self.room
        self.shares = torch.zeros(slots, max(len(p.cartridges) for p in prompts) + 1, device=self.model.device)
        self.biases: dict[int | None, tuple[Tensor | None, Tensor | None]] = {}

    def _assign(self, size: int) -> None:
        """Give the rows slots, ``size`` to every group."""
        self.size = size  # R
        self.slot_of = {row: g * size + r for g, group in enumerate(self.groups) for r, row in enumerate(group)}
        self._find_slots()

    def _find_slots(self) -> None:
        slots = [self.slot_of[row] for row in self.rows]
        self.slots = torch.tensor(slots, device=self.model.device)
        self.in_order = slots == list(range(len(self.groups) * self.size))  # every slot has a row, in the rows' order

    def _slots(self, rows: Sequence[int]) -> Tensor:
        return torch.tensor([self.slot_of[row] for row in rows], device=self.model.device)

    def _cache(self, layer: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """The cache of a layer, whose padding is zero: it is read, but counts nothing."""
        if layer not in self.own:
            shape = (len(self.groups), like.shape[1], self.size, self.columns, like.shape[-1])
            self.own[layer] = like.new_empty(shape), like.new_empty(shape)
            for cache in self.own[layer]:
                cache[:, :, :, : self.end] = 0
        return self.own[layer]

    # -- reading the prompts ----------------------------------------------------------------------------------------

    def prefill(self) -> Tensor:
        """Read the prompts and fill the cache: next-token logits [rows, vocabulary] in the model's dtype."""
        logits = dict(self.read_prompts(dict.fromkeys(self.rows, 1)))
        return torch.cat([logits[row] for row in self.rows])

    def read_prompts(self, last: Mapping[int, int]) -> Iterator[tuple[int, Tensor]]:
        """Read the prompts, equal ones once, and fill the cache if there is room for answers.

        Args: last: by row, how many of its last tokens' logits are wanted.
        Yields: row, and its logits [last, vocabulary] in the model's dtype.
        """
        copies: dict[tuple[Prompt, int], list[int]] = {}
        for row, prompt in self.prompts.items():
            copies.setdefault((prompt, last[row]), []).append(row)
        starts = {prompt: self.starts[row] for row, prompt in self.prompts.items()}
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
        """Wanted rows in rectangles with little padding that one forward pass takes: number of the first group, rows
        by group."""
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
            for cache, x in zip(self._cache(layer, kv[0]), kv, strict=True):
                cache.permute(0, 2, 3, 1, 4)[slot // self.size, slot % self.size, column] = x[token]

    # -- decoding ---------------------------------------------------------------------------------------------------

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [rows, vocabulary] behind one more token [rows] of every row that goes on."""
        if self.end == self.columns:
            self.join()
        full = torch.zeros(len(self.first), 1, dtype=torch.long, device=self.first.device)
        full[self.slots, 0] = tokens.to(full.device)
        positions = self.offset[:, None] + self.end
        self.end += 1
        self.biases.clear()
        logits = self.model.forward(full, positions, self, rows=1)[:, 0]
        return logits if self.in_order else logits[self.slots]

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
        if not rows:
            return
        going = set(rows)
        groups = [[row for row in group if row in going] for group in self.groups]
        numbers = [g for g, group in enumerate(groups) if group]
        size = max(map(len, groups))
        if len(numbers) * size <= 0.875 * len(self.first):
            self._compact(numbers, [groups[g] for g in numbers], size)
        self._find_slots()

    def _compact(self, numbers: list[int], groups: list[list[int]], size: int) -> None:
        """Lay out these rows of these groups anew, with ``size`` slots each; a slot without a row repeats another."""
        device = self.first.device
        slots = self._slots([row for group in groups for row in group + group[:1] * (size - len(group))])
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
        self.groups = groups
        self._assign(size)

    def join(self, *others: Decoding) -> None:
        """Go on with the rows of all batches, which have the same cartridges, layout and room, in a cache that holds
        nothing of rows that have ended and has room again."""
        sources, rows = [], list[int]()
        for state in (self, *others):
            state.slots = state._slots(state.rows)
            sources.append(
                (state.rows, state.slots, state.size, state.end, state.first, state.offset, state.shares, state.own)
            )
            rows += state.rows
            del state.prefix  # before the new one takes memory
        for other in others:
            self.prompts |= other.prompts
            self.starts |= other.starts
        self.prompts = {row: self.prompts[row] for row in rows}
        self.starts = {row: self.starts[row] for row in rows}
        self.rows = rows
        self.end = max(end - int(first[slots].min()) for _, slots, _, end, first, *_ in sources)
        self._lay_out()
        self.first, self.offset = self.first.to(self.model.device), self.offset.to(self.model.device)
        for moved, old, old_size, end, first, offset, shares, own in sources:
            new = self._slots(moved)
            self.first[new] = first[old] - end + self.end
            self.offset[new] = offset[old] + end - self.end
            self.shares[new, : shares.shape[1]] = shares[old, : self.shares.shape[1]]
            width = min(end, self.end)
            for layer, kv in own.items():
                for cache, x in zip(self._cache(layer, kv[0]), kv, strict=True):
                    taken = x.transpose(1, 2)[old // old_size, old % old_size, :, end - width : end]
                    cache.transpose(1, 2)[new // self.size, new % self.size, :, self.end - width : self.end] = taken

    @property
    def used(self) -> int:
        """Columns that the longest row has filled."""
        return self.end - int(self.first[self.slots].min())

    def attention_shares(self, row: int, steps: int) -> dict[str, float]:
        """Mean share of the attention that the tokens a row read in so many steps paid to each of its cartridges."""
        if not (self.watch and steps):
            return {}
        shares = (self.shares[self.slot_of[row]] / steps).tolist()
        return dict(zip(self.prompts[row].cartridges, shares[1:], strict=False))
