"""What the program survives: kills, damaged files, full disks, and two of itself at once.

`python -m tests.reliability` tries everything and prints a table; `pytest -m reliability` does the same. The suite
tries a few trials of each line (`test_short_form.py`).
"""
