"""Header and cartridges as one KV cache in float32, as other libraries take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cas.errors import ModelError, UserError
from cas.model.frozen import FrozenModel
from cas.model.positions import Rope

if TYPE_CHECKING:
    from cas.store.store import Store


@dataclass(frozen=True)
class Prefix:
    """The cache behind which a question stands.

    Attributes:
        ids: the documents, in their order. kv: float32 [L, 2, H, header + sum p, D] on the CPU, keys after RoPE.
        header: positions of the header, which come first. start: position of the question's first token.
        about: what a file records of it (JSON): model, fingerprint, header, positions, ids, titles.
    """

    ids: tuple[str, ...]
    kv: Tensor
    header: int
    start: int
    rope: Rope
    about: dict[str, Any]

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return int(self.kv.shape[3])

    def directly_in_front(self) -> Prefix:
        """The same for readers that count a question's position from the length of the cache: all keys are shifted until
        the question stands right behind them. Only distances matter to RoPE, so nothing but rounding changes."""
        if (by := self.length - self.start) == 0:
            return self
        kv = shift_keys(self.kv, by, self.rope)
        return replace(self, kv=kv, start=self.length, about={**self.about, "shifted": by})


def compose_prefix(model: FrozenModel, store: Store, ids: Sequence[str]) -> Prefix:
    """Header and cartridges in the order given, where the layout of their store places them.

    Raises: UserError for an id given twice; StoreMismatch for another model; CollectionError for an unknown id; ModelError
        for sliding windows, which other libraries count by cache index.
    """
    if len(set(ids)) < len(ids):
        raise UserError("the same id is given twice; name every document once")
    store.check_model(model)
    refuse_windows(model)
    cartridges = [store.cartridge(name) for name in ids]
    sizes = [kv.shape[3] for kv in cartridges]
    parts = [model.header_kv.float().cpu()]
    for kv, shift in zip(cartridges, store.layout.shifts(sizes), strict=True):
        parts.append(shift_keys(kv, shift, model.rope) if shift else kv)
    recorded = store.meta["model"]
    about = {
        "ids": list(ids),
        "titles": [store.answering_row(name).title for name in ids],
        "model": model_name(store),
        "fingerprint": recorded["fingerprint"],
        "rope": recorded["rope"],
        "header": model.layout_header,
        "positions": store.layout.policy,
    }
    return Prefix(
        tuple(ids), torch.cat(parts, dim=3), model.layout_header, store.layout.token_start(sizes), model.rope, about
    )


def refuse_windows(model: FrozenModel) -> None:
    """Raise ModelError for a model with sliding windows."""
    if any(window is not None for window in model.geometry.windows):
        raise ModelError(
            "other libraries place sliding windows by cache index, so cartridges of this model work in CAS only; "
            "export single ones with --format safetensors"
        )


def shift_keys(kv: Tensor, by: int, rope: Rope) -> Tensor:
    """[L, 2, H, S, D] with all keys moved by ``by`` positions, values as they are."""
    shift = torch.full((kv.shape[3],), by)
    keys = torch.stack([rope.shift(kv[layer, 0], shift, layer) for layer in range(kv.shape[0])])
    return torch.stack([keys, kv[:, 1]], dim=1)


def model_name(store: Store) -> str:
    """The name by which other libraries may load a store's model."""
    return str(store.meta["model"]["source"]["name"]).removeprefix("package:")
