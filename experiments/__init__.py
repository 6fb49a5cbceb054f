"""Experiments: claims of the papers, benchmarks, demos, the reader's training; recorded runs and a log.

Commands name a module without its folder, as recorded runs do: ``python -m experiments.demo`` runs ``demos/demo.py``.
"""

from pathlib import Path

__path__ += [str(Path(__file__).with_name(folder)) for folder in ("claims", "demos", "reader_training")]
