"""Long experiments in parts: each part is written to its own file, so that the same command resumes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cas.errors import ConfigError
from cas.store.files import write_atomically


def write(file: Path, value: object) -> None:
    """Write a value as JSON, atomically. Raises: StoreError if that fails."""
    write_atomically(file, (json.dumps(value, indent=1) + "\n").encode())


def cached_json(file: Path, compute: Callable[[], Any]) -> Any:
    """The value in a JSON file; where there is no file, the result of ``compute``, which is written there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, compute())
    return json.loads(file.read_text())


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Record the settings of a folder; raise ConfigError if it was begun with other ones."""
    file, current = folder / "settings.json", json.loads(json.dumps(settings))
    if changed := [k for k, v in cached_json(file, lambda: current).items() if current.get(k) != v]:
        raise ConfigError(f"{folder} was begun with another {', '.join(changed)}; give another --output")
