"""Attention over [header ; visible cartridges ; own tokens], plugged into any Hugging Face decoder.

Hugging Face models look their attention function up by name and hand every extra keyword of ``forward`` on to it.
We pass an :class:`AttentionContext` as the keyword ``cas``, which the registered ``"sdpa"`` then calls: the context holds
the prefix and decides what every query may see, so that no model code of our own is needed. Nothing of the model changes,
so threads can share it; only models that are loaded with another attention are switched to ``"cas"`` meanwhile.

Shape legend: B batch, T own tokens, S prefix positions, H key/value heads, Q query heads, D head dimension, L layers.

:class:`Reference` computes one conversation at a time, with nothing shared or padded; for tests only. Training uses
:mod:`cas.model.attention_cpu` on a CPU and :mod:`cas.model.attention_gpu` on a GPU; decoding has its own context.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from cas.model.positions import Layout, Rope


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
    dropout: float = 0.0,
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
    if record is not None:  # the probe at load records the keywords too
        record(module.layer_idx, query, key, window, kwargs)
    return cas.attend(module.layer_idx, query, key, value, scale, window), None


_thread = threading.local()


@contextlib.contextmanager
def our_masks() -> Iterator[None]:
    """Inside, in this thread, transformers makes no masks: our contexts do. Other threads may use the same model."""
    before = getattr(_thread, "ours", False)
    _thread.ours = True
    try:
        yield
    finally:
        _thread.ours = before


def register() -> None:
    """Make ``"cas"`` known to transformers, and ``"sdpa"`` take the keyword ``cas`` (idempotent)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    functions, masks = AttentionInterface(), AttentionMaskInterface()
    if "cas" in functions:
        return
    sdpa, sdpa_mask = functions["sdpa"], masks["sdpa"]

    def attend(*arguments: Any, **options: Any) -> Any:
        return (cas_attention if options.get("cas") is not None else sdpa)(*arguments, **options)

    def mask(*arguments: Any, **options: Any) -> Any:
        return None if getattr(_thread, "ours", False) else sdpa_mask(*arguments, **options)

    AttentionInterface.register("cas", cas_attention)
    AttentionMaskInterface.register("cas", lambda *_, **__: None)
    AttentionInterface.register("sdpa", attend)
    AttentionMaskInterface.register("sdpa", mask)


def causal_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Visibility by position: key <= query, and within the sliding window if there is one.

    Args: query_positions [..., T] and key_positions [..., S], integer. Returns bool [..., T, S].
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    allowed = distance >= 0
    return allowed if window is None else allowed & (distance < window)


@dataclass(frozen=True)
class Batch:
    """Conversations packed one after the other without padding.

    Attributes:
        lengths: tokens of each conversation.
        visible: ids of the cartridges each conversation sees, in the order of loading.
        learner: the one cartridge that each conversation gives a gradient to; by default, all that it sees get one.
    """

    lengths: tuple[int, ...]
    visible: tuple[tuple[str, ...], ...]
    learner: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        assert len(self.lengths) == len(self.visible) == len(self.learner or self.visible)

    def learns(self, conversation: int, name: str) -> bool:
        """Whether a cartridge gets a gradient from a conversation that sees it."""
        return self.learner is None or self.learner[conversation] == name

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


class Reference:
    """What every fast path is tested against: one conversation at a time over exactly what it sees."""

    def __init__(
        self, batch: Batch, header: Tensor, cartridges: Mapping[str, Tensor], layout: Layout, rope: Rope
    ) -> None:
        self.batch, self.header, self.cartridges, self.layout, self.rope = batch, header, cartridges, layout, rope

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        outputs = []
        for number, (start, length) in enumerate(zip(self.batch.starts(), self.batch.lengths, strict=True)):
            seen = self.batch.visible[number]
            sizes = [self.cartridges[name].shape[3] for name in seen]
            keys, values = [self.header[layer, 0]], [self.header[layer, 1]]
            positions = [torch.arange(self.layout.header)]
            for name, shift in zip(seen, self.layout.shifts(sizes), strict=True):
                kv = self.cartridges[name][layer]
                kv = kv if self.batch.learns(number, name) else kv.detach()
                p = kv.shape[2]
                keys.append(self.rope.shift(kv[0], torch.full((p,), shift), layer))
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
