"""What a model is judged by is float32, whatever precision it is trained in."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning import PPO, PromptDataModule
from rlhf_lightning.training.callbacks import PairScores

LORA = {"lora": {"r": 4, "lora_alpha": 8.0}}
# Measured on these models, bf16 moves a log-ratio by up to 0.5 nats and a score by 0.05.
SAME = {"rel": 1e-6, "abs": 1e-6}


def moved(module):
    """Every trained weight a little off its start, so that policy and reference differ; the same each time."""
    module.configure_model()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return module


def same_numbers(make, trainer, command):
    """`validate` or `test` of one model in mixed precision and in float32."""
    found = []
    for precision in ("32-true", "bf16-mixed"):
        module, data = make()
        (numbers,) = getattr(trainer(precision=precision), command)(moved(module), data, verbose=False)
        found.append(numbers)
    assert len(found[0]) > 2
    assert found[1] == pytest.approx(found[0], **SAME)


def predicted(make, trainer, precision):
    module, data = make()
    batches: list[PairScores] = trainer(precision=precision).predict(moved(module), data)
    return torch.cat([torch.cat(batch[1:]) for batch in batches])


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("build", {}),
        ("build", {"pooling": "layers", "freeze_backbone": True}),
        ("build_sft", {}),
        ("build_dpo", {}),
        ("build_dpo", LORA),
        ("build_dpo", {"precompute_reference": True}),
        ("build_dpo", {"precompute_reference": True} | LORA),
        ("build_dpo", {"loss_type": "simpo", "beta": 2.0, "gamma": 0.5}),
    ],
    ids=["reward", "layers", "sft", "frozen", "adapter", "precomputed", "precomputed-adapter", "no-reference"],
)
def test_mixed_precision_judges_by_the_numbers_of_float32(request, trainer, tmp_path, kind, model):
    if "reference" in model:
        model = model | {"reference_cache": str(tmp_path / "cache")}

    def make():
        return request.getfixturevalue(kind)(model=model)

    same_numbers(make, trainer, "validate")
    full, half = (predicted(make, trainer, precision) for precision in ("32-true", "bf16-mixed"))
    torch.testing.assert_close(half, full, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("reward", ["rule", "model"])
def test_ppo_is_judged_by_replies_scores_and_kl_of_float32(build, trainer, tiny_qwen2, tmp_path, reward):
    name = "tests.training.test_ppo:length"
    if reward == "model":
        moved(build()[0]).export(tmp_path / "reward")
        name = str(tmp_path / "reward")

    def make():
        torch.manual_seed(0)
        module = PPO(str(tiny_qwen2), reward_model=name, max_new_tokens=6, value_model="shared")
        prompts = {"train": "builtin:courtesy", "limit": 18, "batch_size": 6, "seed": 3}
        return module, PromptDataModule(**prompts, tokenizer=str(tiny_qwen2))

    same_numbers(make, trainer, "test")
