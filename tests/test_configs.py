"""Every file in configs/ parses, and says of itself what the documentation says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TOP = sorted((ROOT / "configs").glob("*.yaml"))
CONFIGS = [path for path in TOP if "trainer" in yaml.safe_load(path.read_text())]
"""Those of the Trainer's commands; the others are of `evaluate` and `pipeline`."""
OVERLAYS = sorted((ROOT / "configs" / "hardware").glob("*.yaml"))
QUICKSTART = sorted((ROOT / "configs" / "quickstart").glob("*.yaml"))
SMOLLM2 = sorted((ROOT / "configs" / "smollm2").glob("*.yaml"))
SELF_TAUGHT = sorted((ROOT / "configs" / "self_taught").glob("*.yaml"))
LLAMA = sorted((ROOT / "configs" / "llama3_8b").glob("*.yaml"))


@pytest.mark.parametrize(
    "path", TOP + QUICKSTART + SMOLLM2 + SELF_TAUGHT + OVERLAYS + LLAMA, ids=lambda path: path.name
)
def test_header_gives_the_command_that_runs_the_file(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert any(re.search("rlhf-lightning (fit|contrast|judge|evaluate|pipeline) --config", line) for line in header)
    assert any(str(path.relative_to(ROOT)) in line for line in header)


def test_reward_model_is_the_mission_s_run():
    config = yaml.safe_load((ROOT / "configs" / "reward_model.yaml").read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert model["backbone"] == "Qwen/Qwen2-0.5B"
    assert model["optimizer"]["init_args"]["lr"] == 2e-5
    assert (data["batch_size"], trainer["accumulate_grad_batches"], trainer["max_epochs"]) == (8, 8, 5)
    assert (trainer["devices"], trainer["strategy"], trainer["precision"]) == (1, "zero2", "16-mixed")
    callbacks = {callback["class_path"]: callback["init_args"] for callback in reversed(trainer["callbacks"])}
    for name in ("ModelCheckpoint", "EarlyStopping"):
        assert callbacks[name]["monitor"] == "val/auroc"
        assert callbacks[name]["mode"] == "max"


def test_dpo_is_the_mission_s_run():
    config = yaml.safe_load((ROOT / "configs" / "dpo.yaml").read_text())
    model, data, trainer = config["model"]["init_args"], config["data"]["init_args"], config["trainer"]
    assert config["model"]["class_path"] == "DPO"
    assert model["backbone"] == "meta-llama/Meta-Llama-3-8B-Instruct"
    assert (model["loss_type"], model["beta"], model["optimizer"]["init_args"]["lr"]) == ("sigmoid", 0.1, 5e-5)
    assert (data["batch_size"], trainer["accumulate_grad_batches"]) == (4, 16)
    assert model["lora"]["r"] == 16, "adapters, hence ten times the rate of whole weights"
    assert (trainer["devices"], trainer["strategy"], trainer["precision"]) == (1, "zero2", "16-mixed")
    assert trainer["logger"]["class_path"] == "TensorBoardLogger"
    callbacks = {callback["class_path"]: callback["init_args"] for callback in trainer["callbacks"]}
    assert callbacks["ExportBest"]["directory"] == "models/rl_policy"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_sets_the_hardware_alone(overlay):
    assert set(yaml.safe_load(overlay.read_text())) == {"trainer"}
    hardware = {"accelerator", "devices", "num_nodes", "strategy", "precision"}
    assert set(yaml.safe_load(overlay.read_text())["trainer"]) <= hardware
