"""What is to be evaluated, and how: the keys of `configs/evaluate.yaml`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt, restricted_number_type

from rlhf_lightning.data.examples import OnBadRows
from rlhf_lightning.data.sources import Source
from rlhf_lightning.evaluation.benchmarks.rewardbench import LITE_SIZE
from rlhf_lightning.evaluation.refusal import BUILTIN_PROMPTS
from rlhf_lightning.rewards.source import Reward

REWARDBENCH_PROMPTS = "rewardbench"
"""`prompts` that are those of `rewardbench`, or of its Lite set."""

Dtype = Literal["float32", "bfloat16", "float16"]
if TYPE_CHECKING:
    TopP = float
else:
    TopP = restricted_number_type("TopP", float, [(">", 0), ("<=", 1)])


@dataclass(frozen=True)
class EvaluationSettings:
    """An evaluation. What is not given is not measured, and the report says so.

    Args:
        out: Directory of the report. Scores and responses are kept there, so that a run that was killed resumes.
        reward_model: Directory or hub name of a reward model, ours or a sequence classifier with one label, or
            `module:function` of yours, which takes conversations and responses and gives a number for each. It is
            evaluated on `pairs` and RewardBench, and scores the responses of the policies. Or a list of them,
            `{source: ..., weight: 1, name: ..., chat_template: ...}` each, whose weighted sum is the score.
        reward_chat_template: The text that it reads: `plain`, the words alone, a line for each turn; `pair`, prompt and
            response as its tokenizer's two texts; `transcript`, plain `Human: ... Assistant: ...`; or a Jinja file that
            writes the whole. When not given, its tokenizer's chat template, else the transcript.
        held_out_reward_model: A second reward model, or list, trained on other pairs, or a rule that was not trained: a
            gain that it does not see is over-optimization.
        held_out_reward_chat_template: The text that the held-out reward model reads.
        policy: Directory (whole, or LoRA adapters alone), hub name or GGUF file of a policy after training.
        reference: Directory or hub name of the policy before training.
        implicit_reward: Evaluate `policy` on `pairs` and RewardBench as well, by DPO's implicit reward against
            `reference` (without one, by its log-probs).
        judge: Directory or hub name of a language model that judges the pairs of RewardBench in writing.
        judge_max_new_tokens: Longest reply of the judge, in tokens.
        pairs: Preference pairs that nothing was trained on: files, directories or hub data sets. Accuracy is reported
            for each value of their column `source` (`[{source: FILE, columns: {source: COLUMN}}]` takes another one),
            else for each file.
        on_bad_rows: `error` refuses pairs or prompts with unusable rows and names them; `drop` skips such rows and says
            how many.
        pairs_split: Which files of a directory or hub data set these are.
        rewardbench: RewardBench's rows: file, directory or hub name.
        rewardbench_size: Rows of RewardBench-Lite, or `full`.
        rewardbench2: Rows of RewardBench 2.
        prior_sets: Name of each of RewardBench's prior sets to its file; null takes it from the hub.
        benchmarks: Name of each further benchmark to its rows: rm_bench, judgebench, m_rewardbench, or one of your own.
        prompts: What the policies answer: a source as `pairs`, or `rewardbench` for the prompts of that key. The gain
            in points needs preference pairs, whose responses are its scale; prompts alone will do for the rest.
        prompts_split: Which files of a directory or hub data set these are.
        max_prompts: The first so many prompts.
        samples: Responses of each policy to each prompt.
        temperature: Sampling temperature. The KL is measured at 1 alone.
        max_new_tokens: Longest response, in tokens.
        refusal_prompts: Prompts of known safety, answered with the most likely tokens.
        refusal_classifier: A text classifier that detects refusals, in place of the built-in detector.
        refusal_label: Its label that means a refusal; needed where no label's name says so.
        toxicity_model: A text classifier that detects toxic responses.
        toxic_labels: Its labels that mean toxic; needed where their names do not say so.
        lexicon: A file with one word a line; the share of responses with one is reported under this name.
        runs: Directories of TensorBoard logs, for the learning curves.
        title: Title of the report.
        max_length: Longest row that is scored, in tokens; as many as a model has positions for when not given.
        batch_size: Rows at a time. It changes no number, but for rounding.
        device: Such as `cpu` or `cuda`; a GPU where there is one when not given.
        devices: Processes on this machine, each with a device of its own (the CPU is shared), the whole model, and a
            share of the rows. It changes no number, but for rounding.
        dtype: Dtype of the weights and arithmetic of language and reward models; classifiers are float32. Half
            precision takes half of the memory, and its error may be as large as the differences looked for: the report
            gives it, measured on a few rows that are scored in float32 as well.
        seed: Seed of sampling and of bootstrap resamples.
        trust_remote_code: Run code that comes with models.
    """

    out: str = "reports/evaluation"
    reward_model: Reward | None = None
    reward_chat_template: str | None = None
    held_out_reward_model: Reward | None = None
    held_out_reward_chat_template: str | None = None
    policy: str | None = None
    reference: str | None = None
    implicit_reward: bool = False
    judge: str | None = None
    judge_max_new_tokens: PositiveInt = 1024
    pairs: Source | None = None
    pairs_split: Literal["train", "val", "test"] = "val"
    on_bad_rows: OnBadRows = "error"
    rewardbench: str | None = None
    rewardbench_size: PositiveInt | Literal["full"] = LITE_SIZE
    rewardbench2: str | None = None
    prior_sets: dict[str, str | None] | None = None
    benchmarks: dict[str, str] | None = None
    prompts: Source | None = None
    prompts_split: Literal["train", "val", "test"] = "val"
    max_prompts: PositiveInt | None = None
    samples: PositiveInt = 4
    temperature: NonNegativeFloat = 1.0
    max_new_tokens: PositiveInt = 256
    refusal_prompts: str | None = BUILTIN_PROMPTS
    refusal_classifier: str | None = None
    refusal_label: str | None = None
    toxicity_model: str | None = None
    toxic_labels: list[str] | None = None
    lexicon: str | None = None
    runs: list[str] | None = None
    title: str = "Evaluation"
    max_length: PositiveInt | None = None
    batch_size: PositiveInt = 16
    device: str | None = None
    devices: PositiveInt = 1
    dtype: Dtype = "float32"
    seed: NonNegativeInt = 0
    trust_remote_code: bool = False
