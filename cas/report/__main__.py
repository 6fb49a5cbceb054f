"""``python -m cas.report``: compare cartridges with RAG and write the report."""

from __future__ import annotations

import sys

from cas.report.compare import main

if __name__ == "__main__":
    sys.exit(main())
