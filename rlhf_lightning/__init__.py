"""RLHF with PyTorch Lightning, the losses written by hand. The public names are imported on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_PUBLIC = {
    "DPO": "rlhf_lightning.training.dpo",
    "KTO": "rlhf_lightning.training.kto",
    "OnlineDPO": "rlhf_lightning.training.online_dpo",
    "PPO": "rlhf_lightning.training.ppo",
    "SFT": "rlhf_lightning.training.sft",
    "RewardModel": "rlhf_lightning.training.reward_model",
    "RewardNetwork": "rlhf_lightning.models.reward_network",
    "PreferenceDataModule": "rlhf_lightning.data.datamodules",
    "SFTDataModule": "rlhf_lightning.data.sft_datamodule",
    "UnpairedDataModule": "rlhf_lightning.data.unpaired_datamodule",
    "PromptDataModule": "rlhf_lightning.data.prompt_datamodule",
}
__all__ = [
    "DPO",
    "KTO",
    "PPO",
    "SFT",
    "OnlineDPO",
    "PreferenceDataModule",
    "PromptDataModule",
    "RewardModel",
    "RewardNetwork",
    "SFTDataModule",
    "UnpairedDataModule",
]

if TYPE_CHECKING:
    from rlhf_lightning.data.datamodules import PreferenceDataModule
    from rlhf_lightning.data.prompt_datamodule import PromptDataModule
    from rlhf_lightning.data.sft_datamodule import SFTDataModule
    from rlhf_lightning.data.unpaired_datamodule import UnpairedDataModule
    from rlhf_lightning.models.reward_network import RewardNetwork
    from rlhf_lightning.training.dpo import DPO
    from rlhf_lightning.training.kto import KTO
    from rlhf_lightning.training.online_dpo import OnlineDPO
    from rlhf_lightning.training.ppo import PPO
    from rlhf_lightning.training.reward_model import RewardModel
    from rlhf_lightning.training.sft import SFT


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
