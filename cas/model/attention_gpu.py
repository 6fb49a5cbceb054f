"""Attention for training on a GPU: header and residents are one prefix; a block mask says who sees what.

Keys stand in columns: the header, every resident cartridge, then the packed conversations. A FlexAttention block mask
says for every 128 x 128 block whether its rows see all of it, some, or nothing. Blocks that no row sees are skipped,
forward and backward, so cost depends on what is visible, not on what is resident. Tokens and columns are padded to a
few sizes, so that kernels are compiled at the start and not again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cas.model.attention import Batch, packed_positions
from cas.model.positions import Layout

BLOCK = 128


def padded(count: int, block: int = BLOCK) -> int:
    """The next of eight sizes per doubling, a multiple of the block."""
    step = max(block, 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


class GpuAttention:
    """The context of a training step over packed conversations (batch size 1); not for shifted keys."""

    def __init__(
        self,
        batch: Batch,
        header: Tensor,
        cartridges: Mapping[str, Tensor],
        layout: Layout,
        dtype: torch.dtype,
        block: int = BLOCK,
    ) -> None:
        assert layout.policy != "sequential", "shifted keys cannot be shared between conversations"
        self.block, self.device = block, header.device
        sizes = {name: kv.shape[3] for name, kv in cartridges.items()}
        # One cast and one unbind each: autograd would fill a zero tensor for every slice of a leaf.
        parts = [part.to(dtype) for part in (header, *cartridges.values())]
        numbers = {(name, True): i for i, name in enumerate(cartridges, start=1)}
        # Conversations that do not teach a cartridge see it in columns of its own, which get no gradient.
        for row, seen in enumerate(batch.visible):
            for name in seen:
                part = parts[numbers[name, True]]
                if (name, False) not in numbers and part.requires_grad and not batch.learns(row, name):
                    numbers[name, False] = len(parts)
                    parts.append(part.detach())
        lengths = [part.shape[3] for part in parts]
        self.prefix = [part.unbind(0) for part in parts]
        end = sum(lengths)
        self.start = padded(end, block)  # the column of the first token
        self.tokens = padded(sum(batch.lengths), block)
        # Who sees what: rows are conversations and, last, padding; columns are the header, cartridges, padding.
        sees = torch.zeros(len(batch.lengths) + 1, len(parts) + 1, dtype=torch.bool)
        sees[:, 0] = True  # padding sees the header: a row that sees nothing has no softmax
        for row, seen in enumerate(batch.visible):
            for name in seen:
                sees[row, numbers.get((name, batch.learns(row, name)), numbers[name, True])] = True
        column_sizes = torch.tensor([*lengths, self.start - end])
        column = torch.arange(len(parts) + 1).repeat_interleave(column_sizes)
        rows = torch.tensor([*batch.lengths, self.tokens - sum(batch.lengths)])
        owner = torch.arange(len(rows)).repeat_interleave(rows)
        place = torch.cat([torch.arange(n) for n in (*lengths, self.start - end)])
        place[header.shape[3] :] += layout.header
        own = pad(packed_positions(batch, sizes, layout)[0], (0, self.tokens - sum(batch.lengths)))
        self.blocks = _blocks(sees, column, owner, block)
        tables = (sees, pad(column, (0, self.tokens)), pad(owner, (self.start, 0)), owner, own, torch.cat([place, own]))
        self.tables = [table.to(self.device) for table in tables]
        self.masks: dict[int | None, Any] = {}

    def allowed(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Whether a row sees a column, as FlexAttention asks."""
        sees, column, column_owner, owner, position, placed = self.tables
        start = self.start

        def mask(_batch: Tensor, _head: Tensor, row: Tensor, key: Tensor) -> Tensor:
            token = key >= start
            itself = (column_owner[key] == owner[row]) & (key - start <= row)
            seen = torch.where(token, itself, sees[owner[row], column[key]])
            # Packed conversations share positions: only a window depends on them.
            return seen if window is None else seen & (position[row] - placed[key] < window)

        return mask

    def mask(self, window: int | None) -> Any:
        """The block mask of layers with this window."""
        from torch.nn.attention.flex_attention import BlockMask

        if window not in self.masks:
            some, whole = self.blocks
            if window is not None:  # a window may cut any block
                some, whole = some | whole, torch.zeros_like(whole)
            partly, fully = (_ordered(blocks, self.device) for blocks in (some, whole))
            self.masks[window] = BlockMask.from_kv_blocks(
                *partly,
                *fully,
                BLOCK_SIZE=self.block,
                mask_mod=self.allowed(window),
                seq_lengths=(self.tokens, self.start + self.tokens),
            )
        return self.masks[window]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        n, behind = query.shape[2], self.start - sum(part[layer].shape[2] for part in self.prefix)
        heads, width = key.shape[1], key.shape[3]
        gap, rest = key.new_zeros(heads, behind, width), key.new_zeros(heads, self.tokens - n, width)
        keys, values = (
            torch.cat([*(part[layer][i] for part in self.prefix), gap, own[0], rest], dim=1)[None]
            for i, own in enumerate((key, value))
        )
        out: Tensor = _kernel(query.device.type)(
            pad(query, (0, 0, 0, self.tokens - n)),
            keys,
            values,
            block_mask=self.mask(window),
            scale=scale,
            enable_gqa=True,
        )
        return out[:, :, :n].transpose(1, 2)


def _blocks(sees: Tensor, column: Tensor, owner: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Blocks of which some pairs may attend, and those of which all do, [rows, columns] each of 0 and 1, without
    building the mask itself: what a block of rows sees is known from its conversations."""
    rows = _one_hot(owner, len(sees), block)  # [blocks, conversations]: which ones have a row there
    columns = _one_hot(column, sees.shape[1], block)
    seen = sees.float()
    any_prefix = (rows @ seen @ columns.T) > 0
    all_prefix = (rows @ (1 - seen) @ columns.T) == 0
    earlier = torch.ones(len(rows), len(rows), dtype=torch.bool).tril_()
    any_own = ((rows @ rows.T) > 0) & earlier
    alone = rows.sum(1) == 1
    all_own = any_own & alone[:, None] & alone & earlier.tril(-1)
    some, whole = torch.cat([any_prefix, any_own], dim=1), torch.cat([all_prefix, all_own], dim=1)
    return some & ~whole, whole


def _one_hot(numbers: Tensor, count: int, block: int) -> Tensor:
    """[blocks, count]: 1 where a number occurs in a block."""
    occurs = torch.zeros(len(numbers) // block, count)
    occurs[torch.arange(len(numbers)) // block, numbers] = 1
    return occurs


def _ordered(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Per row of blocks, how many are set and the indices of all, set ones first: [1, 1, R] and [1, 1, R, C]."""
    order = blocks.int().argsort(dim=1, descending=True, stable=True)
    return (
        blocks.sum(1, dtype=torch.int32)[None, None].to(device),
        order.to(torch.int32)[None, None].contiguous().to(device),
    )


@cache
def _kernel(device: str) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if device == "cpu" else torch.compile(flex_attention, dynamic=True)
