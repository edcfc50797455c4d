"""Runs that begin as a model with LoRA adapters: SFT with LoRA first, then DPO with new adapters."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import AutoModelForCausalLM

from rlhf_lightning import DPO
from rlhf_lightning.commands.export import export_checkpoint
from rlhf_lightning.errors import ModelError
from rlhf_lightning.training.callbacks import ExportBest
from rlhf_lightning.training.results import Results
from tests.models.test_adapters import IDS, write_adapters
from tests.training.conftest import build_dpo, pairs, sgd, trainer  # noqa: F401 (fixtures)
from tests.training.test_reward_model import LossLog

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing", "ignore:.*tie_word_embeddings")
LORA = {"lora": {"r": 4, "lora_alpha": 8.0}, "optimizer": sgd(0.05)}


@pytest.fixture(scope="module")
def sft(tiny_qwen2, tmp_path_factory):
    """Adapters as after SFT, and the logits of their model on `IDS`."""
    directory = tmp_path_factory.mktemp("sft") / "adapters"
    return directory, write_adapters(tiny_qwen2, directory)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("model", [LORA, {}], ids=["new adapters", "all weights"])
def test_dpo_from_adapters_starts_at_ln_2_against_their_merged_model(build_dpo, trainer, sft, model):  # noqa: F811
    directory, expected = sft
    log = LossLog()
    module, data = build_dpo(model=model | {"backbone": str(directory)})
    trainer(callbacks=[log], max_steps=1, limit_val_batches=0).fit(module, data)
    assert log.losses[0] == pytest.approx(math.log(2), abs=1e-6)
    if model:
        with module.policy.adapters_off():
            reference = logits(module.policy.model)
    else:
        reference = logits(module.reference.network.model)
    torch.testing.assert_close(reference, expected, rtol=1e-5, atol=1e-5)


def test_what_dpo_exports_is_the_base_with_both_adapters(
    build_dpo,  # noqa: F811
    trainer,  # noqa: F811
    sft,
    tmp_path,
    tiny_qwen2,
    forked_proof,
):
    directory, before = sft
    save = ModelCheckpoint(tmp_path / "checkpoints", filename="last")
    module, data = build_dpo(model=LORA | {"backbone": str(directory)})
    trainer(callbacks=[Results(), save], enable_checkpointing=True).fit(module, data)
    export_checkpoint(save.best_model_path, tmp_path / "out")
    found = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    base = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.float32)
    weights = dict(base.named_parameters())
    for file in (directory, None):  # W + (alpha / r) B A, of both pairs of adapters, by hand
        for name, delta in (stored_deltas(file) if file else trained_deltas(module)).items():
            weights[name].data += delta
    torch.testing.assert_close(found, logits(base), rtol=1e-5, atol=1e-5)
    assert (found - before).abs().max() > 0.01, "DPO is to have changed something"
    assert "base_model" not in (tmp_path / "out" / "README.md").read_text()
    again = DPO.load_from_checkpoint(save.best_model_path)
    torch.testing.assert_close(logits(again.policy.model), found, rtol=0, atol=1e-4)
    with pytest.raises(ModelError, match="itself adapters"):
        export_checkpoint(save.best_model_path, tmp_path / "second", merge=False)


def stored_deltas(directory) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    tensors = load_file(directory / "adapter_model.safetensors")
    return deltas(tensors, scale=8 / 4)


def trained_deltas(module: DPO) -> dict[str, torch.Tensor]:
    tensors = {name.replace(".default", ""): weight.detach() for name, weight in module.policy.model.named_parameters()}
    return deltas(tensors, scale=8 / 4)


def deltas(tensors: dict[str, torch.Tensor], *, scale: float) -> dict[str, torch.Tensor]:
    found = {}
    for name, first in tensors.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").replace(".lora_A", "")
            found[layer] = scale * tensors[name.replace("lora_A", "lora_B")] @ first
    return found


def test_adapters_alone_on_top_of_adapters_are_refused_before_training(build_dpo, trainer, sft, tmp_path):  # noqa: F811
    module, data = build_dpo(model=LORA | {"backbone": str(sft[0])})
    with pytest.raises(ModelError, match="itself adapters"):
        trainer(callbacks=[ExportBest(str(tmp_path / "out"), merge=False)], enable_checkpointing=True).fit(module, data)


def test_four_bit_weights_below_adapters_are_refused_before_the_data_is_read(sft):
    with pytest.raises(ModelError, match="load_in_4bit"):
        DPO(backbone=str(sft[0]), load_in_4bit=True, lora={"r": 4})
