"""What identifies a model: everything that shapes its forward pass, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import xxhash

# Settings that shape no forward pass, or that are measured instead: shapes, windows, RoPE, tied embeddings.
_IGNORED = re.compile(
    r"_.*|.*_token_id|.*dropout.*|.*pdrop|initializer_.*|output_.*|rope_.*|.*aux_loss.*|router_z_loss.*|sliding_window.*"
    r"|transformers_version|model_type|(torch_)?dtype|architectures|auto_map|id2label|label2id|problem_type|return_dict"
    r"|use_cache|chunk_size_feed_forward|is_encoder_decoder|pretraining_tp|gradient_checkpointing|quantization_config"
    r"|(original_)?max_position_embeddings|max_window_layers|use_sliding_window|layer_types|partial_rotary_factor"
    r"|tie_word_embeddings|vocab_size|hidden_size|num_(hidden_layers|attention_heads|key_value_heads)|head_dim"
    r"|query_pre_attn_scalar|attention_multiplier|cas_reader"
)


class Identity(NamedTuple):
    """What the weights and the vocabulary are, read before a conversion to float16 loses bits."""

    weights: bytes
    legacy: str  # as stores of earlier versions recorded it


def identify(hf: Any, tokenizer: Any) -> Identity:
    """The identity of a loaded model; the same for float32 and bfloat16."""
    return Identity(weights_digest(hf), legacy_fingerprint(hf, tokenizer))


def fingerprint(weights: bytes, config: Any, measured: Any, tokenizer: Any, template: Sequence[Sequence[int]]) -> str:
    """16 hex digits of everything that shapes a forward pass.

    Args: weights: of :func:`weights_digest`; measured: JSON of what a forward pass shows: heads, windows, scales;
        template: token ids of the parts of the chat template that do not depend on the system text.
    """
    facts = {
        "kind": config.model_type,
        "config": _settings(config),
        "measured": measured,
        "tokenizer": _tokenizer_facts(tokenizer),
        "template": [list(part) for part in template],
    }
    text = json.dumps(_plain(facts), sort_keys=True)
    return hashlib.sha256(weights + text.encode()).hexdigest()[:16]


def weights_digest(hf: Any) -> bytes:
    """Hash of all weights, rounded to bfloat16. A parameter's name counts only with the number of its layer, since new
    versions of transformers rename parameters."""
    layers: defaultdict[int, list[bytes]] = defaultdict(list)
    inner, outer = (getattr(f(), "weight", None) for f in (hf.get_input_embeddings, hf.get_output_embeddings))
    ends = {weight.data_ptr(): label for label, weight in (("out", outer), ("in", inner)) if weight is not None}
    seen = set()
    for name, weight in hf.state_dict().items():
        if weight.data_ptr() in seen:  # tied
            continue
        seen.add(weight.data_ptr())
        hasher = xxhash.xxh3_128(f"{ends.get(weight.data_ptr())} {list(weight.shape)}".encode())
        for part in weight.detach().reshape(-1).split(1 << 24):
            hasher.update((part.bfloat16() if part.is_floating_point() else part).cpu().view(torch.uint8).numpy().data)
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        layers[int(number[1]) if number else -1].append(hasher.digest())
    tied = inner is not None and outer is not None and inner.data_ptr() == outer.data_ptr()
    parts = [b"tied" if tied else b"", *(b"".join([b"/", *sorted(layers[i])]) for i in sorted(layers))]
    return hashlib.sha256(b"".join(parts)).digest()


def legacy_fingerprint(hf: Any, tokenizer: Any) -> str:
    """The fingerprint that stores of earlier versions recorded: of samples of the weights and the vocabulary."""
    digest = hashlib.sha256()
    config = hf.config.get_text_config().to_dict()
    keep = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "rope_parameters")
    digest.update(json.dumps({k: config.get(k) for k in keep}, sort_keys=True, default=str).encode())
    for name, weight in sorted(hf.state_dict().items()):
        flat = weight.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].detach().to("cpu", torch.bfloat16)
        digest.update(name.encode() + sample.view(torch.int16).numpy().tobytes())
    digest.update(json.dumps(sorted(tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()[:16]


def _settings(config: Any) -> dict[str, Any]:
    """Settings that differ from the defaults of the architecture: new versions add some."""
    try:
        defaults = type(config)().to_dict()
    except Exception:  # an architecture without defaults
        defaults = {}
    given = config.to_dict()
    return {k: v for k, v in given.items() if not _IGNORED.fullmatch(k) and _plain(v) != _plain(defaults.get(k))}


def _tokenizer_facts(tokenizer: Any) -> Any:
    """What decides on the token ids of a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    spec = json.loads(backend.to_str())
    model = {k: v for k, v in spec["model"].items() if k != "dropout"}
    if "merges" in model:  # their notation depends on the version
        model["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return [model, spec["normalizer"], spec["pre_tokenizer"], spec["added_tokens"]]


def _plain(value: Any) -> Any:
    """As JSON, without what is None, false or empty: new versions add such fields."""
    if isinstance(value, dict):
        items = {str(k): _plain(v) for k, v in value.items()}
        return {k: v for k, v in items.items() if v not in (None, False, "", [], {}) or (v == 0 and v is not False)}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float):  # as far as it is the same on every device
        return float(f"{value:.5g}")
    return value if value is None or isinstance(value, str | int) else str(value)
