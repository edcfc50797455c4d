#!/usr/bin/env bash
# torchmetrics 1.9.0, torch 2.13.0: MeanMetric(nan_strategy="disable") takes weights and leaves them out, without a word.
#
# A loss that is averaged over batches of different sizes is logged with the size as its weight. nan_strategy="disable"
# is what one chooses on a GPU, since every other strategy looks at the values and so waits for the device at each update.
# With it the mean is that of the batches, each counted once, whatever their weights: a metric that changes with the batch
# size. The documentation says of it that checks for NaN are left out.
#
# Seen (Python 3.11, CPU), the mean of 1.0 with weight 3 and 5.0 with weight 1, which is 2:
#   warn 2.0
#   error 2.0
#   ignore 2.0
#   disable 3.0
# Exits 0 while "disable" alone gives 3.0; 1 otherwise.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet torchmetrics==1.9.0
cd "$work"
venv/bin/python - <<'PYTHON' 2>/dev/null
import sys

import torch
from torchmetrics import MeanMetric

found = {}
for strategy in ("warn", "error", "ignore", "disable"):
    metric = MeanMetric(nan_strategy=strategy)
    metric.update(torch.tensor(1.0), weight=torch.tensor(3.0))
    metric.update(torch.tensor(5.0), weight=torch.tensor(1.0))
    found[strategy] = metric.compute().item()
    print(strategy, found[strategy])
sys.exit(found != {"warn": 2.0, "error": 2.0, "ignore": 2.0, "disable": 3.0})
PYTHON
