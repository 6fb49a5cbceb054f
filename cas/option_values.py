"""What the values of some options mean: amounts of memory, and which store a command works with."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from cas.errors import ConfigError

_FILE = "cartridges.lmdb"  # by which a folder is a store


def memory(text: str, option: str) -> int:
    """Bytes of "6GiB", "500MB", "2G" (1024 based for GiB, MiB and bare G, M; 1000 based for GB, MB) or a plain number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(i?b)?\s*", text.lower())
    if not match:
        raise ConfigError(f"{option} {text}: give bytes as 6GiB, 500MB or a number")
    number, unit, suffix = match.groups()
    base = 1000 if suffix == "b" else 1024
    return int(float(number) * base ** " kmgt".index(unit or " "))


def store_folder(given: str | None, collection: str | None = None) -> Path:
    """The store that a command means: its option, else $CAS_STORE, else runs/<collection>; to query, the newest of runs/.

    Raises: ConfigError when there is none, or to query, for a folder of stores.
    """
    if given or os.environ.get("CAS_STORE"):
        folder = Path(given or os.environ["CAS_STORE"])
        inside = [file.parent.name for file in sorted(folder.glob(f"*/{_FILE}"))]
        if collection is None and inside and not (folder / _FILE).exists():
            raise ConfigError(f"{folder} is a folder of stores; give one of them: {', '.join(inside)}")
        return folder
    if collection is not None:
        name = Path(collection).absolute().resolve().name.removesuffix(".gz")
        return Path("runs") / (name.removesuffix(".jsonl").removesuffix(".json") or "collection")
    stores = sorted(Path("runs").glob(f"*/{_FILE}"), key=lambda p: p.stat().st_mtime)
    if not stores:
        raise ConfigError(
            "there is no store under runs/; give --store, or train one: python -m cas.train --collection DIR"
        )
    print(f"store: {stores[-1].parent} (the newest under runs/; --store chooses another)", file=sys.stderr)
    return stores[-1].parent
