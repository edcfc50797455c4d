"""How long a test waits for another process before it calls it hung."""

PATIENCE = 1200.0
"""Seconds, far above what anything takes: on a slow machine no test fails by the clock."""
