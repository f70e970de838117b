"""Evaluation: attacks by name on a whole test set, and how far the figures can be trusted."""
