"""CAS, Cartridges at Scale: one small trained KV cache per document, trained jointly, retrieved and composed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `--help` needs no torch.
_HOMES = {
    "Answerer": "cas.answer",
    "Collection": "cas.collection",
    "Document": "cas.collection",
    "Question": "cas.collection",
    "FrozenModel": "cas.model",
    "Store": "cas.store",
    "Trainer": "cas.trainer",
    "synthesize": "cas.selfstudy",
    "CasError": "cas.errors",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from cas.answer import Answerer as Answerer
    from cas.collection import Collection as Collection
    from cas.collection import Document as Document
    from cas.collection import Question as Question
    from cas.errors import CasError as CasError
    from cas.model import FrozenModel as FrozenModel
    from cas.selfstudy import synthesize as synthesize
    from cas.store import Store as Store
    from cas.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cas' has no attribute {name!r}")
