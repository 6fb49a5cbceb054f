"""Command lines, called in this process."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable

TRAIN = [
    "--collection",
    "manuals",
    "--tokens",
    "16",
    "--conversations",
    "40",
    "--steps",
    "12",
    "--pool",
    "2",
    "--targets",
    "2",
]
TRAIN += ["--per-target", "2", "--rotate-every", "3", "--isolation", "0.5", "--guests", "1", "--lr", "0.01"]


def call(main: Callable[[list[str]], int], *words: str) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(list(words))
    return status, out.getvalue(), err.getvalue()
