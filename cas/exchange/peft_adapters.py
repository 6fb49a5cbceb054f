"""PEFT's CARTRIDGE adapters: ``prompt_embeddings`` [p, 2 L H D], a view of (p, 2 L, H, D) with rows K0, V0, K1, V1, …"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from cas.exchange.files import dump, write_tensors
from cas.store.files import write_atomically, writing

if TYPE_CHECKING:
    from torch import Tensor

    from cas.exchange.prefix import Prefix

CONFIG, WEIGHTS, TENSOR, METADATA = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings", "cartridge"


def flatten(kv: Tensor) -> Tensor:
    """[L, 2, H, P, D] as PEFT has it: [P, 2 L H D]."""
    layers, _, heads, positions, dimension = kv.shape
    return kv.permute(3, 0, 1, 2, 4).reshape(positions, 2 * layers * heads * dimension)


def unflatten(rows: Tensor, layers: int, heads: int, dimension: int) -> Tensor:
    """The inverse of :func:`flatten`."""
    return rows.view(rows.shape[0], layers, 2, heads, dimension).permute(1, 2, 3, 0, 4).contiguous()


def write_adapter(prefix: Prefix, out: Path) -> None:
    """A folder that ``PeftModel.from_pretrained`` loads; the header becomes the frozen tokens."""
    layers, _, heads, positions, dimension = prefix.kv.shape
    config = {
        "peft_type": "CARTRIDGE",
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
        "base_model_name_or_path": prefix.about["model"],
        "revision": None,
        "num_virtual_tokens": positions,
        "num_frozen_tokens": prefix.header,
        "num_layers": layers,
        "num_attention_heads": heads,
        "token_dim": heads * dimension,
        "num_transformer_submodules": 1,
    }
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    write_tensors(out / WEIGHTS, {TENSOR: flatten(prefix.kv)}, {METADATA: dump(prefix.about)})
    write_atomically(out / CONFIG, (json.dumps(config, indent=2) + "\n").encode())
