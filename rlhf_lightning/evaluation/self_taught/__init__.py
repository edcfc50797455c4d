"""Pairs that a model builds, judges of them that learn from their own verdicts (Wang et al. 2024, 2408.02666)."""
