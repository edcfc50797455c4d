"""Lightning's command line, fitted to this package: strict keys, short errors, bare class names."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlhf_lightning.commands.quiet import quieten
from rlhf_lightning.commands.refusals import OneLineParser
from rlhf_lightning.commands.trainer_checks import check_monitors, refuse_callbacks, refuse_wrong_numbers
from rlhf_lightning.data.datamodules import PreferenceDataModule
from rlhf_lightning.data.prompt_datamodule import PromptDataModule
from rlhf_lightning.data.sft_datamodule import SFTDataModule
from rlhf_lightning.data.unpaired_datamodule import UnpairedDataModule
from rlhf_lightning.errors import ConfigurationError, TrainingError, UserError, with_causes
from rlhf_lightning.files.disks import named_full_disk
from rlhf_lightning.files.locks import alone
from rlhf_lightning.files.yaml_text import bound_parsers, check_configurations, write_configuration
from rlhf_lightning.models.precision import allow_tf32
from rlhf_lightning.models.reward_network import is_reward_network
from rlhf_lightning.other_names import OTHER_NAMES
from rlhf_lightning.planning.planning import refuse_what_cannot_fit
from rlhf_lightning.planning.room_on_disk import RoomOnDisk
from rlhf_lightning.terminal import say
from rlhf_lightning.training.best import SavingOrder, how_to_resume, newest_checkpoint
from rlhf_lightning.training.callbacks import ExportBest, PredictionWriter, print_results
from rlhf_lightning.training.checkpoints import WholeFileIO, check_class, has_states, is_sharded, read_checkpoint
from rlhf_lightning.training.dpo import DPO
from rlhf_lightning.training.kto import KTO
from rlhf_lightning.training.module import TrainedModule
from rlhf_lightning.training.online_dpo import OnlineDPO
from rlhf_lightning.training.optimizer_names import take_torch_optimizers
from rlhf_lightning.training.overlays import replace_in_later_layers
from rlhf_lightning.training.own_directories import locks_of, take_version
from rlhf_lightning.training.ppo import PPO
from rlhf_lightning.training.progress_bar import shorten
from rlhf_lightning.training.results import Results
from rlhf_lightning.training.resume import LAST, ProcessStates, go_on_beside, is_requeued, resolve_last
from rlhf_lightning.training.reward_model import RewardModel
from rlhf_lightning.training.samples import Samples
from rlhf_lightning.training.sft import SFT
from rlhf_lightning.training.signals import Interrupted, SaveAtSignal
from rlhf_lightning.training.step_watch import StepWatch
from rlhf_lightning.training.trial import TrialStep
from rlhf_lightning.training.validation import ValidateOnce
from rlhf_lightning.training.zero import ZeroStrategy, corrected, register

log = logging.getLogger(__name__)

# Imported so that their bare names resolve in YAML and on the command line.
DATA = (PreferenceDataModule, SFTDataModule, UnpairedDataModule, PromptDataModule)
CLASSES = (RewardModel, DPO, KTO, SFT, PPO, OnlineDPO, *DATA, ExportBest, PredictionWriter, Samples)
register()
replace_in_later_layers()
take_torch_optimizers()
bound_parsers()
# What a run is told may hold an Enum (the default of Timer's interval), which no YAML has.
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


class Parser(OneLineParser, LightningArgumentParser):
    """Refuses abbreviated keys, and says what is wrong in one line, without a page of usage before it."""

    other_names = OTHER_NAMES

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)


class SaveConfig(SaveConfigCallback):
    """Writes `config.yaml` once the run has begun: a refused one leaves that of the run that it would resume."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pass

    def _save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Beside the checkpoints, where the logger has no directory: MLflow's at a database or a server."""
        directory = trainer.log_dir  # asked on every process: it is a broadcast
        if not trainer.is_global_zero:
            return
        if directory is None:
            saved = [c.dirpath for c in trainer.checkpoint_callbacks if getattr(c, "dirpath", None)]
            directory = Path(saved[0]).parent if saved else trainer.default_root_dir
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_configuration(Path(directory) / self.config_filename, self.parser.dump(self.config, skip_none=False))

    on_train_start = on_validation_start = on_test_start = on_predict_start = _save


