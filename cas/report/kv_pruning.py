"""A baseline that needs no training: the KV cache of a text, pruned by kvpress where it is installed.

kvpress 0.5 requires an older transformers than ours, but works with ours when installed without its dependencies:
``pip install datasets pandas cachetools fire && pip install --no-deps kvpress``.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from cas.model.frozen import FrozenModel


def installed() -> bool:
    """Whether kvpress can be imported."""
    return find_spec("kvpress") is not None


@torch.no_grad()
def compress(model: FrozenModel, ids: Sequence[int], positions: int) -> Tensor:
    """The KV of a text after the header, pruned to ``positions`` in every head by Expected Attention (2510.00636).

    The header stays whole. Returns: [L, 2, H, positions, D] in the model's dtype, keys rotated as in the text.
    """
    from kvpress import ExpectedAttentionPress
    from transformers import DynamicCache

    header = model.layout_header

    class Press(ExpectedAttentionPress):
        def score(self, *args: Any, **kwargs: Any) -> Tensor:
            scores: Tensor = super().score(*args, **kwargs)
            scores[:, :, :header] = torch.inf
            return scores

    whole = torch.tensor([[*model.template.header_ids, *ids]], device=model.device)
    length, keep = whole.shape[1], header + min(positions, len(ids))
    cache: Any = DynamicCache()
    # Half a position more than wanted, as kvpress rounds down. It needs cache_position, which transformers no longer
    # passes.
    with Press(compression_ratio=max(0.0, 1 - (keep + 0.5) / length))(model.hf):
        model.hf.base_model(
            input_ids=whole,
            past_key_values=cache,
            use_cache=True,
            cache_position=torch.arange(length, device=model.device),
        )
    kept = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers])
    assert kept.shape[3] == keep
    return kept[:, :, :, header:]  # positions are sorted by score, and the header has the highest
