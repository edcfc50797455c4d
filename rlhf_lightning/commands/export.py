"""`rlhf-lightning export`: a checkpoint becomes a Hugging Face directory, which is then loaded again to prove it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import rlhf_lightning
from rlhf_lightning.commands.quiet import quieten
from rlhf_lightning.commands.settings import Arguments
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.files.adapters import check_base_of_others
from rlhf_lightning.files.disks import check_room
from rlhf_lightning.files.seals import exported_from
from rlhf_lightning.models.probe import log_probs, probe_rows
from rlhf_lightning.models.storage import check_free, check_other, replaced_model
from rlhf_lightning.terminal import say, short_path
from rlhf_lightning.training.callbacks import exported_bytes
from rlhf_lightning.training.checkpoints import ORIGIN, read_checkpoint
from rlhf_lightning.training.checks import trained_module
from rlhf_lightning.training.model_card import write_card
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.policy_module import PolicyModule

_LARGEST_DIFFERENCE = 1e-3
"""Of log-probs in nats, or of scores. Float32 rounding, merged adapters included, stays far below it."""

_UNITS = {"policy": "nats", "reward": "units of score"}

_PROOF = (
    "Loaded again in a fresh process, the largest difference to the trainer's own outputs on a probe of {} tokens is \
{:.3g} {}."
)


def run(arguments: Sequence[str]) -> int:
    """The command line of `export`. Returns 0; raises `UserError` for what the user can mend."""
    quieten()
    usage = "--ckpt_path FILE --out DIRECTORY [--merge true|false]"
    parser = Arguments(
        "export", usage, "Write a checkpoint as a Hugging Face directory, and load it again to prove it."
    )
    parser.add_argument("--ckpt_path", required=True, help="checkpoint of a run of fit")
    parser.add_argument("--out", required=True, help="directory to write; an earlier export there is replaced")
    parser.add_argument("--merge", choices=["true", "false"], default="true", help="merge LoRA adapters (default true)")
    given = parser.parse_args(arguments)
    replaced = exported_from(given.out)
    difference, unit = export_checkpoint(given.ckpt_path, given.out, merge=given.merge == "true")
    say(f"model:       {given.out}" + (f" (replaced the one from {replaced})" if replaced else ""))
    say(f"reloaded:    largest difference {difference:.2g} {unit} (see {Path(given.out) / 'README.md'})")
    return 0


def export_checkpoint(ckpt_path: str | Path, directory: str | Path, *, merge: bool = True) -> tuple[float, str]:
    """Write the model of a checkpoint, its tokenizer with the chat template of the training, and a model card.

    A fresh process loads the directory as a user would and computes the same probe. Returns the largest difference to
    the trainer's own outputs and its unit: nats of log-probability, or units of score.
    Raises `ConfigurationError` for what is no checkpoint, or a directory that holds something else, and `ModelError`
    when the run has changed no weight or diverged, or the directory does not load or gives other outputs.
    """
    stored = read_checkpoint(ckpt_path, weights=False)
    check_free(directory)
    if stored.get(ORIGIN, {}).get("class") not in rlhf_lightning.__all__:
        raise ConfigurationError(
            f"ckpt_path: {ckpt_path} is of no class of this version of the package; let ExportBest write the "
            "directory, or for a class of your own, in Python, Mine.load_from_checkpoint(path).export(directory)"
        )
    origin, settings = stored[ORIGIN], stored["hyper_parameters"]
    check_other(directory, backbone=settings.get("backbone"), reference=settings.get("reference"))
    if not merge and not settings.get("lora"):
        raise ConfigurationError(f"--merge false: the checkpoint {ckpt_path} has no adapters; leave it out")
    if not merge:
        check_base_of_others(settings["backbone"])
    module, _ = trained_module(getattr(rlhf_lightning, origin["class"]), ckpt_path)
    module.eval()
    expected, kind = _outputs(module)
    options = ["trust"] if module.hparams.trust_remote_code else []
    options += ["4bit"] if module.hparams.get("load_in_4bit") and not merge else []
    options += [module.layout]
    check_room(directory, exported_bytes(module, merge=merge), "the model")
    with replaced_model(
        directory, checkpoint=short_path(ckpt_path)
    ) as made:  # what is there stays until the new one is proved
        module.export(made, merge=merge)
        difference = (_reloaded_outputs(made, *options) - expected).abs().max().item()
        if not difference < _LARGEST_DIFFERENCE:
            raise ModelError(
                f"{directory}: loaded again, its outputs differ by {difference:.2g} {_UNITS[kind]} from the trainer's, "
                f"more than {_LARGEST_DIFFERENCE}; nothing was written. Export with --merge false if it has adapters"
            )
        name, unit = Path(directory).resolve().name, _UNITS[kind]
        write_card(made, name, stored, merged=merge, proof=_PROOF.format(int(probe_rows(1)[1].sum()), difference, unit))
    return difference, _UNITS[kind]


@torch.no_grad()
def _outputs(module: TrainedModule) -> tuple[Tensor, str]:
    """The trainer's outputs on the probe, and whether it is a `policy` or a `reward`."""
    if isinstance(module, PolicyModule):
        policy = module.trained_network
        return log_probs(policy.model, policy.config.get_text_config().vocab_size), "policy"
    return module.network(*probe_rows(module.network.backbone.config.vocab_size)), "reward"


def _reloaded_outputs(directory: Path, *options: str) -> Tensor:
    """The outputs of the directory on the probe, computed by a fresh process. Raises `ModelError`."""
    from safetensors.torch import load_file

    file = directory.with_name("outputs.safetensors")
    command = [sys.executable, "-m", "rlhf_lightning.models.probe", str(directory), str(file), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ModelError(f"export: what would be written does not load in a fresh process ({reason[:300]})")
    return load_file(file)["outputs"]
