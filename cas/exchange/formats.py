"""``cas export``: cartridges for other libraries, each format with exactly what it can represent."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cas.errors import UserError
from cas.exchange.files import dump, write_tensors
from cas.model.positions import MULTIPLE
from cas.store.files import write_atomically, writing

if TYPE_CHECKING:
    from torch import Tensor

    from cas.exchange.prefix import Prefix
    from cas.model.frozen import FrozenModel
    from cas.store.store import Store

Format = Literal["safetensors", "peft", "transformers", "tokasaurus"]
PAGE = 16  # positions in a page of Tokasaurus


def export(
    store: Store, ids: Sequence[str], out: Path, kind: Format, load_model: Callable[[Store], FrozenModel]
) -> list[str]:
    """Write documents' cartridges to ``out``, a file or a folder as the format has it (docs/exchange.md).

    Args: load_model: loads the store's model; not called for a single cartridge as safetensors, which has no header.
    Returns: lines for the user. Raises: UserError for what the format cannot represent; StoreError if writing fails.
    """
    if not ids:
        raise UserError("name what to export: cas export ID... OUT")
    if kind in ("safetensors", "transformers") and out.suffix != ".safetensors":
        raise UserError(f"{out}: name the file *.safetensors")
    if kind in ("peft", "tokasaurus") and out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; --format {kind} writes a folder")
    if kind == "safetensors" and len(ids) == 1:
        store.export(ids[0], out)
        return [f"{ids[0]} -> {out}"]
    for name in ids:  # before a model is loaded
        store.answering_row(name)
    from cas.exchange.prefix import compose_prefix

    model = load_model(store)
    prefix = compose_prefix(model, store, ids)
    named = " ".join(ids)
    if kind == "safetensors":
        write_tensors(out, {"kv": prefix.kv}, {"cartridge": dump({**prefix.about, "start": prefix.start})})
        return [f"{named} -> {out}"]
    if kind == "transformers":
        _transformers(prefix, model, out)
        return [f"{named} -> {out} and {out.with_suffix('.json')}"]
    lines = []
    if (by := prefix.length - prefix.start) != 0:
        lines.append(f"all keys are shifted by {by} positions, so that the question stands directly behind the cache")
    if kind == "peft":
        from cas.exchange.peft_adapters import write_adapter

        write_adapter(prefix.directly_in_front(), out)
        return [f"{named} -> {out}", *lines]
    return [f"{named} -> {_tokasaurus(prefix.directly_in_front(), out)}", *lines]


def _transformers(prefix: Prefix, model: FrozenModel, out: Path) -> None:
    """Keys and values [1, H, n, D] of every layer, and beside them what a prompt behind them takes."""
    tensors: dict[str, Tensor] = {}
    for layer, (keys, values) in enumerate(prefix.kv):
        tensors |= {f"keys.{layer}": keys[None], f"values.{layer}": values[None]}
    about = {
        **prefix.about,
        "layers": prefix.kv.shape[0],
        "length": prefix.length,
        "start": prefix.start,
        "before_question": list(model.template.footer_ids),
        "after_question": list(model.template.suffix_ids),
        "stop_ids": sorted(model.template.stop_ids),
    }
    write_tensors(out, tensors, {})
    write_atomically(out.with_suffix(".json"), (json.dumps(about, ensure_ascii=False, indent=1) + "\n").encode())


def _tokasaurus(prefix: Prefix, out: Path) -> Path:
    """``cartridge.pt`` and ``config.yaml`` below ``out``, in a folder named like the id that a request names.

    The server attends to whole pages, and no values for the rows left over in a page would be without effect.
    """
    import io

    import torch
    import yaml

    if prefix.length % PAGE:
        advice = "choose other documents"
        if prefix.header % MULTIPLE:  # then none will do
            advice = f"train with another --system: the header, {prefix.header} now, needs a multiple of {MULTIPLE}"
        raise UserError(
            f"header and cartridges have {prefix.length} positions, and Tokasaurus takes multiples of {PAGE}; {advice}"
        )
    folder = out / _server_id("+".join(prefix.ids))
    fixed, learned = prefix.kv[:, :, None, :, : prefix.header], prefix.kv[:, :, None, :, prefix.header :]
    tensors = {
        name: [layer[part].clone() for layer in kv]
        for kind, kv in (("trainable", learned), ("fixed", fixed))
        for name, part in ((f"{kind}_keys", 0), (f"{kind}_values", 1))
    }
    config = {
        "kv_cache_initializer": {"max_tokens": prefix.length, "num_frozen_tokens": prefix.header},
        "model": {"pretrained_model_name_or_path": prefix.about["model"]},
        "cas": prefix.about,
    }
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "cartridge.pt", buffer.getvalue())
    write_atomically(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True).encode())
    return folder


def _server_id(name: str) -> str:
    """The id as a folder that Tokasaurus finds under the same id: it replaces all other characters itself."""
    import re

    plain = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")
    return plain or "cartridge"
