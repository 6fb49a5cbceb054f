"""CAS, Cartridges at Scale: one small trained KV cache per document, trained jointly, retrieved and composed."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Loaded on first use, so that `--help` needs no torch.
_HOMES = {
    "Answerer": "cas.answering.answerer",
    "Collection": "cas.data.collection",
    "Document": "cas.data.collection",
    "Question": "cas.data.collection",
    "FrozenModel": "cas.model.frozen",
    "Store": "cas.store.store",
    "Trainer": "cas.training.trainer",
    "compose": "cas.answering.compose",
    "synthesize": "cas.selfstudy.synthesize",
    "CasError": "cas.errors",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from cas.answering.answerer import Answerer as Answerer
    from cas.answering.compose import compose as compose
    from cas.data.collection import Collection as Collection
    from cas.data.collection import Document as Document
    from cas.data.collection import Question as Question
    from cas.errors import CasError as CasError
    from cas.model.frozen import FrozenModel as FrozenModel
    from cas.selfstudy.synthesize import synthesize as synthesize
    from cas.store.store import Store as Store
    from cas.training.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'cas' has no attribute {name!r}")
