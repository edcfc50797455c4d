"""Reading, checking and encoding a large set: time of one core and memory beyond the data.

python -m pytest -m benchmark tests/benchmarks/test_tokenization_speed.py -s
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import textwrap

import pytest

from rlhf_lightning.tiny import builtin_texts

PAIRS = 100_000
SECONDS_OF_A_CORE, GIBIBYTES = 60, 1.0

SCRIPT = textwrap.dedent(
    """
    import resource, sys, time
    import datasets, lightning, torch, transformers
    from rlhf_lightning.data.chat_format import ChatFormat
    from rlhf_lightning.data.tokenizer import load_tokenizer
    from rlhf_lightning.data.sources import WeightedSource
    from rlhf_lightning.data.tokenized import tokenize_source

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

    file, cache = sys.argv[1:]
    chat_format = ChatFormat(load_tokenizer("builtin:tiny"))
    before, began = peak(), time.process_time()
    store = tokenize_source(WeightedSource(file), chat_format, cache_dir=cache)
    print(len(store), int(store.lengths.sum()), time.process_time() - began, peak() - before)
    """
)


def transcripts(count: int):
    """hh-like rows: two to four turns, about 600 characters of prompt and 200 of each response, all different."""
    draw = random.Random(0)
    texts = builtin_texts()

    def words(characters: int) -> str:
        text = ""
        while len(text) < characters:
            text += " " + draw.choice(texts)
        return text[: draw.randint(characters // 2, characters)].strip()

    for number in range(count):
        turns = "".join(f"\n\nHuman: {words(300)}\n\nAssistant: {words(300)}" for _ in range(draw.randint(0, 2)))
        prompt = f"{turns}\n\nHuman: {number} {words(250)}\n\nAssistant:"
        yield {"chosen": f"{prompt} {words(300)}", "rejected": f"{prompt} {words(300)} {number}"}


@pytest.mark.benchmark
@pytest.mark.timeout(600)
def test_a_hundred_thousand_pairs_take_a_minute_of_one_core_and_little_memory(tmp_path):
    with (tmp_path / "pairs.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in transcripts(PAIRS))
    size = (tmp_path / "pairs.jsonl").stat().st_size
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "pairs.jsonl"), str(tmp_path / "cache")]
    rows, tokens, seconds, growth = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    print(f"\n{rows} pairs, {size / 2**20:.0f} MiB, {tokens} tokens: {seconds} s of a core, {growth} GiB on top")
    assert int(rows) == PAIRS
    assert float(seconds) < SECONDS_OF_A_CORE
    assert float(growth) < GIBIBYTES
