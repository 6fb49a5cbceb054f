"""Attention contexts that measure a model: the shape of its KV cache, and keys and values themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cas.errors import ModelError
from cas.model.attention import causal_mask
from cas.model.loading import first_line


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
        self.layers[layer]["scale"] = scale
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


def refuse_unsupported(hf: Any) -> None:
    """Raise ModelError for an architecture whose configuration says that it cannot carry cartridges."""
    config = hf.config.get_text_config()
    kind = config.model_type
    if getattr(hf.config, "is_encoder_decoder", False):
        raise ModelError(f"{kind}: an encoder-decoder has no single KV cache; use a decoder-only model")
    if not getattr(config, "rope_parameters", None):
        raise ModelError(f"{kind}: no rotary position embedding (RoPE); cartridges need keys that can be placed")
    parameters = config.rope_parameters
    per_type = [v for v in parameters.values() if isinstance(v, dict)] or [parameters]
    for entry in per_type:
        if entry.get("rope_type", "default") in ("dynamic", "longrope"):
            raise ModelError(
                f"{kind}: RoPE type {entry['rope_type']!r} depends on the length of the text, "
                "so stored keys would change meaning"
            )
    types = set(getattr(config, "layer_types", None) or ["full_attention"])
    if not types <= {"full_attention", "sliding_attention"}:
        raise ModelError(f"{kind}: layers of type {', '.join(sorted(types))} keep no plain KV cache")


def refuse_without_gradients(hf: Any) -> None:
    """Raise ModelError where gradients do not pass through the layers, as with some quantized ones."""
    embedded = hf.get_input_embeddings()(torch.arange(4, device=hf.device)[None]).detach().requires_grad_()
    try:
        hf(inputs_embeds=embedded, use_cache=False).logits.float().square().mean().backward()
    except Exception as error:  # kernels fail in many ways
        raise ModelError(f"{hf.config.model_type}: quantized layers give no gradients ({first_line(error)})") from error
    if embedded.grad is None or not bool(embedded.grad.any()):
        raise ModelError(f"{hf.config.model_type}: quantized layers give no gradients, which training cartridges needs")


def rotary(hf: Any) -> tuple[tuple[Tensor, ...], list[float]]:
    """Rotary frequencies of every layer, float32 [R/2], and the factors that scale the rotated keys (yarn).

    Raises: ModelError where there are none.
    """
    config = hf.config.get_text_config()
    modules = [m for n, m in hf.named_modules() if n.endswith("rotary_emb")]
    if not modules:
        raise ModelError(f"{config.model_type}: found no rotary embedding module")
    frequencies = []
    for kind in getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers:
        buffer = getattr(modules[0], f"{kind}_inv_freq", None)
        buffer = buffer if buffer is not None else getattr(modules[0], "inv_freq", None)
        if buffer is None:
            raise ModelError(f"{config.model_type}: found no rotary frequencies for {kind} layers")
        frequencies.append(buffer.detach().float().cpu())
    scales = [float(v) for name, v in sorted(vars(modules[0]).items()) if name.endswith("attention_scaling")]
    return tuple(frequencies), scales
