"""Processor seconds of 15 sampled verdicts on 1,000 ordered pairs, against 15 greedy passes of the benchmarks' judge.

python -m pytest -m benchmark tests/benchmarks/test_judgements.py -s

The tiny model has random weights: no verdict can be read, so early stopping saves nothing, and every reply has all of
its tokens.
"""

from __future__ import annotations

import time

import pytest

from rlhf_lightning.data import load_preferences
from rlhf_lightning.evaluation.judge import PolicyJudge, ask
from rlhf_lightning.evaluation.ranks import ALONE
from rlhf_lightning.evaluation.self_taught.judgements import Judging
from rlhf_lightning.evaluation.self_taught.replies import Asking
from rlhf_lightning.rewards.questions import comparison_question
from rlhf_lightning.rewards.writers import Sampling

PAIRS, SAMPLES, NEW, SLOTS, TARGET = 500, 15, 8, 64, 3
PASSES = 3
"""Greedy passes that are measured; each is the same work."""


@pytest.mark.benchmark
def test_fifteen_verdicts_take_a_third_of_fifteen_passes(tiny_qwen2):
    pairs = load_preferences("builtin:courtesy")[0][:PAIRS]
    judge = PolicyJudge(str(tiny_qwen2), max_new_tokens=NEW, batch_size=SLOTS)
    orders = [(pair.prompt, order) for pair in pairs for order in (pair.responses, pair.responses[::-1])]
    questions = [comparison_question(*each) for each in orders]
    ask(judge, questions[:SLOTS])  # what is measured once
    start = time.process_time()
    for _ in range(PASSES):
        ask(judge, questions)
    passes = (time.process_time() - start) / PASSES * SAMPLES
    writer = judge.writer.sampling(Sampling(NEW, 0.7, 0.9))
    judging = Judging(writer, Asking(None, 0, 8 * SLOTS, ALONE), SAMPLES, rate=4)
    start = time.process_time()
    ordered = judging.judge(pairs)
    sampled = time.process_time() - start
    assert sum(len(one.judgements) for one in ordered) == 2 * PAIRS * SAMPLES
    print(f"\n{SAMPLES} passes {passes:.1f} s ({PASSES} measured), sampled {sampled:.1f} s: {passes / sampled:.2f} x")
    assert passes >= TARGET * sampled
