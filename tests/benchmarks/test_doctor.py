"""The doctor on many short pairs: time of one core, and memory beyond the token ids on disk.

python -m pytest -m benchmark tests/benchmarks/test_doctor.py -s
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

SECONDS_OF_A_CORE_PER_MILLION, BYTES_PER_PAIR = 200, 500

SCRIPT = textwrap.dedent(
    """
    import pathlib, resource, sys, time
    import datasets, lightning, torch, transformers
    from rlhf_lightning.data.doctor import diagnose
    from rlhf_lightning.data.datamodules import PreferenceDataModule

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def examine(file):
        data = PreferenceDataModule(file, val=file, tokenizer="builtin:tiny", cache_dir=cache)
        return diagnose(data, roles=("train",)).roles[0].pairs

    file, first, cache = sys.argv[1:]
    examine(first)
    before, began = peak(), time.process_time()
    pairs = examine(file)
    arrow = max(entry.stat().st_size for entry in pathlib.Path(cache).rglob("*.arrow"))
    print(pairs, time.process_time() - began, peak() - before, arrow)
    """
)


@pytest.mark.benchmark
@pytest.mark.timeout(900)
@pytest.mark.parametrize("pairs", [100_000, 500_000])
def test_time_and_memory_grow_with_the_pairs_and_no_faster(tmp_path, pairs):
    for name, count in (("few", 2000), ("many", pairs)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            for i in range(count):
                row = {"prompt": f"What is {i} plus one?", "chosen": f"It is {i + 1}.", "rejected": "I do not know."}
                file.write(json.dumps(row) + "\n")
    files = [str(tmp_path / name) for name in ("many.jsonl", "few.jsonl", "cache")]
    ran = subprocess.run([sys.executable, "-c", SCRIPT, *files], check=True, capture_output=True, text=True)
    read, seconds, growth, arrow = map(float, ran.stdout.splitlines()[-1].split())
    print(f"\n{pairs} pairs: {seconds:.0f} s of a core, {growth / 2**20:.0f} MiB, of them {arrow / 2**20:.0f} mapped")
    assert read == pairs
    assert seconds < SECONDS_OF_A_CORE_PER_MILLION * pairs / 1e6
    assert growth - arrow < BYTES_PER_PAIR * pairs
