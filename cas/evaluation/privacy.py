"""What a published record must not hold: absolute paths, and the names of the user and the machine."""

from __future__ import annotations

import getpass
import os
import re
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cas.errors import ConfigError

_URL = re.compile(r"\b(?!file:)[a-z][a-z0-9+]*://\S+")
_ABSOLUTE_PATH = re.compile(r"(?<![\w./~)\]}])/+[\w.]\S*")
_NOT_PERSONAL = {"root", "localhost", ""}


def relative(path: str | os.PathLike[str]) -> str:
    """``path`` as it may be published: ``$CAS_DATA/...`` in that folder, else relative to the working folder.

    Raises ConfigError when it lies in neither.
    """
    # First as written, then with links followed: either the path or the folder may have been reached by a link.
    for full in (os.path.abspath, os.path.realpath):
        places = [(full(os.environ["CAS_DATA"]), "$CAS_DATA")] if os.environ.get("CAS_DATA") else []
        for place, label in [*places, (full(os.getcwd()), "")]:
            if Path(full(path)).is_relative_to(place):
                return (Path(label) / Path(full(path)).relative_to(place)).as_posix()
    raise ConfigError(f"{path} is neither in $CAS_DATA nor in the working folder: move it, or set CAS_DATA to hold it")


def refuse_private(published: Any) -> None:
    """Raise ConfigError when a string in a JSON-like value, keys too, has an absolute path, the user's or host's name.

    :func:`cas.evaluation.recording.write_run` calls it; a long run should call it on its settings before it starts.
    Paths under the literal ``$CAS_DATA``, relative ones (:func:`relative`) and URLs pass.
    """
    host = socket.gethostname()
    names = {host, host.partition(".")[0], _user()} - _NOT_PERSONAL
    personal = [re.compile(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])") for name in sorted(names)]
    for where, text in _strings(published):
        if path := _ABSOLUTE_PATH.search(_URL.sub("", text)):
            raise ConfigError(f"{where} holds the absolute path {path[0]}: use cas.evaluation.privacy.relative(path)")
        for name in personal:
            if match := name.search(text):
                raise ConfigError(f"{where} holds {match[0]}, the name of this user or machine: leave it out")


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, as in some containers
        return ""


def _strings(value: Any, where: str = "") -> Iterator[tuple[str, str]]:
    """Every string in a JSON-like value, keys included, with the place where it stands."""
    if isinstance(value, str):
        yield where, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            place = f"{where}.{key}" if where else str(key)
            yield place, str(key)
            yield from _strings(inner, place)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _strings(inner, where)
