"""``python -m experiments.check``: recompute every recorded metric, under the name that recorded runs have."""

from __future__ import annotations

import sys

from cas.evaluation.check import main

if __name__ == "__main__":
    sys.exit(main())
