"""Preference pairs for training and evaluation, from a source to padded batches."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from rlhf_lightning.data.chat_format import ChatFormat, load_tokenizer
from rlhf_lightning.data.examples import LoadReport, OnBadRows
from rlhf_lightning.data.loader import BatchLoader, EvaluationPlan, TrainingPlan, collate_pairs
from rlhf_lightning.data.sources import Source, Split, WeightedSource, has_split, source_list
from rlhf_lightning.data.splitting import held_out
from rlhf_lightning.data.statistics import contradictions, duplicates, longer_chosen, shared_prompts
from rlhf_lightning.data.tokenization import PairStore, TokenizedPairs, Truncation, select_pairs, tokenize_source
from rlhf_lightning.errors import ConfigurationError, DataError

log = logging.getLogger(__name__)
Role = Literal["train", "val", "test"]


class PreferenceDataModule(LightningDataModule):
    """Preference pairs as right-padded `PreferenceBatch`es, chosen and rejected in one forward.

    Args:
        train: File (.jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet), directory, hub data set (`owner/name` or
            `owner/name:split`), or `builtin:courtesy`; or a list of them, where `{source: FILE, weight: 0.5}` takes
            half of a source's pairs in each epoch, and `weight: 2` each twice.
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
        template_arguments: Handed to the template, such as `{enable_thinking: false}` or `{date_string: 26 Jul 2024}`.
        val_fraction: Share of prompts held out when no validation pairs are given.
        max_train_pairs: Train on so many pairs, chosen at random by the seed; all when not given.
        shuffle: A new order each epoch, from the seed and the epoch; false keeps the file's order.
        group_by_length: Put pairs of like length into one forward pass, within an optimizer step. Changes no result.
        seed: Of the order and of `max_train_pairs`; the run's `seed_everything` when not given, else 0.
        num_workers: Processes that make batches; 0 makes them in the training process.
        cache_dir: Where token ids are kept between runs; `~/.cache/rlhf_lightning/tokens` when not given.
        trust_remote_code: Run code that comes with the tokenizer.
    """

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        test: Source | None = None,
        tokenizer: str | None = None,
        max_length: PositiveInt = 1024,
        batch_size: PositiveInt = 8,
        eval_batch_size: PositiveInt | None = None,
        columns: dict[str, str] | None = None,
        on_bad_rows: OnBadRows = "error",
        truncation: Truncation = "keep_response",
        chat_template: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        val_fraction: OpenUnitInterval = 0.1,
        max_train_pairs: PositiveInt | None = None,
        shuffle: bool = True,
        group_by_length: bool = True,
        seed: NonNegativeInt | None = None,
        num_workers: NonNegativeInt = 0,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.sources = {
            role: None if source is None else source_list(source)
            for role, source in (("train", train), ("val", val), ("test", test))
        }
        self.tokenizer_source = tokenizer
        self.max_length = max_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.columns = columns
        self.on_bad_rows = on_bad_rows
        self.truncation = truncation
        self.chat_template = chat_template
        self.template_arguments = template_arguments
        self.val_fraction = val_fraction
        self.max_train_pairs = max_train_pairs
        self.shuffle = shuffle
        self.group_by_length = group_by_length
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.trust_remote_code = trust_remote_code
        self.pairs: dict[Role, TokenizedPairs] = {}
        """Tokenized pairs by role, once `setup` has run."""
        self.reports: dict[Role, LoadReport] = {}
        """What became of the rows of each role's sources; those divided by prompt share a report."""
        self.chat_format: ChatFormat | None = None
        self._train_loader: BatchLoader | None = None
        self._resume_position: dict[str, int] | None = None
        for role in ("val", "test"):
            if any(source.weight != 1 for source in self.sources[role] or ()):
                raise ConfigurationError(f"data.{role}: a weight would count pairs more than once; leave it out")

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs, or find it in the cache. Raises `DataError` or `ModelError`."""
        if self.chat_format is None:
            if self.tokenizer_source is None:
                raise ConfigurationError("data.tokenizer: give the hub name or directory of a tokenizer")
            tokenizer = load_tokenizer(self.tokenizer_source, trust_remote_code=self.trust_remote_code)
            self.chat_format = ChatFormat(
                tokenizer, chat_template=self.chat_template, template_arguments=self.template_arguments
            )
        roles: tuple[Role, ...] = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
        new = [role for role in roles if role not in self.pairs]
        for role in new:
            self.pairs[role], self.reports[role] = self._selected(role)
            self._log_counts(role)
        if new and stage == "fit":
            self._log_statistics()

    def train_dataloader(self) -> BatchLoader:
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
            source=self.pairs["train"].source,
            weights=[source.weight for source in self.sources["train"]],
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

    def val_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, role: Role) -> BatchLoader:
        assert self.trainer is not None
        plan = EvaluationPlan(
            self.pairs[role].lengths,
            batch_size=self.eval_batch_size,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        return self._loader(role, plan)

    def _loader(self, role: Role, plan: TrainingPlan | EvaluationPlan) -> BatchLoader:
        assert self.chat_format is not None
        return BatchLoader(
            functools.partial(collate_pairs, pairs=self.pairs[role], pad_id=self.chat_format.pad_id),
            plan,
            num_workers=self.num_workers,
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
        )

    def _selected(self, role: Role) -> tuple[TokenizedPairs, LoadReport]:
        """The pairs of a role: from its own sources, or divided off the training sources by prompt."""
        sources, split, part = self._origin(role)
        stores = [self._store(source, split) for source in sources]
        for store in stores:
            store.report.enforce(self.on_bad_rows)
        masks = [np.ones(len(store), dtype=bool) for store in stores]
        if part is not None:
            held = [held_out(store.numbers("prompt_hash"), val_fraction=self.val_fraction) for store in stores]
            masks = [~mask for mask in held] if part == "train" else held
            if not any(mask.any() for mask in masks):
                raise DataError(
                    f"splitting {sum(map(len, stores))} pairs by prompt with val_fraction {self.val_fraction} leaves "
                    f"no {'training' if part == 'train' else 'validation'} pair; give a validation file with "
                    "val: FILE, or another val_fraction"
                )
        pairs, report = select_pairs(stores, masks, max_length=self.max_length, truncation=self.truncation)
        if role == "train" and self.max_train_pairs is not None and self.max_train_pairs < len(pairs):
            chosen = np.random.default_rng(self.seed).permutation(len(pairs))[: self.max_train_pairs]
            pairs = pairs.taken(np.sort(chosen))
        return pairs, report

    def _origin(self, role: Role) -> tuple[Sequence[WeightedSource], Split, Literal["train", "val"] | None]:
        """Sources of a role, the split to read of them, and the part of it where they are divided by prompt."""
        if (own := self._own_sources(role)) is not None and role != "train":
            return own, role, None
        if role == "test":
            return self._origin("val")
        divided = self._own_sources("val") is None
        return self.sources["train"], "train", role if divided else None

    def _own_sources(self, role: Role) -> Sequence[WeightedSource] | None:
        """The sources given for a role, or the training directories that have files for it."""
        if self.sources[role] is not None:
            return self.sources[role]
        return [source for source in self.sources["train"] if has_split(source.source, role)] or None

    def _store(self, source: WeightedSource, split: Split) -> PairStore:
        return tokenize_source(source, self.chat_format, columns=self.columns, split=split, cache_dir=self.cache_dir)

    def _log_counts(self, role: Role) -> None:
        pairs, report = self.pairs[role], self.reports[role]
        cut = f"; {len(report.rows_cut)} prompts cut to fit max_length {self.max_length}" if report.rows_cut else ""
        log.info("%s: %d pairs (%s%s)", role, len(pairs), report.summary(), cut)

    def _log_statistics(self) -> None:
        """What may spoil the numbers of a run, in one line."""
        train, val = self.pairs["train"], self.pairs["val"]
        shared = len(shared_prompts(train, val))
        leak = "no prompt of val is trained on"
        if shared:
            leak = (
                f"{shared} of {len(val)} pairs of val have a prompt that is also trained on, so they are not held out"
            )
        log.log(
            logging.WARNING if shared else logging.INFO,
            "pairs: the longer response is chosen in %.1f %% of val; %d duplicates and %d contradictory pairs in train"
            "; %s (`rlhf-lightning doctor` shows which)",
            *(100 * longer_chosen(val), len(duplicates(train)), len(contradictions(train)), leak),
        )
