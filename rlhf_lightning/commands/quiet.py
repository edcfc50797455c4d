"""What libraries say is left out of the terminal, which is for our own lines, the progress bar and results."""

from __future__ import annotations

import logging
import os
import sys
import threading
import warnings

from lightning_utilities.core.rank_zero import rank_zero_only

from rlhf_lightning.files.disks import full_disk
from rlhf_lightning.terminal import VisibleLines, search_no_gpu, visible_warning


def quieten() -> None:
    """Leave the terminal to the progress bar, our own lines and the results table."""
    import transformers

    search_no_gpu()
    # TensorBoard writes in a thread, whose error is raised again where it is next asked to write.
    others = threading.excepthook
    threading.excepthook = lambda ended: None if ended.exc_value and full_disk(ended.exc_value) else others(ended)
    warnings.formatwarning = visible_warning
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ours = logging.getLogger("rlhf_lightning")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(VisibleLines("%(message)s"))
    handler.addFilter(lambda record: _rank() == 0)
    ours.handlers = [handler]
    ours.setLevel(logging.INFO)
    # A loader without worker processes is meant: making a batch takes well under a millisecond.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Each run has its own directory, so a checkpoint always comes from another one.
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    # Shards are no part of the weights under any strategy with which an average is taken.
    warnings.filterwarnings("ignore", message="You're using the WeightAveraging callback with a model that overrides")
    # A checkpoint of PPO is meant to hold the weights after its steps.
    warnings.filterwarnings("ignore", message="Using ModelCheckpoint with manual optimization")
    # Our batches carry the position of each pair.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
    # Nothing is turned off: our plans give every epoch the same batches by themselves.
    warnings.filterwarnings("ignore", message="You requested to overfit but enabled")
    # It counts batches; ours are logged by optimizer steps, and a run of few steps has a warning of ours.
    warnings.filterwarnings("ignore", message="The number of training batches")
    # DeepSpeed's optimizer steps out of the sight of torch's schedules; `StepWatch` looks after them.
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    # Deprecations inside Lightning 2.6 and DeepSpeed 0.19 under torch 2.13.
    warnings.filterwarnings("ignore", message=".*torch.distributed.all_gather_into_tensor.* is deprecated")
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")


def _rank() -> int:
    """This process's number among those of a run, as Lightning says it once it is there."""
    given = getattr(rank_zero_only, "rank", None)
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))) if given is None else given
