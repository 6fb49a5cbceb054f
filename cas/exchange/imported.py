"""``cas import``: PEFT's CARTRIDGE adapters into a store of the same model. Nothing about a foreign file is trusted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cas.errors import CollectionError, StoreMismatch, UserError
from cas.exchange.peft_adapters import CONFIG, METADATA, TENSOR, WEIGHTS, unflatten
from cas.exchange.prefix import refuse_windows, shift_keys
from cas.model.frozen import FrozenModel

if TYPE_CHECKING:
    from cas.store.store import Store

_CONFIG_BYTES = 1 << 20
_DTYPES = ("F32", "F16", "BF16")
_TOLERANCE = 0.02  # of a layer's largest value: what bfloat16 may lose in a header


@dataclass(frozen=True)
class Adapter:
    """An adapter that was read and checked against a model's shapes. ``kv``: float32 [L, 2, H, frozen + p, D]."""

    folder: Path
    id: str
    kv: Tensor
    frozen: int
    about: dict[str, Any]  # of our own export; empty for others


def import_adapters(
    store: Store, model: FrozenModel, folder: Path, *, id: str | None = None, text: Path | None = None
) -> list[str]:
    """Add the adapter in a folder, or those in its folders, as documents that learn no more. All or, if one is refused, none.

    Args: id, text: of a single adapter: its id, and a UTF-8 file with the document's text, for retrieval.
    Returns: lines for the user. Raises: UserError and its kinds, one line each.
    """
    store.check_model(model)
    store.refuse_unfinished()
    refuse_windows(model)
    folders = [folder] if (folder / CONFIG).is_file() else sorted(p.parent for p in folder.glob(f"*/{CONFIG}"))
    if not folders:
        raise UserError(f"{folder} has no {CONFIG}, nor has a folder in it; name a PEFT adapter or a folder of them")
    if len(folders) > 1 and (id is not None or text is not None):
        raise UserError(f"{folder} has {len(folders)} adapters; --id and --text are for one")
    adapters = [read_adapter(place, store, model, id) for place in folders]
    known, lines = {*store.rows()}, []
    for adapter in adapters:
        if adapter.id in known:
            raise CollectionError(
                f"{store.folder} has a document {adapter.id!r} already; give --id, or rename the folder"
            )
        known.add(adapter.id)
    fitted = [fit(adapter, store, model) for adapter in adapters]
    content = _read_text(text)
    for adapter, (kv, remark) in zip(adapters, fitted, strict=True):
        titles = adapter.about.get("titles")
        title = titles[0] if isinstance(titles, list) and len(titles) == 1 and _name(titles[0]) else adapter.id
        store.add_cartridge(adapter.id, title, content, kv, model.count_tokens(content) if content else 0)
        lines += [f"{adapter.folder} -> {adapter.id}, {kv.shape[3]} positions", *([remark] if remark else [])]
    if not content:
        lines.append(
            "without a text, retrieval cannot find them: name them with --documents, or import with --text FILE"
        )
    return lines


