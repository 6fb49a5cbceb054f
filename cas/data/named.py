"""Collections that are generated from a seed, by name: ``million_tokens`` and ``niah``."""

from __future__ import annotations

from cas.data.collection import GENERATORS, Collection
from cas.data.niah import WORDS, niah
from cas.data.worlds import world
from cas.errors import CollectionError


def million_tokens(size: str, seed: int) -> Collection:
    """The fictional world of 1,664 documents. Raises CollectionError for a size, since it has one only."""
    if size:
        raise CollectionError(f"million_tokens:{size}: only niah takes a size, a number of words such as niah:8000")
    return world(seed)


def needles(size: str, seed: int) -> Collection:
    """``niah`` or ``niah:<words>``. Raises CollectionError for a size that is not a number, or too small."""
    if size and not size.isdecimal():
        raise CollectionError(f"niah:{size}: only niah takes a size, a number of words such as niah:8000")
    try:
        return niah(seed, int(size or WORDS))
    except ValueError as error:
        raise CollectionError(str(error)) from error


GENERATORS.update(million_tokens=million_tokens, niah=needles)