class Program(LightningCLI):
    """`LightningCLI` with the package's own callbacks, and the tokenizer taken from the model where none is named."""

    _replace = False
    """Whether the run resumes from its last checkpoint, found by the program."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        # A run's config.yaml has the key, and is given to the other commands as it is.
        words = (
            "Run also what cannot fit into memory, as counted beforehand." if subcommand == "fit" else "Of `fit` alone."
        )
        parser.add_argument("--force", action="store_true", help=words)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # Lightning's own table would stand above ours
        return parser

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        plugins = self._get(self.config_init, "trainer.plugins") or []
        trainer = super().instantiate_trainer(
            plugins=[*(plugins if isinstance(plugins, list) else [plugins]), WholeFileIO()], **kwargs
        )
        if "ProgressBar" not in str(self._get(self.config, "trainer.callbacks")):
            shorten(trainer)
        for callback in trainer.callbacks:
            if isinstance(callback, SaveConfig):
                callback.config = self._to_save
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger._default_hp_metric = False  # a curve of one point, -1; `Results` logs what was reached
        states = next(callback for callback in trainer.callbacks if isinstance(callback, ProcessStates))
        trainer.callbacks.append(SaveAtSignal(states))  # behind those that save after a batch
        return trainer

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        data = config.get("data", {}).get("init_args", {})
        model = config.get("model", {}).get("init_args", {})
        if config.get("ckpt_path") in ("best", "hpc"):
            raise ConfigurationError(
                f"ckpt_path: {config.ckpt_path} names no checkpoint of an earlier run; give the file that fit named, "
                "or `last` to resume a run"
            )
        config.trainer.strategy, line = corrected(config.trainer.strategy)
        if line:
            log.warning("%s", line)
        if config.get("ckpt_path") == LAST:
            resolve_last(config)
            self._replace = True
        elif self.subcommand == "fit" and config.get("ckpt_path") is None and is_requeued():
            resolve_last(config, job=os.environ.get("SLURM_JOB_ID"))
            self._replace = True
        # Not `link_arguments`: a link would throw an explicit data.tokenizer away without a word.
        if "tokenizer" in data and data.get("tokenizer") is None:
            data["tokenizer"] = model.get("tokenizer") or model.get("backbone")
        self._to_save = config.clone()
        ckpt_path = config.get("ckpt_path")
        if ckpt_path not in (None, "best", "hpc"):
            read_checkpoint(ckpt_path, weights=False)
            if self.subcommand == "fit":  # not in what is saved: `test` with it must not write into the run's directory
                go_on_beside(config, Path(ckpt_path))

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's settings replace the given ones without a word; ours stay."""

    def _run_subcommand(self, subcommand: str) -> None:
        self._locks = ExitStack()
        signals = next(callback for callback in self.trainer.callbacks if isinstance(callback, SaveAtSignal))
        try:
            with signals.listening(self.trainer), self._locks:
                super()._run_subcommand(subcommand)
        except Interrupted as ended:
            if self.trainer.is_global_zero:
                say(f"rlhf-lightning: {self._where_interrupted(ended)}", file=sys.stderr)
            raise
        except Exception as error:
            self._advise(error)
            if isinstance(error, UserError):
                raise
            places = [each.log_dir for each in self.trainer.loggers if getattr(each, "log_dir", None)]
            if full := named_full_disk(error, places or [self.trainer.default_root_dir]):
                self._advise(full)
                raise full from error
            raise

    def _advise(self, error: Exception) -> None:
        """Let an error name the checkpoint to resume from, but where only other settings help."""
        if self.trainer.state.fn != TrainerFn.FITTING or isinstance(error, TrainingError):
            return
        if newest := newest_checkpoint(self.trainer):
            error.add_note(how_to_resume(newest))

    def _where_interrupted(self, ended: Interrupted) -> str:
        if self.subcommand != "fit":
            return "interrupted"
        checkpoint = ended.saved or newest_checkpoint(self.trainer) or self.config.fit.ckpt_path
        advice = how_to_resume(checkpoint) if checkpoint else "no checkpoint was saved yet"
        return f"interrupted at step {self.trainer.global_step}; {advice}"

    def before_fit(self) -> None:
        """Read the data and hold it against the model before anything is written or loaded."""
        refuse_wrong_numbers(self.trainer)
        refuse_callbacks(self.trainer)
        if allow_tf32(self.trainer.strategy.root_device, self.trainer.precision):
            log.info("float32 products of training are TF32; NVIDIA_TF32_OVERRIDE=0 makes them float32")
        if type(self.model) in CLASSES:  # one of the user's own may log what it likes
            check_monitors(self.trainer, self.model)
        self._check_checkpoint(self.config[self.subcommand].get("ckpt_path"))
        for callback in self.trainer.callbacks:
            if isinstance(callback, ProcessStates):
                callback.replace = self._replace
        if isinstance(self.model, TrainedModule):
            self.model.check_data(self.datamodule)
        self.datamodule.setup(self.subcommand)
        if isinstance(self.model, TrainedModule):
            self._check_model(self.model)
        else:
            log.warning(
                "warning: %s is not derived from rlhf_lightning.training.module.TrainedModule, so its data, memory and "
                "names of metrics are not checked beforehand",
                type(self.model).__name__,
            )
        if rank_zero_only.rank == 0 and not self.trainer.fast_dev_run:
            if self.subcommand != "fit":
                take_version(self.trainer)
            for lock, busy in locks_of(self.trainer) if self.subcommand == "fit" else ():
                self._locks.enter_context(alone(lock, busy))

    def _check_model(self, model: TrainedModule) -> None:
        """Hold a module against data and machine. Raises `ConfigurationError`."""
        model.check_data(self.datamodule)
        if self.subcommand == "fit":
            if not self.config.fit.force:
                refuse_what_cannot_fit(model, self.datamodule, self.config.fit.trainer, self.trainer.callbacks)
        elif self.config[self.subcommand].get("ckpt_path") is None:
            if isinstance(model, RewardModel) and not is_reward_network(model.backbone_config):
                log.warning("the head is untrained: give --ckpt_path, or a saved reward network as --model.backbone")
            else:
                log.info("no ckpt_path: this is %s as it was loaded", model.hparams.backbone)

    def _check_checkpoint(self, ckpt_path: str | None) -> None:
        """Refuse a checkpoint that this run cannot use, before any work. Raises `ConfigurationError`."""
        if ckpt_path in (None, "best", "hpc"):
            return
        check_class(ckpt_path, self.model)
        if self.subcommand == "fit" and not has_states(read_checkpoint(ckpt_path, weights=False)):
            raise ConfigurationError(
                f"ckpt_path: {ckpt_path} holds weights alone (save_weights_only), and no run can resume from them; "
                "export it and begin a new run with that as model.backbone"
            )
        if isinstance(self.trainer.strategy, ZeroStrategy):
            self.trainer.strategy.check_checkpoint(ckpt_path, fitting=self.subcommand == "fit")
        elif self.subcommand == "fit" and is_sharded(ckpt_path):
            raise ConfigurationError(
                f"ckpt_path: {ckpt_path} is a checkpoint of DeepSpeed; set trainer.strategy to zero2, or export it and "
                "begin a new run with that as model.backbone"
            )

    before_validate = before_test = before_predict = before_fit

    def after_validate(self) -> None:
        print_results(self.trainer)

    after_test = after_validate

    def after_fit(self) -> None:
        """Raises `TrainingError` where there was a model to write and none was written."""
        print_results(self.trainer)
        for callback in self.trainer.callbacks:
            if isinstance(callback, ExportBest) and callback.fault and not self.trainer.fast_dev_run:
                raise TrainingError(f"{callback.directory}: nothing was exported: {callback.fault}")


