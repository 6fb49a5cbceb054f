"""Write docs/cli.md from what ``--help`` prints: ``python docs/make_cli.py`` (a test compares the two)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

COMMANDS = (
    "cas.train",
    "cas.query",
    "cas serve",
    "cas.report",
    "cas",
    "cas ls",
    "cas show",
    "cas verify",
    "cas export",
    "cas import",
    "cas compact",
    "cas merge",
    "cas push",
    "cas pull",
)


def text() -> str:
    """The page."""
    parts = [
        "# Command lines\n\nMade by `python docs/make_cli.py`. Exit status: 0 done; 1 a check or a run failed; "
        "2 a mistake in what was asked, nothing written; 130 or 143 interrupted, after saving unless told twice.\n"
    ]
    for command in COMMANDS:
        words = ["-m", *command.split(), "--help"]
        shown = subprocess.run(
            [sys.executable, *words],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"},
        ).stdout
        parts.append(f"## python -m {command}\n\n```\n{shown.strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(text(), encoding="utf-8")
