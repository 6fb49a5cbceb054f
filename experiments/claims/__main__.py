"""``python -m experiments.claims``: every claim, in order."""

from __future__ import annotations

import sys

from experiments.claims.lab import main

if __name__ == "__main__":
    sys.exit(main())
