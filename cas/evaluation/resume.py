"""A long experiment in parts: each is a file of its own, so that the same command goes on where it was stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cas.errors import ConfigError


def write(file: Path, value: object) -> None:
    """JSON, whole or not at all."""
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(file)


def cached_json(file: Path, make: Callable[[], Any]) -> Any:
    """What was made before and written to this file, else what ``make`` makes now."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write(file, make())
    return json.loads(file.read_text())


def check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError if the folder was begun with other settings."""
    file, now = folder / "settings.json", json.loads(json.dumps(settings))
    if changed := [k for k, v in cached_json(file, lambda: now).items() if now.get(k) != v]:
        raise ConfigError(f"{folder} was begun with another {', '.join(changed)}; give another --output")
