"""Tensors as safetensors files, the only binary form in a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def dump_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, str], into: bytearray) -> memoryview:
    """float32 CPU tensors as a safetensors file with these metadata, written into the buffer ``into``, which grows as
    needed and
    is reused: new memory for every value would cost more than the copy."""
    import numpy as np

    header_of: dict[str, Any] = {"__metadata__": dict(about)}
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = end, end + 4 * tensor.numel()
        header_of[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": list(places[name])}
        end = places[name][1]
    header = json.dumps(header_of, ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    start = 8 + len(header)
    if len(into) < start + end:
        into.extend(bytes(start + end - len(into)))
    view = memoryview(into)[: start + end]
    view[:8], view[8:start] = len(header).to_bytes(8, "little"), header
    for name, tensor in tensors.items():
        low, high = (start + n for n in places[name])
        np.copyto(np.frombuffer(view[low:high], np.float32).reshape(tensor.shape), tensor.numpy())
    return view


def parse_tensors(blob: Any) -> dict[str, Tensor]:
    """The float32 tensors of a safetensors file (a length, a JSON header, the data), copied once."""
    import numpy as np
    import torch

    view = memoryview(blob)
    start, tensors = 8 + int.from_bytes(view[:8], "little"), {}
    for name, about in json.loads(bytes(view[8:start])).items():
        if name != "__metadata__":
            assert about["dtype"] == "F32", "stores hold float32"
            low, high = about["data_offsets"]
            data = np.frombuffer(view[start + low : start + high], np.float32).copy()
            tensors[name] = torch.from_numpy(data).view(about["shape"])
    return tensors


def with_about(blob: bytes, **fields: str) -> bytes:
    """The same tensors with other ``fields`` in what a cartridge's file says about itself."""
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    about = json.loads(header.get("__metadata__", {}).get("cartridge", "{}")) | fields
    header["__metadata__"] = {"cartridge": json.dumps(about, ensure_ascii=False, sort_keys=True)}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[start:]
