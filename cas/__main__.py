"""``python -m cas train|query|serve|report|ls|show|verify|export|compact|merge``: hand over to the command."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from cas import __version__, console

OWN_MODULES = {
    "train": "cas.train",
    "query": "cas.query",
    "serve": "cas.serving.server",
    "report": "cas.report.compare",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Dispatch one command. Returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments == ["--version"]:
        print(f"cas {__version__}")
        return 0
    module, rest = OWN_MODULES.get(arguments[0] if arguments else "", "cas.commands"), arguments
    if module != "cas.commands":
        rest = arguments[1:]
    return console.run(lambda: int(importlib.import_module(module).main(rest)))


if __name__ == "__main__":
    sys.exit(main())
