"""The benchmarks, one file each; to add one, write its `Benchmark` and `Result` (see `base`), and name it here."""

from rlhf_lightning.evaluation.benchmarks.base import Benchmark
from rlhf_lightning.evaluation.benchmarks.judged import JudgedRewardBench, JudgedRewardBench2
from rlhf_lightning.evaluation.benchmarks.prior_sets import PriorSets
from rlhf_lightning.evaluation.benchmarks.rewardbench import RewardBench
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import RewardBench2

BENCHMARKS: list[Benchmark] = [RewardBench(), RewardBench2(), PriorSets(), JudgedRewardBench(), JudgedRewardBench2()]
"""In the order of the report."""
