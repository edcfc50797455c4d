"""Lightning's command line, fitted to this package: strict keys, short errors, bare class names."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rlhf_lightning.data.preference_datamodule import PreferenceDataModule
from rlhf_lightning.errors import ConfigurationError, UserError
from rlhf_lightning.training.callbacks import ExportBest, PredictionWriter, Results, print_results
from rlhf_lightning.training.reward_model import RewardModel

# Imported so that their bare names resolve in YAML and on the command line.
CLASSES = (RewardModel, PreferenceDataModule, ExportBest, PredictionWriter)


class Parser(LightningArgumentParser):
    """Refuses abbreviated keys, and says what is wrong in one line, without a page of usage before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ConfigurationError(message) from ex


class Program(LightningCLI):
    """`LightningCLI` with the package's own callbacks, and the tokenizer taken from the model where none is named."""

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand in ("validate", "test"):
            parser.set_defaults(verbose=False)  # Lightning's own table would stand above ours
        return parser

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        data = config.get("data", {}).get("init_args", {})
        model = config.get("model", {}).get("init_args", {})
        # Not `link_arguments`: a link would throw an explicit data.tokenizer away without a word.
        if "tokenizer" in data and data.get("tokenizer") is None:
            data["tokenizer"] = model.get("backbone")

    def after_fit(self) -> None:
        print_results(self.trainer)

    after_validate = after_test = after_fit


def run(arguments: Sequence[str] | None = None) -> None:
    """Run `fit`, `validate`, `test` or `predict` with the given arguments (default: the process's).

    Raises `UserError` for everything that the user can mend.
    """
    _quieten()
    try:
        Program(
            LightningModule,
            LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_class=Parser,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"callbacks": [Results()], "enable_model_summary": False},
            args=None if arguments is None else list(arguments),
        )
    except MisconfigurationException as error:
        raise ConfigurationError(str(error)) from error


def _quieten() -> None:
    """Leave the terminal to the progress bar, our own lines and the results table."""
    import warnings

    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    ours = logging.getLogger("rlhf_lightning")
    if not ours.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        handler.addFilter(lambda record: rank_zero_only.rank == 0)
        ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    # A loader without worker processes is meant: making a batch takes well under a millisecond.
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Each run has its own directory, so a checkpoint always comes from another one.
    warnings.filterwarnings("ignore", message="The dirpath has changed")
    # Our batches carry the position of each pair.
    warnings.filterwarnings("ignore", message="Couldn't infer the batch indices")
    # A deprecation inside Lightning 2.6 under torch 2.13.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*LightningCLI's args parameter.*")