class ParsedRun(Program):
    """The settings of a run, parsed and checked, of which nothing is built or run."""

    def _set_seed(self) -> None:
        pass

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass

    @property
    def settings(self) -> Namespace:
        return self.config[self.subcommand]


def run(arguments: Sequence[str] | None = None, *, program: type[Program] = Program) -> Program:
    """Run `fit`, `validate`, `test` or `predict` with the given arguments (default: the process's).

    Raises `UserError` for everything that the user can mend.
    """
    quieten()
    arguments = _in_order(_with_settings(sys.argv[1:] if arguments is None else arguments))
    check_configurations(arguments)
    try:
        return program(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            save_config_callback=SaveConfig,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={
                "callbacks": [
                    Results(),
                    PredictionWriter(),
                    SavingOrder(),  # before what ValidateOnce measures, which it would forget
                    ValidateOnce(),
                    ProcessStates(),
                    StepWatch(),
                    TrialStep(),
                    RoomOnDisk(),
                ],
                "enable_model_summary": False,
            },
            args=arguments,
        )
    except UserError:
        raise
    except Exception as error:
        if (refusal := _refusal(error)) is None:
            raise
        raise refusal from error


def _refusal(error: Exception) -> UserError | None:
    """What a user can mend of what a library raised; None where it is a fault of ours."""
    if isinstance(error, MisconfigurationException) and "No supported gpu backend" in str(error):
        return ConfigurationError(
            "trainer.accelerator: gpu, and torch sees no GPU here; add --config configs/hardware/cpu.yaml or "
            "--trainer.accelerator cpu (which has no zero2), or install the torch build for your driver"
        )
    if isinstance(error, MisconfigurationException) and "when `check_val_every_n_epoch=None`" in str(error):
        return ConfigurationError(
            "trainer.val_check_interval: is a fraction of an epoch, but trainer.check_val_every_n_epoch is null, which "
            "counts batches over epochs; give a number of batches, or set trainer.check_val_every_n_epoch to 1"
        )
    if isinstance(error, MisconfigurationException):
        return ConfigurationError(str(error))
    if isinstance(error, RuntimeError) and str(error).startswith("Early stopping conditioned"):
        return ConfigurationError(f"EarlyStopping.monitor: {error}")
    if isinstance(error, RuntimeError) and "loading state_dict" in str(error):
        return ConfigurationError(
            f"ckpt_path: the checkpoint's weights are those of another model than the settings under model ({error})"[
                :300
            ]
        )
    if (library := type(error).__module__.split(".")[0]) in _LOGGING_LIBRARIES:
        return ConfigurationError(f"trainer.logger: {library}: {error}"[:400])
    for cause in with_causes(error) if isinstance(error, ValueError) else ():
        # the parser wraps what a constructor raises in a ValueError of its own
        if isinstance(cause, UserError):
            return cause
        if isinstance(cause, MisconfigurationException | ImportError) and cause.__cause__ is None:
            return ConfigurationError(str(cause)[:400])
    return None


