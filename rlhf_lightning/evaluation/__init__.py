"""Judging a finished model: scores, statistics with their intervals, and the report. Runs without a Trainer."""
