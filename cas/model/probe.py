"""Attention contexts that measure a model: the shape of its KV cache, and keys and values themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cas.model.attention import causal_mask


@dataclass(frozen=True)
class Geometry:
    """Shape of the KV cache, as measured in a forward pass."""

    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocabulary: int
    windows: tuple[int | None, ...]  # per layer
    max_positions: int

    def elements(self, p: int) -> int:
        """Numbers in a cartridge of p positions."""
        return self.layers * 2 * self.kv_heads * p * self.head_dim


class Probe:
    """Standard causal attention that records what each layer passes."""

    def __init__(self) -> None:
        self.layers: dict[int, dict[str, Any]] = {}

    def record(self, layer: int, query: Tensor, key: Tensor, window: int | None, extra: dict[str, Any]) -> None:
        self.layers[layer] = {
            "query_heads": query.shape[1],
            "kv_heads": key.shape[1],
            "head_dim": key.shape[3],
            "window": window,
            "extra": {k for k, v in extra.items() if k in ("softcap", "s_aux") and v is not None},
            "key": key.detach(),
        }

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        position = torch.arange(query.shape[2], device=query.device)
        mask = causal_mask(position, position, window)
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
        )
        return out.transpose(1, 2)


class KVRecorder(Probe):
    """Records every layer's keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.kv: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None) -> Tensor:
        self.kv[layer] = (key[0].clone(), value[0].clone())
        return super().attend(layer, query, key, value, scale, window)
