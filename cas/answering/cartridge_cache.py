"""Cartridges in memory: those used last, as the model computes with them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from cas.model.frozen import FrozenModel

if TYPE_CHECKING:
    from cas.store.store import Store


class Loading(NamedTuple):
    """A cartridge for an answer [L, 2, H, P, D], its document's title, and a name that no other version of it has."""

    kv: Tensor
    title: str
    key: str


class CartridgeCache:
    """The cartridges used last, in the model's dtype on its device; threads can share it.

    Attributes: hits, misses: how often a cartridge was at hand, or read from the store. bytes: what it holds.
    """

    def __init__(self, model: FrozenModel, store: Store, count: int, limit: int | None = None) -> None:
        """``count``: the most that it holds; ``limit``: where given, bytes instead."""
        self.model, self.store, self._count, self._limit = model, store, count, limit
        self.hits = self.misses = self.bytes = 0
        self._held: OrderedDict[str, Loading] = OrderedDict()  # by document
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._held)

    def load(self, document: str) -> Loading:
        """The cartridge that answers for a document now.

        Raises: CollectionError for an unknown id or one without cartridge yet; StoreError for damage.
        """
        row = self.store.answering_row(document)
        key = f"{document}\0{row.version}\0{row.kv_hash}"
        with self._lock:
            if document in self._held and self._held[document].key == key:
                self.hits += 1
                self._held.move_to_end(document)
                return self._held[document]
            self.misses += 1
            self._drop(document)
            kv = self.store.cartridge(document).to(self.model.device, self.model.dtype)
            loading = self._held[document] = Loading(kv, row.title, key)
            self.bytes += kv.nbytes
            while self._held and (len(self) > self._count if self._limit is None else self.bytes > self._limit):
                self._drop(next(iter(self._held)))
            return loading

    def keep_only(self, documents: Collection[str]) -> None:
        """Forget the cartridges of all other documents."""
        with self._lock:
            for document in [document for document in self._held if document not in documents]:
                self._drop(document)

    def _drop(self, document: str) -> None:
        if (loading := self._held.pop(document, None)) is not None:
            self.bytes -= loading.kv.nbytes
