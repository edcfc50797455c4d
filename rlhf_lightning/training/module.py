"""What the callbacks, checkpoints, planner and commands of the package know of a module, and what all modules share.

`TrainedModule` is that interface, `PolicyModule` the one with a causal language model. A module of your own derives
from one of them.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Protocol, Self, runtime_checkable

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.model_helpers import _restricted_classmethod, is_overridden
from torch import Tensor, nn

from rlhf_lightning.arguments import CheckedArguments
from rlhf_lightning.batches import Layout
from rlhf_lightning.data.chat_format import ChatFormat, load_chat_format
from rlhf_lightning.data.datamodules import chat_format_of
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.tokenized import Kind
from rlhf_lightning.data.tokenizer import TokenizerSource, has_tokenizer
from rlhf_lightning.errors import ConfigurationError, unwrapped
from rlhf_lightning.metrics import TokensPerSecond
from rlhf_lightning.models.backbones import AttentionImplementation, check_attention, chosen_layout
from rlhf_lightning.models.causal_lm import Lora
from rlhf_lightning.models.configuration import load_config
from rlhf_lightning.models.objects import ModelSource, check_has_name, is_nameless, name_for_checkpoints, prepared
from rlhf_lightning.models.packed_attention import layout_of
from rlhf_lightning.models.storage import replaced_model
from rlhf_lightning.terminal import Pace
from rlhf_lightning.training.checkpoints import (
    ORIGIN,
    chat_format_of_run,
    check_whole,
    save_format,
    store_origin,
    warn_of_other_settings,
)
from rlhf_lightning.training.checks import check_precision, check_tokens_fit
from rlhf_lightning.training.measures import Measured, named
from rlhf_lightning.training.opening import say_what_is_trained
from rlhf_lightning.training.optimization import (
    Fraction,
    OptimizerFactory,
    Schedule,
    begin_with_found_rate,
    check_optimizer,
    clip_scaled,
    optimizer_and_schedule,
)
from rlhf_lightning.training.references import ReferenceKind
from rlhf_lightning.training.results import Results

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

_LINES = 50
"""At most so many of a training in a log file, whatever `log_every_n_steps` is."""


@runtime_checkable
class Exportable(Protocol):
    """What `ExportBest` asks of a module: any LightningModule that can write its network has it."""

    hparams: Any

    def export(self, directory: str | Path, *, merge: bool = True) -> None: ...


class TrainedModule(CheckedArguments, LightningModule):
    """A module with one optimizer, a learning-rate schedule, metrics, and a network that can be exported.

    A class derived from it gives `build_network`, `training_step`, `trial_loss`, `measure` and `save_network`, and puts
    its metrics, by the names under which they are logged, into `train_metrics`, `val_metrics` and `test_metrics`.

    Args:
        backbone: What the network begins as: hub name or directory of a model, or `builtin:tiny`; in Python also a
            model of transformers, which is trained itself, not copied.
        optimizer: Any torch optimizer with its arguments, which has torch's defaults for the rest of them.
        lr_scheduler_type: Learning rate after the warm-up.
        warmup_ratio: Share of all optimizer steps in which the learning rate rises to its value.
        attn_implementation: Attention of transformers for padded rows, what it prefers when not given; or
            `flex_attention` for rows that are packed or shared, which else have torch's own kernels.
        layout: How the rows of a batch are computed: `padded`, `packed` (end to end, nothing on padding) or `shared`
            (what rows begin with in common, such as the prompt of a pair, once). `auto` is the last of them in which
            the model's rows have their own numbers, as measured when it is loaded; `padded` where attn_implementation
            is given.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about a third more time.
        trust_remote_code: Run code that comes with the model.
        tokenizer: Of exported models, and of data that names none; that of the backbone when not given.

    Raises `ConfigurationError` for impossible settings, and for a class without one of the methods it has to give.
    """

    rows_per_pair: ClassVar[int] = 2
    """Rows of a training pair in a forward pass."""
    learns_from_pairs: ClassVar[bool] = True
    """Whether a training step is one pass over a batch of pairs, forward and backward. The memory of other steps is
    neither tried out before training nor counted by `plan`, and they have no `trial_loss`."""
    data_kinds: ClassVar[tuple[Kind, ...]] = ("pairs",)
    """What its data may be."""
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    """Metrics of a validation in the progress bar."""
    total_steps: float = math.inf
    """Optimizer steps of the whole training, once its schedule is made."""
    log_line: ClassVar[dict[str, str]] = {"loss": "loss"}
    """Training metrics of a line in a log file, and their names in words."""
    objects: ClassVar[tuple[str, ...]] = ("optimizer", "backbone", "tokenizer")
    """Arguments that may be objects, which no checkpoint holds."""
    lora: Lora | None = None
    """The adapters that are trained in the place of all weights."""
    read_config: Callable[..., PretrainedConfig] = staticmethod(load_config)
    """Reads the configuration of the backbone, and refuses models of another kind."""

    def __init__(
        self,
        backbone: ModelSource,
        optimizer: OptimizerCallable = lambda params: torch.optim.Adam(params, lr=1e-5),
        lr_scheduler_type: Schedule = "linear",
        warmup_ratio: Fraction = 0.03,
        attn_implementation: AttentionImplementation | None = None,
        layout: Layout = "auto",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        tokenizer: TokenizerSource | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=[*self.objects])
        self._check_complete()
        check_optimizer(optimizer)
        check_attention(attn_implementation)
        chosen_layout(layout, attn_implementation)
        self.optimizer_factory = OptimizerFactory(optimizer)
        if isinstance(backbone, str):
            check_has_name(name := backbone, type(self).__name__)
            self.backbone_config: PretrainedConfig = self.read_config(backbone, trust_remote_code=trust_remote_code)
        else:
            backbone = prepared(backbone, attn_implementation=attn_implementation)
            name = name_for_checkpoints(backbone, trust_remote_code=trust_remote_code)
            self.backbone_config = backbone.config
        self._backbone = (backbone,)  # in a tuple: an attribute would be a part of the module, and of its checkpoints
        self._given_tokenizer = tokenizer
        named_by = tokenizer if tokenizer is None or isinstance(tokenizer, str) else tokenizer.name_or_path or None
        self.save_hyperparameters({"backbone": name, "tokenizer": named_by})
        self.tokenizer = tokenizer if tokenizer is not None else None if is_nameless(name) else name
        """Of data that names none: hub name, directory or object."""
        self.chat_format: ChatFormat | None = None
        """That of the data, once there is any."""
        self._origin: dict[str, Any] | None = None
        self.train_metrics, self.val_metrics, self.test_metrics = nn.ModuleDict(), nn.ModuleDict(), nn.ModuleDict()
        self.throughput: TokensPerSecond | None = None
        """Counts the tokens of the training, where the module feeds it."""
        self.logged_step = 0
        """The optimizer step of the last line of the training log."""
        self._built = False
        self.lr: float | None = None
        """A learning rate in the place of the optimizer's own, such as Lightning's Tuner finds."""

    def _check_complete(self) -> None:
        needed = ["training_step", "save_network", *(["trial_loss"] if self.learns_from_pairs else [])]
        needed += [] if is_overridden("validation_step", self, TrainedModule) else ["measure"]
        parents = {"training_step": LightningModule}
        missing = [name for name in needed if not is_overridden(name, self, parents.get(name, TrainedModule))]
        if missing:
            raise ConfigurationError(
                f"{type(self).__name__}: does not define {', '.join(missing)}, which a module of this package must "
                "have; see the docstring of rlhf_lightning.training.module.TrainedModule"
            )

    @property
    def backbone(self) -> ModelSource:
        """As it was given: a name, or an object."""
        return self._backbone[0]

    # ---- what a class may or must give

    @property
    def trained_network(self) -> nn.Module:
        """What is trained and exported; all of the module when not overridden."""
        return self

    @property
    def reference_kind(self) -> ReferenceKind:
        """How a reference is held in memory; `none` when not overridden."""
        return "none"

    def build_network(self) -> None:
        """Load what is trained; called once."""

    def check_data(self, data: LightningDataModule | None) -> None:
        """Check that the data's tokens fit the backbone. Raises `ConfigurationError` when they cannot."""
        config = self.backbone_config.get_text_config()
        check_tokens_fit(data, config, self.hparams.backbone, kinds=self.data_kinds)

    def trial_loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch of training pairs, of which nothing is logged."""
        raise NotImplementedError

    def measure(self, batch: Any, stage: Role) -> Measured:
        """What a batch gives to the metrics of the validation or test split."""
        raise NotImplementedError

    def save_network(self, directory: Path, *, merge: bool) -> None:
        """Write the network as a Hugging Face directory, adapters merged into its weights or by themselves."""
        raise NotImplementedError

    # ---- what they share

    @_restricted_classmethod  # as Lightning's, which refuses it on an instance: its weights would stay as they are
    def load_from_checkpoint(cls, checkpoint_path: str | Path | IO, *arguments: Any, **named: Any) -> Self:
        """As Lightning's. Raises `ConfigurationError` for a damaged checkpoint, and what the constructor raises."""
        if isinstance(checkpoint_path, str | os.PathLike) and os.path.exists(checkpoint_path):
            check_whole(checkpoint_path)
        with unwrapped():
            return super().load_from_checkpoint(checkpoint_path, *arguments, **named)

    def setup(self, stage: str) -> None:
        check_precision(self.trainer)
        self.check_data(self.trainer.datamodule)
        self.chat_format = chat_format_of(self.trainer.datamodule) or self.chat_format

    def configure_model(self) -> None:
        """Build the network, once."""
        if not self._built:
            self._built = True
            self.build_network()

    @property
    def loading(self) -> dict[str, Any]:
        """Arguments with which any model of the module is loaded."""
        layout = chosen_layout(self.hparams.layout, self.hparams.attn_implementation)
        return {name: self.hparams[name] for name in ("attn_implementation", "trust_remote_code")} | {"layout": layout}

    @property
    def layout(self) -> Layout:
        """How rows are computed by what is trained."""
        return layout_of(self.trained_network)

    def configure_optimizers(self) -> dict[str, Any]:
        return optimizer_and_schedule(self)

    def clip_gradients(self, optimizer: torch.optim.Optimizer, *given: Any, **named: Any) -> None:
        """As Lightning's, and under mixed precision also for torch's `fused` optimizers (see `clip_scaled`)."""
        if not clip_scaled(self.trainer, optimizer, *given, **named):
            super().clip_gradients(optimizer, *given, **named)

    def on_fit_start(self) -> None:
        self.logged_step = 0
        self.pace: Pace | None = None  # of a run that is resumed, not yet: it logs what it had done
        for metric in named(self.train_metrics).values():  # an earlier fit, or a search for a batch size, has fed them
            metric.reset()
        begin_with_found_rate(self)
        say_what_is_trained(self)

    def on_train_start(self) -> None:
        self.pace = Pace(self.trainer.global_step)

    def time_left(self) -> str:
        """`, about 40 s left` of the training, its validations included, as the end of a line; or nothing."""
        left = self.pace.left(self.trainer.global_step, self.total_steps) if self.pace is not None else ""
        return f", {left}" if left else ""

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.log_numbers()

    def log_numbers(self) -> dict[str, float] | None:
        """Every `log_every_n_steps` optimizer steps: means over all pairs, of all processes, since the last time.

        Logs `train/NAME` of the metrics, tokens per second where they were counted, peak memory on CUDA, and the
        learning rate, then resets them. Returns what was logged; None when it is not the time, or there is nothing.
        """
        trainer, metrics = self.trainer, named(self.train_metrics)
        step, every = trainer.global_step, trainer.log_every_n_steps
        if not metrics or every == 0 or step == self.logged_step or step % every:
            return None
        self.logged_step = step
        values = {f"train/{name}": metric.compute().item() for name, metric in metrics.items()}
        if self.throughput is not None and self.throughput.update_called:
            values["train/tokens_per_second"] = self.throughput.compute().item()
            self.throughput.reset()
        self.log_values(values)
        if "loss" in metrics:
            trainer.progress_bar_metrics.update({"loss": values["train/loss"]})
        steps = trainer.estimated_stepping_batches
        apart = every * max(1, math.ceil(steps / every / _LINES)) if math.isfinite(steps) else every
        if not sys.stderr.isatty() and step % apart == 0:  # a log file shows no progress bar
            numbers = ", ".join(f"{words} {values[f'train/{name}']:.4f}" for name, words in self.log_line.items())
            log.info("step %d/%d: %s%s", step, int(steps), numbers, self.time_left())
        for metric in metrics.values():
            metric.reset()
        return values

    def log_values(self, values: dict[str, float]) -> None:
        """Log numbers of the training at this step, with the learning rate and peak memory on CUDA (GiB)."""
        if self.device.type == "cuda":
            values["train/peak_memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        values["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
        self._let_monitor(values)
        for logger in self.loggers:
            logger.log_metrics(values, step=self.trainer.global_step)

    def _let_monitor(self, values: dict[str, float]) -> None:
        """Give numbers to the callbacks that monitor one, such as `EarlyStopping`, under their logged names."""
        self.trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})

    def on_validation_epoch_start(self) -> None:
        """When callbacks look at the training metrics: means since the last log, or those of the last log."""
        fed = {name: metric for name, metric in named(self.train_metrics).items() if metric.update_called}
        self._let_monitor({f"train/{name}": metric.compute().item() for name, metric in fed.items()})

    on_train_epoch_end = on_validation_epoch_start

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self._measure(batch, "val", self.val_metrics)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self._measure(batch, "test", self.test_metrics)

    def _measure(self, batch: Any, stage: Role, metrics: nn.ModuleDict) -> None:
        self.measure(batch, stage).feed(metrics)
        trainer = self.trainer
        # Lightning's own step of a validation is one behind, or more; `Results` gives the loggers the right one.
        ours = trainer.state.fn == TrainerFn.FITTING and any(isinstance(each, Results) for each in trainer.callbacks)
        for name, metric in metrics.items():
            options = {"prog_bar": name in self.shown, "logger": False if ours else None}
            self.log(f"{stage}/{name}", metric, on_step=False, on_epoch=True, **options)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        store_origin(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        warn_of_other_settings(self, checkpoint)
        self._origin = checkpoint.get(ORIGIN)

    def export(self, directory: str | Path, *, merge: bool = True) -> None:
        """Write network and tokenizer as a Hugging Face directory, adapters merged into the weights or by themselves.

        The tokenizer is that of the training, with its chat template. Raises `ModelError` and `ConfigurationError` as
        `replaced_model` and the network's `save_pretrained` do.
        """
        with replaced_model(directory) as made:
            self.save_network(made, merge=merge)
            chat_format = self.format_to_export()
            if chat_format is None:
                log.warning("%s: the model is written without a tokenizer; give the module one", directory)
            else:
                self.save_chat_format(chat_format, made)

    def save_chat_format(self, chat_format: ChatFormat, directory: Path) -> None:
        """Write the tokenizer of the training next to the network, and what the network has to know of it."""
        save_format(chat_format, directory)

    def format_to_export(self) -> ChatFormat | None:
        """The chat format of the data, of the run of the checkpoint that was loaded, or of `tokenizer`."""
        if self.chat_format is None:
            origin, trust = self._origin, self.hparams.trust_remote_code
            given = self._given_tokenizer
            if origin is not None:
                self.chat_format = chat_format_of_run(given or origin["tokenizer"], origin, trust_remote_code=trust)
            elif self.tokenizer is not None and (given is not None or has_tokenizer(self.hparams.backbone)):
                self.chat_format = load_chat_format(self.tokenizer, trust_remote_code=trust)
        return self.chat_format
