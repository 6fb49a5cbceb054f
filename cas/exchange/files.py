"""Files that go to other programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cas.store.files import write_atomically, writing

if TYPE_CHECKING:
    from torch import Tensor


def dump(value: Any) -> str:
    """JSON as metadata of a file."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file, written whole or not at all."""
    from safetensors.torch import save

    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(file, save(contiguous, {"format": "pt", **metadata}))
