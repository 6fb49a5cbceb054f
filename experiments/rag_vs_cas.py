"""``python -m experiments.rag_vs_cas``: the report, under the name that recorded runs have."""

from __future__ import annotations

import sys

from cas.report.compare import main

if __name__ == "__main__":
    sys.exit(main())
