"""Header and cartridges as one KV cache that plain transformers takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cas.errors import ModelError
from cas.model.frozen import FrozenModel
from cas.model.positions import Layout

if TYPE_CHECKING:
    from cas.store.store import Store


def compose(model: FrozenModel, store: Store, documents: Sequence[str]) -> Composed:
    """Header and these documents' cartridges as one KV cache, in the order given.

    Raises: StoreMismatch for another model than the store's; CollectionError for a document without cartridge.
    """
    store.check_model(model)
    return Composed(model, store.layout, {d: store.cartridge(d) for d in documents})


class Composed:
    """A set of loaded cartridges, in the order given.

    Attributes: kv: [L, 2, H, header + sum p, D] in the model's dtype, keys shifted to where the layout places them.
        start: position of the first token behind them.
    """

    def __init__(self, model: FrozenModel, layout: Layout, cartridges: Mapping[str, Tensor]) -> None:
        self.model, self.ids = model, tuple(cartridges)
        sizes = [kv.shape[3] for kv in cartridges.values()]
        parts = [model.header_kv]
        for kv, shift in zip(cartridges.values(), layout.shifts(sizes), strict=True):
            kv = kv.to(model.device, model.dtype)
            if shift:
                by = torch.full((kv.shape[3],), shift)
                keys = torch.stack([model.rope.shift(kv[layer, 0], by, layer) for layer in range(kv.shape[0])])
                kv = torch.stack([keys, kv[:, 1]], dim=1)
            parts.append(kv)
        self.kv = torch.cat(parts, dim=3)
        self.start = layout.token_start(sizes)

    def prompt(self, question: str) -> dict[str, Any]:
        """Arguments for ``model.hf.generate(**...)``: the cache, and a question behind it at the right positions.

        transformers expects ids for cached positions too: the first ``kv.shape[3]`` ones are never read.
        Raises: ModelError for a model with sliding windows, which transformers counts by cache index, not by position.
        """
        from transformers import DynamicCache

        windows = [w for w in self.model.geometry.windows if w is not None]
        template = self.model.template
        tokens = [*template.footer_ids, *self.model.encode(question), *template.suffix_ids]
        length = self.kv.shape[3]
        if windows:
            raise ModelError(
                "plain transformers places sliding windows by cache index; use cas.Answerer for this model"
            )
        device = self.model.device
        cache = DynamicCache([(layer[0][None].clone(), layer[1][None].clone()) for layer in self.kv])
        positions = [*range(length), *range(self.start, self.start + len(tokens))]
        ids = [template.header_ids[0]] * length + tokens
        return {
            "input_ids": torch.tensor([ids], device=device),
            "attention_mask": torch.ones(1, len(ids), dtype=torch.long, device=device),
            "position_ids": torch.tensor([positions], device=device),
            "past_key_values": cache,
        }
