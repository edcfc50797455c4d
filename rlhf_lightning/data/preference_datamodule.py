"""Preference pairs for training and evaluation, from a source to padded batches."""

from __future__ import annotations

import copy
import logging
import os
from typing import Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from rlhf_lightning.data.examples import LoadReport, OnBadRows, PreferenceExample
from rlhf_lightning.data.loader import EvaluationPlan, PairLoader, TrainingPlan
from rlhf_lightning.data.preferences import load_preferences
from rlhf_lightning.data.sources import has_split
from rlhf_lightning.data.splitting import shared_prompts, split_by_prompt
from rlhf_lightning.data.tokenization import (
    ChatFormat,
    TokenizedPairs,
    Truncation,
    load_tokenizer,
    tokenize_pairs,
)
from rlhf_lightning.errors import ConfigurationError

log = logging.getLogger(__name__)
Role = Literal["train", "val", "test"]


class PreferenceDataModule(LightningDataModule):
    """Preference pairs as right-padded `PreferenceBatch`es, chosen and rejected in one forward.

    Args:
        train: File (.jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet), directory, hub data set (`owner/name` or
            `owner/name:split`), or `builtin:courtesy`.
        val: Held-out pairs, a source like `train`. Without it: the directory's own val file, or a part of `train`
            divided off by prompt.
        test: Pairs for `test` and `predict`. Without it: the directory's own test file, or the validation pairs.
        tokenizer: Hub name or directory. The command line fills in the model's backbone.
        max_length: Longest row in tokens: prompt, response and terminator.
        batch_size: Pairs in one forward pass on one device; two rows each.
        eval_batch_size: The same for validation, test and predict; `batch_size` when not given.
        columns: Our names (prompt, chosen, rejected, margin, id) to the file's columns.
        on_bad_rows: `error` refuses a source with unusable rows and names them; `drop` leaves them out and counts them.
        truncation: For pairs over max_length. `keep_response` cuts the prompt from the left and drops what still does
            not fit; `drop` drops the pair; `error` refuses the source.
        chat_template: A Jinja file, or `transcript` for plain `Human: ... Assistant: ...`; the tokenizer's own template
            when not given (`transcript` where it has none).
        val_fraction: Share of prompts held out when no validation pairs are given.
        max_train_pairs: Train on so many pairs, chosen at random by the seed; all when not given.
        shuffle: A new order each epoch, from the seed and the epoch; false keeps the file's order.
        group_by_length: Put pairs of like length into one forward pass, within an optimizer step. Changes no result.
        seed: Of the order and of `max_train_pairs`; the run's `seed_everything` when not given, else 0.
        num_workers: Processes that make batches; 0 makes them in the training process.
        trust_remote_code: Run code that comes with the tokenizer.
    """

    def __init__(
        self,
        train: str,
        val: str | None = None,
        test: str | None = None,
        tokenizer: str | None = None,
        max_length: PositiveInt = 1024,
        batch_size: PositiveInt = 8,
        eval_batch_size: PositiveInt | None = None,
        columns: dict[str, str] | None = None,
        on_bad_rows: OnBadRows = "error",
        truncation: Truncation = "keep_response",
        chat_template: str | None = None,
        val_fraction: OpenUnitInterval = 0.1,
        max_train_pairs: PositiveInt | None = None,
        shuffle: bool = True,
        group_by_length: bool = True,
        seed: NonNegativeInt | None = None,
        num_workers: NonNegativeInt = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.sources: dict[Role, str | None] = {"train": train, "val": val, "test": test}
        self.tokenizer_source = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.columns = columns
        self.on_bad_rows = on_bad_rows
        self.truncation = truncation
        self.chat_template = chat_template
        self.val_fraction = val_fraction
        self.max_train_pairs = max_train_pairs
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_workers = num_workers
        self.trust_remote_code = trust_remote_code
        self.pairs: dict[Role, TokenizedPairs] = {}
        """Tokenized pairs by role, once `setup` has run."""
        self.reports: dict[Role, LoadReport] = {}
        """What became of the rows of each role's source."""
        self.chat_format: ChatFormat | None = None
        self._train_loader: PairLoader | None = None
        self._resume_position: dict[str, int] | None = None
        self._loaded: dict[tuple[str, Role], tuple[list[PreferenceExample], LoadReport]] = {}

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs. Raises `DataError` or `ModelError`."""
        if self.chat_format is None:
            if self.tokenizer_source is None:
                raise ConfigurationError("data.tokenizer: give the hub name or directory of a tokenizer")
            tokenizer = load_tokenizer(self.tokenizer_source, trust_remote_code=self.trust_remote_code)
            self.chat_format = ChatFormat(tokenizer, chat_template=self.chat_template)
        roles: tuple[Role, ...] = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
        new = [role for role in roles if role not in self.pairs]
        for role in new:
            self.pairs[role] = self._tokenized(role)
        if new and stage == "fit":
            self._log_shared_prompts()
        self._loaded.clear()  # the texts are not needed any more

    def train_dataloader(self) -> PairLoader:
        """Batches of the training pairs, weighted so that each pair of an optimizer step counts the same."""
        assert self.trainer is not None
        if any(isinstance(callback, GradientAccumulationScheduler) for callback in self.trainer.callbacks):
            raise ConfigurationError(
                "GradientAccumulationScheduler: the batches of an optimizer step are planned for one accumulation "
                "count; use trainer.accumulate_grad_batches"
            )
        plan = TrainingPlan(
            self.pairs["train"].lengths,
            batch_size=self.batch_size,
            accumulate=self.trainer.accumulate_grad_batches,
            shuffle=self.shuffle,
            group_by_length=self.group_by_length,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        self._train_loader = self._loader("train", plan)
        if self._resume_position is not None:
            self._train_loader.load_state_dict(self._resume_position)
        return self._train_loader

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The position in the training data, for the checkpoint.

        Lightning would restore the loader's state by itself, but not once a schedule has asked for the number of steps.
        """
        return {} if self._train_loader is None else {"train_loader": self._train_loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, dict[str, int]]) -> None:
        self._resume_position = state_dict.get("train_loader")

    def val_dataloader(self) -> PairLoader:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> PairLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> PairLoader:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, role: Role) -> PairLoader:
        assert self.trainer is not None
        plan = EvaluationPlan(
            self.pairs[role].lengths,
            batch_size=self.eval_batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return self._loader(role, plan)

    def _loader(self, role: Role, plan: TrainingPlan | EvaluationPlan) -> PairLoader:
        assert self.chat_format is not None
        return PairLoader(
            self.pairs[role],
            plan,
            pad_id=self.chat_format.pad_id,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def _tokenized(self, role: Role) -> TokenizedPairs:
        examples, report = self._read(role)
        taken = f"; {len(examples)} of them taken" if len(examples) < report.rows_kept else ""
        pairs = tokenize_pairs(
            examples,
            self.chat_format,
            report,
            max_length=self.max_length,
            truncation=self.truncation,
            on_bad_rows=self.on_bad_rows,
        )
        self.reports[role] = report
        cut = f"; {pairs.prompts_cut} prompts cut to fit max_length {self.max_length}" if pairs.prompts_cut else ""
        log.info("%s: %d pairs (%s%s%s)", role, len(pairs), report.summary(), taken, cut)
        for message in report.first_messages[:3]:
            log.info("  left out: %s", message)
        return pairs

    def _read(self, role: Role) -> tuple[list[PreferenceExample], LoadReport]:
        """The examples of a role: from its own source, or divided off the training source by prompt."""
        if role == "test" and self._source("test") is None:
            role = "val"
        if role == "test" or self._source("val") is not None:
            examples, report = self._load(self._source(role), role)
        else:
            examples, report = self._load(self.sources["train"], "train")
            train, val = split_by_prompt(examples, val_fraction=self.val_fraction)
            examples = train if role == "train" else val
        if role == "train" and self.max_train_pairs is not None and self.max_train_pairs < len(examples):
            chosen = np.random.default_rng(self.seed).permutation(len(examples))[: self.max_train_pairs]
            examples = [examples[index] for index in sorted(chosen)]
        return examples, copy.deepcopy(report)

    def _source(self, role: Role) -> str | None:
        """The source given for a role, or the training directory where it has files for that role."""
        given = self.sources[role]
        return self.sources["train"] if given is None and has_split(self.sources["train"], role) else given

    def _load(self, source: str, role: Role) -> tuple[list[PreferenceExample], LoadReport]:
        if (source, role) not in self._loaded:
            self._loaded[source, role] = load_preferences(
                source, columns=self.columns, on_bad_rows=self.on_bad_rows, split=role
            )
        return self._loaded[source, role]

    def _log_shared_prompts(self) -> None:
        train, val = self._read("train")[0], self._read("val")[0]
        if shared := shared_prompts(train, val):
            log.warning(
                "%d of %d validation pairs have a prompt that is also trained on: what they measure is not held out",
                shared,
                len(val),
            )
