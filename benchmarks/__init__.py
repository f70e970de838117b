"""Benchmarks, with OpenMP's threads as the command line sets them, which must be before torch is imported."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # docs/decisions/004
