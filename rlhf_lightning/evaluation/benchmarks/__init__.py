"""The benchmarks, one file each; to add one, write its `Benchmark` and `Result` (see `base`), and name it here."""

from rlhf_lightning.evaluation.benchmarks.base import Benchmark
from rlhf_lightning.evaluation.benchmarks.prior_sets import PriorSets
from rlhf_lightning.evaluation.benchmarks.rewardbench import RewardBench
from rlhf_lightning.evaluation.benchmarks.rewardbench2 import RewardBench2
from rlhf_lightning.evaluation.benchmarks.rewardbench2_judge import JudgedRewardBench2
from rlhf_lightning.evaluation.benchmarks.rewardbench_judge import JudgedRewardBench

BENCHMARKS: list[Benchmark] = [RewardBench(), RewardBench2(), PriorSets(), JudgedRewardBench(), JudgedRewardBench2()]
"""In the order of the report."""
