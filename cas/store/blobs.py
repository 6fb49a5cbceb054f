"""Tensors as safetensors files, the only binary form in a store."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

Values = Literal["float32", "bfloat16", "int8"]  # from the widest on
SCALES = "kv.scales"  # of the channels of a cartridge in int8: [L, 2, H, 1, D]
_NUMPY = {"F32": "float32", "BF16": "int16", "I8": "int8"}


def dump_tensors(tensors: Mapping[str, Tensor], about: Mapping[str, str], into: bytearray) -> memoryview:
    """CPU tensors (float32, bfloat16 or int8) as a safetensors file with these metadata, written into the buffer
    ``into``, which grows as needed and is reused: new memory for every value would cost more than the copy."""
    import numpy as np
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8"}
    header_of: dict[str, Any] = {"__metadata__": dict(about)}
    places, end = {}, 0
    for name, tensor in tensors.items():
        places[name] = end, end + tensor.element_size() * tensor.numel()
        shape = list(tensor.shape)
        header_of[name] = {"dtype": names[tensor.dtype], "shape": shape, "data_offsets": list(places[name])}
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
        source = (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()
        np.copyto(np.frombuffer(view[low:high], source.dtype).reshape(tensor.shape), source)
    return view


def parse_tensors(blob: Any) -> dict[str, Tensor]:
    """The tensors of a safetensors file (a length, a JSON header, the data), as float32, copied once.

    Raises: ValueError for bytes that are no such file.
    """
    import numpy as np
    import torch

    view = memoryview(blob)
    start, tensors = 8 + int.from_bytes(view[:8], "little"), {}
    try:
        for name, about in json.loads(bytes(view[8:start])).items():
            if name != "__metadata__":
                low, high = about["data_offsets"]
                data = np.frombuffer(view[start + low : start + high], _NUMPY[about["dtype"]]).copy()
                tensor = torch.from_numpy(data)
                tensor = tensor.view(torch.bfloat16) if about["dtype"] == "BF16" else tensor
                tensors[name] = tensor.view(about["shape"]).float()
        if (scales := tensors.pop(SCALES, None)) is not None:
            tensors["kv"] *= scales
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"no safetensors file of a store ({error})") from error
    return tensors


def encode(kv: Tensor, values: Values) -> dict[str, Tensor]:
    """A cartridge [L, 2, H, P, D] as it is stored in fewer bytes; :func:`parse_tensors` gives it back as float32.

    ``int8``: every channel of a head, P numbers, has a scale of its own, bfloat16 and rounded up, so that none exceeds 127.
    """
    import torch

    if values == "float32":
        return {"kv": kv}
    if values == "bfloat16":
        return {"kv": kv.bfloat16()}
    scales = (kv.abs().amax(-2, keepdim=True) / 127 * (1 + 2**-8)).bfloat16()
    scales[scales == 0] = 1
    whole = (kv / scales.float()).round().clamp(-127, 127).to(torch.int8)
    return {"kv": whole, SCALES: scales}


def values_of(blob: Any) -> Values:
    """How a cartridge's numbers are stored."""
    view = memoryview(blob)
    header = json.loads(bytes(view[8 : 8 + int.from_bytes(view[:8], "little")]))
    return {"F32": "float32", "BF16": "bfloat16", "I8": "int8"}[header["kv"]["dtype"]]  # type: ignore[return-value]


def metadata_of(blob: Any) -> dict[str, str]:
    """What a safetensors file says about itself."""
    view = memoryview(blob)
    return dict(json.loads(bytes(view[8 : 8 + int.from_bytes(view[:8], "little")])).get("__metadata__", {}))


def with_about(blob: bytes, **fields: str) -> bytes:
    """The same tensors with other ``fields`` in what a cartridge's file says about itself."""
    start = 8 + int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8:start])
    about = json.loads(header.get("__metadata__", {}).get("cartridge", "{}")) | fields
    header["__metadata__"] = {"cartridge": json.dumps(about, ensure_ascii=False, sort_keys=True)}
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + blob[start:]
