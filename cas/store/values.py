"""``cas compact --values``: the cartridges of a finished store in a half or a quarter of their bytes."""

from __future__ import annotations

from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

from cas.errors import ConfigError
from cas.store.blobs import Values, dump_tensors, encode, metadata_of, parse_tensors, values_of
from cas.store.records import FORMAT_VALUES, Row, blob_keys, checksum, record, row_key

if TYPE_CHECKING:
    from cas.store.store import Store

_AT_ONCE = 16  # documents in one transaction
_WIDTHS = get_args(Values)


def compact_values(store: Store, values: Values) -> None:
    """Store every cartridge as ``values`` and drop the optimizer's state; the caller holds :meth:`Store.training`.

    Cartridges of a store that was compacted so learn no more; new documents train beside them, in float32 as ever. A
    cartridge that is as narrow already stays bit for bit. Killed at any instant, the store is whole, and the same call
    goes on.
    Raises: ConfigError while a training is unfinished, or for values wider than those that the store has.
    """
    store.refuse_unfinished()
    recorded = store.meta.get("values", "float32")
    if _WIDTHS.index(recorded) > _WIDTHS.index(values):
        raise ConfigError(f"{store.folder} holds {recorded} values, which cannot become {values} again")
    meta = {**store.meta, "values": values, "format": FORMAT_VALUES}  # first: older versions must not read what follows
    if values != "float32":
        store.records.write(lambda txn: txn.put(b"meta", record(meta)))
        store.meta = meta
    rows = [row for row in store.rows().values() if row.initialized]
    for first in range(0, len(rows), _AT_ONCE):
        store.records.write(partial(_convert, store, rows[first : first + _AT_ONCE], values))
    store.records.sync()


def _convert(store: Store, rows: list[Row], values: Values, txn: Any) -> None:
    for row in rows:
        blob = store.records.blob(txn, "kv", row.id, row.version, row.kv_hash)
        to = replace(row, version=row.version + 1, state_hash=None, round=-1)
        if _WIDTHS.index(values_of(blob)) < _WIDTHS.index(values):
            tensors = encode(parse_tensors(blob)["kv"], values)
            blob = bytes(dump_tensors(tensors, metadata_of(blob), bytearray()))
        for key in blob_keys(row.id, row.version):
            txn.delete(key)
        txn.put(blob_keys(row.id, to.version)[0], blob)
        txn.put(row_key(row.id), record(asdict(replace(to, kv_hash=checksum(blob)))))
