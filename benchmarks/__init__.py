"""Benchmarks, in a process that is set as the command line sets its own, which must be before torch is imported."""

from rnas.compute import threads as process

process.settle()
