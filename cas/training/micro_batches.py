"""The memory of one step: what its conversations keep for the backward pass, and how a step is split to bound that."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from cas.model.attention import Batch, packed_positions
from cas.model.attention_cpu import CpuAttention, similar_lengths
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

TOKENS_AT_ONCE = 512, 4096  # of a step, on a CPU and on a GPU: products are no faster with more

_measured: WeakKeyDictionary[FrozenModel, int] = WeakKeyDictionary()


def score_bytes(model: FrozenModel, lengths: Sequence[int], prefixes: Sequence[int]) -> int:
    """Bytes of the attention weights that all layers keep of packed conversations.

    Args: lengths: own tokens of each conversation; prefixes: positions that it sees, the header included.
    """
    g = model.geometry
    on_prefixes = sum(n * prefix for n, prefix in zip(lengths, prefixes, strict=True))
    on_own = sum(len(group) * max(lengths[i] for i in group) ** 2 for group in similar_lengths(lengths))
    return g.layers * g.query_heads * (on_prefixes + on_own) * model.dtype.itemsize


def kept_bytes(model: FrozenModel, lengths: Sequence[int], prefixes: Sequence[int]) -> int:
    """Bytes that forward keeps for backward of packed conversations; arguments as in :func:`score_bytes`."""
    return sum(lengths) * kept_per_token(model) + score_bytes(model, lengths, prefixes)


def most_kept(model: FrozenModel) -> int:
    """Bytes that a micro-batch of several conversations may keep."""
    return TOKENS_AT_ONCE[model.device.type == "cuda"] * kept_per_token(model)


def micro_batches(model: FrozenModel, lengths: Sequence[int], prefixes: Sequence[int]) -> list[slice]:
    """A step's conversations in consecutive parts that keep at most :func:`most_kept` each, or are one conversation.

    A pure function of model and conversations; no budget plays a part. Arguments as in :func:`score_bytes`.
    """
    parts, start, limit = list[slice](), 0, most_kept(model)
    for i in range(1, len(lengths)):
        if kept_bytes(model, lengths[start : i + 1], prefixes[start : i + 1]) > limit:
            parts.append(slice(start, i))
            start = i
    return [*parts, slice(start, len(lengths))]


def kept_per_token(model: FrozenModel) -> int:
    """Bytes that one token keeps for backward besides attention weights, measured in a forward pass of 32 tokens."""
    if model not in _measured:
        _measured[model] = _measure(model)
    return _measured[model]


def _measure(model: FrozenModel) -> int:
    g, size, lengths = model.geometry, 4, (16, 16)
    layout = Layout("fixed", model.layout_header, size)
    kv = torch.zeros(g.layers, 2, g.kv_heads, size, g.head_dim, device=model.device, requires_grad=True)
    batch, kept = Batch(lengths, (("a",), ("a",))), dict[int, int]()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.hf.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    context = CpuAttention(batch, model.header_kv, {"a": kv}, layout, model.rope, model.dtype)
    ids = torch.arange(sum(lengths))[None] % g.vocabulary
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        states = model.hidden(ids, packed_positions(batch, {"a": size}, layout), context)  # keeps the graph alive
    assert states.requires_grad
    scores = score_bytes(model, lengths, [model.layout_header + size] * 2)
    return max(1, (sum(kept.values()) - scores) // sum(lengths))