def _with_settings(arguments: Sequence[str]) -> list[str]:
    """Arguments that choose a model: by themselves, or by the settings beside the checkpoint that is to be tested."""
    command, *rest = arguments or [""]
    given = {argument.partition("=")[0] for argument in rest}
    if any(key in ("-c", "--config", "--model", "-h") or key.endswith(("class_path", "help")) for key in given):
        return list(arguments)
    named = [value or following for key, value, following in _pairs(rest) if key == "--ckpt_path"]
    beside = [directory / "config.yaml" for name in named for directory in Path(name).absolute().parents[:2]]
    if command != "fit" and (found := next(filter(Path.is_file, beside), None)) is not None:
        log.info("settings: those of the run, %s", found)
        return [command, "--config", str(found), *rest]
    raise ConfigurationError(
        f"{command}: no model class was chosen; give --config FILE.yaml, as configs/reward_model.yaml, or "
        "--model RewardModel --data PreferenceDataModule"
        + ("" if command == "fit" else "; or the --ckpt_path of a run that has its config.yaml next to the checkpoints")
    )


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Of each argument what stands before and behind its `=`, and the argument that follows."""
    for argument, following in itertools.pairwise([*arguments, ""]):
        key, _, value = argument.partition("=")
        yield key, value, following


def _in_order(arguments: Sequence[str]) -> list[str]:
    """The command, its `--config` files, then the keys of the command line, which always win.

    The parser takes keys in their order: a class has to be named before its arguments, which it would discard.
    """
    command, *rest = arguments or [""]
    groups: list[list[str]] = []
    for argument in rest:
        if argument.startswith(("--", "-c")) or not groups:
            groups.append([])
        groups[-1].append(argument)

    def place(group: list[str]) -> int:
        name = group[0].partition("=")[0].removesuffix(".class_path").replace(".init_args", "")
        return {"-c": 0, "--config": 0, "--model": 1, "--data": 1, "--model.optimizer": 2}.get(name, 3)

    return [command, *(argument for group in sorted(groups, key=place) for argument in group)]


_LOGGING_LIBRARIES = ("mlflow", "wandb", "comet_ml", "neptune")