def read_adapter(folder: Path, store: Store, model: FrozenModel, id: str | None = None) -> Adapter:
    """Read an adapter, refusing anything but finite numbers of this model's shapes.

    Raises: CollectionError for a file that is none; StoreMismatch for another model's.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    config = _read_config(folder / CONFIG)
    weights, geometry = folder / WEIGHTS, model.geometry
    if not weights.is_file():
        raise CollectionError(f"{folder} has no {WEIGHTS}; other files, such as adapter_model.bin, are never read")
    positions, frozen = (config[name] for name in ("num_virtual_tokens", "num_frozen_tokens"))
    width = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim
    expected = {
        "num_layers": geometry.layers,
        "num_attention_heads": geometry.kv_heads,
        "token_dim": geometry.kv_heads * geometry.head_dim,
    }
    for name, value in expected.items():
        if config.get(name) not in (None, value):
            raise StoreMismatch(f"{folder}: {name} is {config[name]}, and {value} in the model of {store.folder}")
    if not 0 < frozen < positions < geometry.max_positions:
        raise CollectionError(
            f"{folder}: {frozen} of {positions} tokens are frozen; some must be, as the header, and some not, and all "
            f"must fit into the model's {geometry.max_positions} positions"
        )
    try:
        with safe_open(weights, "pt") as file:
            if list(file.keys()) != [TENSOR]:
                raise CollectionError(f"{weights}: expected one tensor, {TENSOR}")
            part = file.get_slice(TENSOR)
            shape, dtype = part.get_shape(), part.get_dtype()
            if shape != [positions, width] or dtype not in _DTYPES:
                raise StoreMismatch(
                    f"{weights}: {TENSOR} is {dtype} {shape}, not floating point [{positions}, {width}] as the model of "
                    f"{store.folder} needs it"
                )
            rows, metadata = file.get_tensor(TENSOR).float(), file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CollectionError(f"{weights}: not a safetensors file ({str(error).splitlines()[0]})") from error
    if not bool(torch.isfinite(rows).all()):
        raise CollectionError(f"{weights}: holds a value that is not finite")
    about = _about(metadata.get(METADATA))
    recorded = store.meta["model"]
    if about and (about.get("fingerprint"), about.get("rope")) != (recorded["fingerprint"], recorded["rope"]):
        raise StoreMismatch(
            f"{folder} was exported for {about.get('model')} (fingerprint {about.get('fingerprint')}), not for the model "
            f"of {store.folder} ({recorded['fingerprint']})"
        )
    ids = about.get("ids")
    single = ids[0] if isinstance(ids, list) and len(ids) == 1 else None
    chosen = next((i for i in (id, single, folder.resolve().name) if _name(i)), None)
    if chosen is None or (id is not None and chosen != id):
        raise UserError(f"{folder}: give an --id of visible characters, 500 at most")
    return Adapter(
        folder, chosen, unflatten(rows, geometry.layers, geometry.kv_heads, geometry.head_dim), frozen, about
    )


def fit(adapter: Adapter, store: Store, model: FrozenModel) -> tuple[Tensor, str | None]:
    """The adapter's cartridge as the store places it, and what is not as in the adapter, in one line.

    The question keeps its distance to the cartridge. Raises: StoreMismatch where the frozen tokens are not those of the
    store's header, which is shared and cannot be exchanged.
    """
    kv, header = adapter.kv, model.header_kv.float().cpu()
    learned = kv.shape[3] - adapter.frozen
    layout = store.layout_for(learned)
    by = layout.token_start([learned]) - kv.shape[3]
    frozen, first = kv[:, :, :, : adapter.frozen], header[:, :, :, : adapter.frozen]
    if adapter.frozen > header.shape[3] or not _close(frozen[:, 1], first[:, 1]):
        raise StoreMismatch(
            f"{adapter.folder}: its {adapter.frozen} frozen tokens are not those of the header of {store.folder}; only "
            "adapters that were trained behind the store's own header (model and system text) answer in it"
        )
    if adapter.frozen < header.shape[3]:
        remark: str | None = (
            f"{adapter.id}: its frozen tokens are the first {adapter.frozen} of the header's {header.shape[3]}; it was "
            "trained without the others and may answer worse"
        )
    elif _close(shift_keys(frozen, by, model.rope)[:, 0], first[:, 0]):
        remark = None
    elif _close(frozen[:, 0], first[:, 0]):
        remark = (
            f"{adapter.id}: the question stands {by} positions further behind the header than in the adapter, by the "
            f"{layout.policy} positions of {store.folder}"
        )
    else:
        raise StoreMismatch(
            f"{adapter.folder}: the keys of its frozen tokens are not where this store's header has them"
        )
    cartridge = kv[:, :, :, adapter.frozen :].contiguous()
    return (shift_keys(cartridge, by, model.rope) if by else cartridge), remark


def _close(given: Tensor, expected: Tensor) -> bool:
    """Whether [L, H, S, D] agree in every layer as far as bfloat16 tells."""
    difference = (given - expected).abs().flatten(1).amax(1)
    return bool((difference <= _TOLERANCE * expected.abs().flatten(1).amax(1)).all())


def _read_config(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _CONFIG_BYTES:
            raise CollectionError(f"{file}: too large for an adapter's configuration")
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, CollectionError):
            raise
        raise CollectionError(f"{file}: cannot be read as JSON") from error
    if not isinstance(config, dict) or config.get("peft_type") != "CARTRIDGE":
        raise CollectionError(f"{file}: not a CARTRIDGE adapter of PEFT; other kinds are not imported")
    config = {"num_frozen_tokens": 1, **config}  # PEFT's default
    for name in ("num_virtual_tokens", "num_frozen_tokens"):
        if type(config.get(name)) is not int:
            raise CollectionError(f"{file}: {name} is not an integer")
    return config


def _about(text: str | None) -> dict[str, Any]:
    """What an export of ours said about itself; nothing for a file of others."""
    try:
        about = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _name(text: Any) -> bool:
    """Whether a text may be an id or a title."""
    return isinstance(text, str) and 0 < len(text.strip()) <= 500 and text.isprintable()


def _read_text(file: Path | None) -> str:
    if file is None:
        return ""
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CollectionError(f"{file}: cannot be read as UTF-8 text") from error
