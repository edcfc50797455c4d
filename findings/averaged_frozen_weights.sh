#!/usr/bin/env bash
# lightning 2.6.6, torch 2.13.0: EMAWeightAveraging changes weights that are frozen, and validates with the changed ones.
#
# The average is taken over all parameters, those without a gradient too. An exponential average of a value with itself
# is that value on paper; in float32 it is rounded at every update. So a base model under LoRA adapters does not stay
# what it was: validation measures adapters on a base model that is another one in its last bits, and a checkpoint that
# keeps the adapters alone, put on the original base model, does not give the numbers that were validated.
#
# Seen with lightning 2.6.6, torch 2.13.0+cpu (Python 3.11), decay 0.9, 20 steps:
#   frozen weights in the module: 1171 of 4096 changed
#   frozen weights in the average: 1171 of 4096 changed, by at most 2.4e-07 of their value
# (at the end of training the average is copied into the module; the count may differ between processors). Exits 0 while some change, and by less than 1e-5; 1 otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet lightning==2.6.6
cd "$work"
venv/bin/python - <<'PYTHON' 2>/dev/null
import sys
import warnings

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

warnings.simplefilter("ignore")


class Adapted(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.base, self.adapter = nn.Linear(64, 64, bias=False).requires_grad_(False), nn.Linear(64, 64)

    def training_step(self, batch, batch_idx):
        return self.adapter(self.base(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.adapter.parameters(), lr=0.1)


pl.seed_everything(0, verbose=False)
module, average = Adapted(), EMAWeightAveraging(decay=0.9)
before = module.base.weight.detach().clone()
seen = []


class Look(pl.Callback):
    def on_train_end(self, trainer, pl_module):
        seen.append(average._average_model.module.base.weight.detach().clone())


trainer = pl.Trainer(
    accelerator="cpu",
    max_steps=20,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
    callbacks=[Look(), average],
)
trainer.fit(module, DataLoader(torch.randn(160, 64), batch_size=8))
(averaged,) = seen
changed = (averaged != before).sum().item()
largest = ((averaged - before).abs() / before.abs()).max().item()
print(f"frozen weights in the module: {(module.base.weight != before).sum().item()} of {before.numel()} changed")
print(f"frozen weights in the average: {changed} of {before.numel()} changed, by at most {largest:.1e} of their value")
sys.exit(not (changed and largest < 1e-5))
PYTHON
