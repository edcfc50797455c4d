"""Trains by this package what `trl_program.py` trains by TRL: python own_program.py JOB.json

Prints the same line of JSON. The package may be an earlier one: keys that it does not know are left out of the job.
"""

from __future__ import annotations

import json
import resource
import sys


def train(job: dict) -> list[float]:
    """Losses of the optimizer steps."""
    import lightning.pytorch as pl
    import torch
    from lightning.pytorch.loggers import Logger

    from rlhf_lightning import DPO, PreferenceDataModule, RewardModel

    torch.set_num_threads(1)
    settings = job["settings"]

    class Losses(Logger):
        name, version = "losses", 0

        def __init__(self) -> None:
            super().__init__()
            self.seen: list[float] = []

        def log_hyperparams(self, *arguments, **named) -> None:
            pass

        def log_metrics(self, metrics, step=None) -> None:
            self.seen += [metrics["train/loss"]] if "train/loss" in metrics else []

    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=settings["learning_rate"], weight_decay=0.0)

    shared = {"optimizer": adamw, "warmup_ratio": 0.0, job["schedule_key"]: "constant", **job["model_settings"]}
    if job["kind"] == "dpo":
        module = DPO(job["model"], beta=0.1, **shared)
    else:
        module = RewardModel(job["model"], **shared)
    data = PreferenceDataModule(
        job["pairs"],
        val=job["pairs"],
        tokenizer=job["model"],
        batch_size=settings["per_device_train_batch_size"],
        max_length=2048,
        cache_dir=job["output"],
    )
    losses = Losses()
    trainer = pl.Trainer(
        accelerator="cpu",
        precision="bf16-mixed" if job["bf16"] else "32-true",
        max_epochs=settings["num_train_epochs"],
        accumulate_grad_batches=settings["gradient_accumulation_steps"],
        gradient_clip_val=1.0,
        log_every_n_steps=1,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        logger=losses,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return losses.seen


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        losses = train(json.load(file))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"losses": losses, "seconds": used.ru_utime + used.ru_stime, "mib": used.ru_maxrss / 1024}))
