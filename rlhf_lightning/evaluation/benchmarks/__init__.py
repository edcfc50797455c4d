"""The benchmarks, one file each; to add one, write its `Benchmark` and `Result` (see `base`), and name it here."""

from rlhf_lightning.evaluation.benchmarks.base import Benchmark
from rlhf_lightning.evaluation.benchmarks.judgebench import JudgeBench, JudgedJudgeBench
from rlhf_lightning.evaluation.benchmarks.judged import JudgedRewardBench, JudgedRewardBench2
from rlhf_lightning.evaluation.benchmarks.m_rewardbench import MRewardBench
from rlhf_lightning.evaluation.benchmarks.prior_sets import PriorSets
from rlhf_lightning.evaluation.benchmarks.rewardbench import RewardBench
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import RewardBench2
from rlhf_lightning.evaluation.benchmarks.rm_bench import RMBench

BENCHMARKS: list[Benchmark] = [
    RewardBench(),
    RewardBench2(),
    RMBench(),
    JudgeBench(),
    MRewardBench(),
    PriorSets(),
    JudgedRewardBench(),
    JudgedRewardBench2(),
    JudgedJudgeBench(),
]
"""In the order of the report."""
