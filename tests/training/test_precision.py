"""What a model is judged by is float32, whatever precision it is trained in."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_lightning import PPO, PromptDataModule
from rlhf_lightning.models.precision import halve_frozen
from rlhf_lightning.training import policy_module as training_module
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


def stored_in_bfloat16(directory, target):
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(directory).save_pretrained(target)
    return str(target)


def test_frozen_weights_that_are_halves_are_held_so_and_no_number_changes(
    build_dpo, trainer, tiny_qwen2, tmp_path, monkeypatch
):
    """Those of the linear layers; trained weights, embeddings and norms stay float32."""
    backbone, ends = stored_in_bfloat16(tiny_qwen2, tmp_path / "stored"), []
    for precision, on in (("bf16-mixed", True), ("bf16-mixed", False), ("16-mixed", True)):
        monkeypatch.setattr(training_module, "halve_frozen", halve_frozen if on else lambda *_: None)
        module, data = build_dpo(model={"backbone": backbone} | LORA)
        run = trainer(plugins=MixedPrecision(precision, "cpu"), max_steps=3)
        run.fit(module, data)
        held = {name: p.dtype for name, p in module.policy.named_parameters() if p.dtype != torch.float32}
        module.export(tmp_path / f"{precision}-{on}")
        ends.append((held, run.callback_metrics, load_file(tmp_path / f"{precision}-{on}" / "model.safetensors")))
    (held, numbers, exported), (without, others, expected), (lossy, *_) = ends
    assert set(held.values()) == {torch.bfloat16}
    assert len(held) == 2 * 7
    assert all(name.endswith("_proj.base_layer.weight") for name in held)
    assert without == {}
    assert numbers == others
    assert {name: weight.dtype for name, weight in exported.items()} == dict.fromkeys(expected, torch.float32)
    assert all(torch.equal(weight, expected[name]) for name, weight in exported.items())
    assert len(lossy) < len(held), "bfloat16 reaches below the smallest numbers of float16"
