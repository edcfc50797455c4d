"""Checkpoints: what one is, how it is written whole, and what it says of its origin, so that it can be exported
without its configuration.

A checkpoint of DeepSpeed is a directory: one file with the weights in half precision and all that Lightning stores, and
one of each process with its part of the optimizer's states and float32 weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import WeightAveraging

from rlhf_lightning.data.chat_export import save_tokenizer
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.chat_text import TRANSCRIPT
from rlhf_lightning.data.datamodules import DataModule, ResponseDataModule, chat_format_of
from rlhf_lightning.data.tokenizer import TokenizerSource, load_tokenizer
from rlhf_lightning.errors import ConfigurationError, reason_of, unwrapped
from rlhf_lightning.files.disks import free_bytes, full_disk, size
from rlhf_lightning.models.storage import end_at
from rlhf_lightning.terminal import search_no_gpu
from rlhf_lightning.training.results import Results

if TYPE_CHECKING:
    from rlhf_lightning.training.module import TrainedModule
    from rlhf_lightning.training.policy_module import PolicyModule

log = logging.getLogger(__name__)

ORIGIN = "rlhf_lightning"
"""Key of a checkpoint under which `store_origin` writes."""

_WEIGHTS = {"state_dict", "current_model_state"}
"""Keys of a checkpoint with weights; the second beside an average of them."""

_NO_CHECKPOINT = "cannot be read"

_SHARDS = "checkpoint"
"""Subdirectory of a DeepSpeed checkpoint with its files."""


class WholeFileIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and moves it there when it is complete and on the disk.

    Lightning's own writer collects it in memory, then in the directory for temporary files, which may be on another
    disk, from where it is copied and may be cut short.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Raises `ConfigurationError` when the disk is full or cannot be written; what was there before stays."""
        path = Path(path)
        half_written = part_of(path)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(half_written, "wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            half_written.replace(path)

    def load_checkpoint(self, path: str | Path, *arguments: Any, **named: Any) -> dict[str, Any]:
        """A checkpoint of DeepSpeed is put together, so that it can be tested without DeepSpeed's strategy.

        Raises `ConfigurationError` for a damaged one.
        """
        if is_sharded(path):
            return read_checkpoint(path)
        check_whole(path)
        return super().load_checkpoint(path, *arguments, **named)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Inside, a checkpoint is written: when it cannot be, what is half written is removed, and the reason is said."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer raises a RuntimeError of its own when the disk is full
        remove(part_of(path))
        reason = full_disk(error) or getattr(error, "strerror", None) or reason_of(error)
        reason += f"; {size(free_bytes(path))} are free" if full_disk(error) else ""
        raise ConfigurationError(
            f"{path}: the checkpoint could not be written ({reason}); earlier ones are untouched. Make room, or give "
            "another trainer.default_root_dir"
        ) from error


def part_of(path: Path) -> Path:
    """Where a checkpoint is while it is written."""
    return path.with_name(f".{path.name}.part")


def remove(path: Path) -> None:
    """Remove a checkpoint, file or directory, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def is_sharded(path: str | Path) -> bool:
    """Whether a checkpoint is a directory of DeepSpeed."""
    return (Path(path) / _SHARDS).is_dir()


def shard_files(path: str | Path) -> tuple[Path, list[Path]]:
    """The file with weights and the trainer's states of a DeepSpeed checkpoint, and those of its processes."""
    shards = Path(path) / _SHARDS
    return shards / "mp_rank_00_model_states.pt", sorted(shards.glob("*zero_pp_rank_*_optim_states.pt"))


def read_checkpoint(path: str | Path, *, weights: bool = True, verified: bool = True) -> dict[str, Any]:
    """A checkpoint of a run, its tensors mapped into memory; of a DeepSpeed checkpoint, float32 weights put together.

    Without `weights`, the `state_dict` of a DeepSpeed checkpoint holds names alone of half-precision weights. Without
    `verified`, the files are not read to their ends to compare their checksums. Raises `ConfigurationError` for
    anything else, and for a damaged one.
    """
    if not os.path.exists(path):
        raise ConfigurationError(f"ckpt_path: no checkpoint at {path}; give the one that fit named")
    sharded = is_sharded(path)
    if verified:
        check_whole(path)
    try:
        file = shard_files(path)[0] if sharded else path
        stored = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a directory, a text file, a file cut short: torch raises a type for each
        raise _unreadable(path) from error
    if sharded and isinstance(stored, dict) and "module" in stored:
        stored["state_dict"] = _float32_weights(path, stored) if weights else stored["module"]
    if not (isinstance(stored, dict) and "pytorch-lightning_version" in stored and "state_dict" in stored):
        raise ConfigurationError(f"ckpt_path: {path} is no checkpoint of a run; give the one that fit named")
    return stored


def _unreadable(path: str | Path) -> ConfigurationError:
    return ConfigurationError(f"ckpt_path: {path} cannot be read as a checkpoint; give the one that fit named")


def check_whole(path: str | Path) -> None:
    """Raise `ConfigurationError` for a checkpoint with a damaged file, or, of a DeepSpeed checkpoint, without one."""
    if (fault := fault_of(path)) is None:
        return
    if fault == _NO_CHECKPOINT and not is_sharded(path):
        raise _unreadable(path)
    raise ConfigurationError(
        f"ckpt_path: {path} is not whole ({fault}); its numbers are not those that were saved. Give another "
        "checkpoint: fit --ckpt_path last finds the newest whole one of its run"
    )


def fault_of(path: str | Path) -> str | None:
    """What is wrong with the files of a checkpoint, read to their ends, or None when it is whole.

    540 MB take 0.1 s of CPU; a file that has not changed since is not read again.
    """
    if not is_sharded(path):
        return _fault_of_file(Path(path))
    model_states, shards = shard_files(path)
    if (fault := _fault_of_file(model_states)) is not None:
        return fault
    processes = torch.load(model_states, map_location="cpu", weights_only=True, mmap=True)["dp_world_size"]
    if len(shards) != processes:
        return f"has {len(shards)} of the {processes} files of its processes"
    return next(filter(None, map(_fault_of_file, shards)), None)


def _fault_of_file(file: Path) -> str | None:
    try:
        stat = file.stat()
        return _damage(file, stat.st_ino, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        return f"{file.name}: {error.strerror or error}"


@functools.lru_cache(maxsize=1024)
def _damage(file: Path, *_of_this_state: int) -> str | None:
    """What is wrong with a file of torch, which has a checksum of each of its parts. Raises `OSError`."""
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
    except (IsADirectoryError, zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError, EOFError, zlib.error):
        # What is no archive, and whatever a damaged directory of one may say of its parts.
        return _NO_CHECKPOINT
    return None if broken is None else f"{file.name} is damaged at {broken}"


def restored_module(kind: type[LightningModule], path: str | Path) -> LightningModule:
    """The module of a checkpoint, file or DeepSpeed directory, float32, on the CPU. Raises `ConfigurationError`."""
    check_whole(path)
    if not is_sharded(path):
        return kind.load_from_checkpoint(path, map_location="cpu")
    from lightning.pytorch.core.saving import _load_state  # what load_from_checkpoint does with a file it has read

    with unwrapped():
        return _load_state(kind, read_checkpoint(path))


def _float32_weights(path: str | Path, stored: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The optimizer's float32 copies of the weights, of all processes together. Raises `ConfigurationError`."""
    search_no_gpu()
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ConfigurationError(
            f"ckpt_path: {path} is a checkpoint of DeepSpeed, which is not installed; pip install 'rlhf-lightning[gpu]'"
        ) from error
    without_frozen = stored["frozen_param_shapes"] is None
    # It tells what it does.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(
            str(path), tag=_SHARDS, exclude_frozen_parameters=without_frozen
        )


def store_origin(module: TrainedModule, checkpoint: dict[str, Any]) -> None:
    """Write into a checkpoint which class made it, from which data and how, and the data's tokenizer and template.

    Also what was measured of its weights. All of it is in checkpoints of the weights alone, too.
    """
    trainer, data = module.trainer, module.trainer.datamodule
    chat_format = chat_format_of(data)
    training = {"processes": trainer.world_size, "precision": str(trainer.precision)}
    training |= {
        "accumulate_grad_batches": int(trainer.accumulate_grad_batches),
        "seed": os.environ.get("PL_GLOBAL_SEED"),
    }
    if trainer.optimizers:
        group = trainer.optimizers[0].param_groups[0]
        training |= {
            "optimizer": type(trainer.optimizers[0]).__name__,
            "lr": float(group.get("initial_lr", group["lr"])),
        }
    if isinstance(data, ResponseDataModule) and "train" in data.rows:
        sources = [str(source.source) for source in data.sources["train"] or ()]
        rows = data.rows["train"]
        training |= {"data": sources, rows.kind: len(rows), "batch_size": int(data.batch_size)}
    checkpoint[ORIGIN] = {
        "class": type(module).__name__,
        "tokenizer": data.tokenizer_source if isinstance(data, DataModule) else None,
        "chat_template": chat_format.template if chat_format else None,
        "chat_template_kwargs": chat_format.chat_template_kwargs if chat_format else {},
        "training": training,
    }
    for callback in trainer.callbacks:
        if isinstance(callback, Results):
            checkpoint[ORIGIN]["measured"] = callback.record(trainer.global_step)
        elif isinstance(callback, WeightAveraging) and not has_states(checkpoint):
            # Lightning asks callbacks for whole checkpoints alone, so the average would be validated and not saved.
            callback.on_save_checkpoint(trainer, module, checkpoint)
            for name in ("current_model_state", "averaging_state"):
                checkpoint.pop(name, None)


def chat_format_of_run(
    tokenizer: TokenizerSource | None, origin: dict[str, Any], *, trust_remote_code: bool = False
) -> ChatFormat | None:
    """A tokenizer with the chat template of a checkpoint's run, so that a model is asked as it was trained.

    None without a tokenizer: the run had none, or one without a name.
    """
    if tokenizer is None:
        return None
    loaded = load_tokenizer(tokenizer, trust_remote_code=trust_remote_code) if isinstance(tokenizer, str) else tokenizer
    with_template = copy.copy(loaded)
    with_template.chat_template = origin["chat_template"]
    return ChatFormat(
        with_template,
        chat_template=TRANSCRIPT if origin["chat_template"] is None else None,
        chat_template_kwargs=origin.get("chat_template_kwargs"),  # checkpoints of before have none
    )


def save_format(chat_format: ChatFormat, directory: str | Path, *, scored: bool = False) -> None:
    """Write a tokenizer beside a model, which ends its responses where training did; see `save_tokenizer`."""
    save_tokenizer(chat_format, directory, scored=scored)
    end_at(directory, chat_format.eos_id)


def has_states(checkpoint: dict[str, Any]) -> bool:
    """Whether a checkpoint has what a run needs to go on, and not the weights alone."""
    return "callbacks" in checkpoint


def metrics_of(checkpoint: dict[str, Any]) -> dict[str, float]:
    """What was measured of the weights of a checkpoint; empty where they were not validated before it was written."""
    return checkpoint.get(ORIGIN, {}).get("measured", {}).get("metrics", {})


def store_adapters_alone(module: PolicyModule, checkpoint: dict[str, Any]) -> None:
    """Leave the weights below adapters out of a checkpoint; a hash of them stays. Call after `store_origin`."""
    if module.policy.has_adapters:
        trained = _trained(module)
        for key in checkpoint.keys() & _WEIGHTS:
            checkpoint[key] = {name: w for name, w in checkpoint[key].items() if name in trained}
        checkpoint[ORIGIN]["base"] = module.policy.base_fingerprint


def check_class(path: str | Path, module: LightningModule) -> None:
    """Raise `ConfigurationError` when a checkpoint is of another class of module."""
    made, now = read_checkpoint(path, weights=False).get(ORIGIN, {}).get("class"), type(module).__name__
    if made not in (None, now):
        raise ConfigurationError(
            f"ckpt_path: {path} is of a run of {made}, and this is {now}; to begin from its model, export it and give "
            "the directory as model.backbone"
        )


def warn_of_other_settings(module: TrainedModule, checkpoint: dict[str, Any]) -> None:
    """Say which settings of the model differ from those of the checkpoint's run."""
    before, now = checkpoint.get("hyper_parameters", {}), module.hparams
    names = [name for name in before.keys() & now.keys() if not name.startswith("_") and before[name] != now[name]]
    if names:
        changes = ", ".join(f"{name} {before[name]!r} -> {now[name]!r}" for name in sorted(names))
        log.warning("ckpt_path: its run had other settings: %s", changes)


def complete_adapters(module: PolicyModule, checkpoint: dict[str, Any]) -> None:
    """Put the module's own weights below the adapters of a checkpoint. Raises `ConfigurationError` for others."""
    if not module.policy.has_adapters:
        return
    if "state_dict" in checkpoint:  # DeepSpeed loads weights by itself, and keeps them back
        check_adapters(module, checkpoint["state_dict"].keys())
    if checkpoint[ORIGIN]["base"] != module.policy.base_fingerprint:
        raise ConfigurationError(
            "ckpt_path: the checkpoint's adapters belong to other weights than those of "
            f"{module.hparams.backbone}; give the model.backbone of its run, as it was then"
        )
    if "state_dict" not in checkpoint:
        return
    # Not the whole state_dict: 4-bit layers write entries that they cannot read.
    parameters = dict(module.named_parameters(remove_duplicate=False))
    names = parameters.keys() | dict(module.named_buffers(remove_duplicate=False)).keys()
    own = {name: weights for name, weights in module.state_dict().items() if name in names}
    for key in checkpoint.keys() & _WEIGHTS:
        checkpoint[key] = own | checkpoint[key]


def check_adapters(module: LightningModule, names: Set[str]) -> None:
    """Raise `ConfigurationError` when the weights of a checkpoint are others than a module's adapters."""
    if names != _trained(module):
        raise ConfigurationError(
            "ckpt_path: the checkpoint holds other weights than the adapters of model.lora; give the model.lora of its "
            "run"
        )


def _trained(module: LightningModule) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}
