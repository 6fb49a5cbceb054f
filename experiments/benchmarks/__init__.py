"""What everything costs, against what it could cost: ``python -m experiments.benchmarks`` (``make bench``)."""
