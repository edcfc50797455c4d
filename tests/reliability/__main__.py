"""Print the table: `python -m tests.reliability`; with words, the lines whose kind or name holds one of them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.reliability.lines import LINES
from tests.reliability.table import WANTED, attempt, drawn


def main(words: list[str]) -> int:
    """Try the lines, and return 1 where one falls short, or where the whole table tried fewer than are wanted."""
    lines = [line for line in LINES if not words or any(word in f"{line.kind} {line.what}" for word in words)]
    results = []
    for line in lines:
        with tempfile.TemporaryDirectory(prefix="reliability-") as directory:
            results.append(attempt(line, Path(directory)))
        print(f"{line.kind}, {line.what}: {results[-1].survived} of {results[-1].tried}", file=sys.stderr, flush=True)
        print(*results[-1].fell_short, sep="\n", end="", file=sys.stderr, flush=True)
    print(drawn(results))
    too_few = not words and any(
        sum(tried.tried for tried in results if tried.line.kind == kind) < wanted for kind, wanted in WANTED.items()
    )
    return int(too_few or any(tried.fell_short for tried in results))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
