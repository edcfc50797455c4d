"""Prompts for PPO and for generation, from a source to ragged batches."""

from __future__ import annotations

import functools
import logging
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch import LightningDataModule

from rlhf_lightning.data.batching import (
    BatchLoader,
    Stage,
    collate_prompts,
    evaluation_loader,
    run_seed,
    training_loader,
    training_position,
    training_state,
)
from rlhf_lightning.data.chat_format import ChatFormat, load_chat_format
from rlhf_lightning.data.examples import LoadReport, Message, OnBadRows
from rlhf_lightning.data.prompt_tokenization import (
    PromptTruncation,
    TokenizedPrompts,
    select_prompts,
    tokenize_prompts,
)
from rlhf_lightning.data.roles import Role, part_masks, role_sources, roles_of, sources_by_role
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.statistics import counts_in_words, leak_in_words, shared_prompts

log = logging.getLogger(__name__)


class PromptDataModule(LightningDataModule):
    """Prompts as `PromptBatch`es of ragged ids; preference data serves as well, by its prompts.

    Args:
        train: File (.jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet), directory, hub data set (`owner/name` or
            `owner/name:split`), or `builtin:courtesy`; or a list of them, where `{source: FILE, weight: 0.5}` takes
            half of a source's prompts in each epoch, and `weight: 2` each twice.
        val: Held-out prompts, a source like `train`. Without it: the directory's own val file, or a part of `train`
            divided off by prompt, the same part that is held out for a reward model.
        test: Prompts for `test` and `predict`. Without it: the directory's own test file, or the validation prompts.
        tokenizer: Hub name or directory. The command line fills in the model's backbone.
        max_prompt_length: Longest prompt in tokens, up to where the assistant's reply begins.
        batch_size: Prompts in one batch on one device.
        eval_batch_size: The same for validation, test and predict; `batch_size` when not given.
        columns: Our names (prompt, system, history, id; chosen and rejected for preference data) to the file's columns.
        on_bad_rows: `error` refuses a source with unusable rows and names them; `drop` leaves them out and counts them.
        truncation: For prompts over max_prompt_length. `drop` leaves them out and counts them; `cut` cuts them from the
            left, after the template's head, for the policy and for the reward model alike; `error` refuses the source.
        unique: Take a prompt once that stands more than once in a role's sources; case, blanks and Unicode forms do
            not count.
        chat_template: A Jinja file, or `transcript` for plain `Human: ... Assistant: ...`; the tokenizer's own template
            when not given (`transcript` where it has none).
        template_arguments: Handed to the template, such as `{enable_thinking: false}` or `{date_string: 26 Jul 2024}`.
        val_fraction: Share of prompts held out when no validation prompts are given.
        max_train_prompts: Train on so many prompts, chosen at random by the seed; all when not given.
        shuffle: A new order each epoch, from the seed and the epoch; false keeps the file's order.
        seed: Of the order and of `max_train_prompts`; the run's `seed_everything` when not given, else 0.
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
        max_prompt_length: PositiveInt = 512,
        batch_size: PositiveInt = 8,
        eval_batch_size: PositiveInt | None = None,
        columns: dict[str, str] | None = None,
        on_bad_rows: OnBadRows = "error",
        truncation: PromptTruncation = "drop",
        unique: bool = True,
        chat_template: str | None = None,
        template_arguments: dict[str, Any] | None = None,
        val_fraction: OpenUnitInterval = 0.1,
        max_train_prompts: PositiveInt | None = None,
        shuffle: bool = True,
        seed: NonNegativeInt | None = None,
        num_workers: NonNegativeInt = 0,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.sources = sources_by_role(train, val, test, noun="prompt")
        self.tokenizer_source = tokenizer
        self.max_prompt_length = max_prompt_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.columns = columns
        self.on_bad_rows = on_bad_rows
        self.truncation = truncation
        self.unique = unique
        self.chat_template = chat_template
        self.template_arguments = template_arguments
        self.val_fraction = val_fraction
        self.max_train_prompts = max_train_prompts
        self.shuffle = shuffle
        self.seed = run_seed(seed)
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.trust_remote_code = trust_remote_code
        self.prompts: dict[Role, TokenizedPrompts] = {}
        """Tokenized prompts by role, once `setup` has run."""
        self.reports: dict[Role, LoadReport] = {}
        """What became of the rows of each role's sources."""
        self.chat_format: ChatFormat | None = None
        self._train_loader: BatchLoader | None = None
        self._resume_position: dict[str, int] | None = None

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs, or find it in the cache. Raises `DataError` or `ModelError`."""
        if stage == "fit":
            self._train_loader = self._resume_position = None  # of an earlier run
        if self.chat_format is None:
            self.chat_format = load_chat_format(
                self.tokenizer_source,
                chat_template=self.chat_template,
                template_arguments=self.template_arguments,
                trust_remote_code=self.trust_remote_code,
            )
        new = [role for role in roles_of(stage) if role not in self.prompts]
        for role in new:
            prompts, report = self.prompts[role], self.reports[role] = self._selected(role)
            weights = [source.weight for source in self.sources["train"]] if role == "train" else None
            log.info(counts_in_words(role, prompts, report, noun="prompts", limit="max_prompt_length", weights=weights))
        if new and stage == "fit":
            self._log_statistics()

    def messages(self, role: Role, index: int) -> list[Message]:
        """The conversation of a prompt, by its position in the role; where its ids were cut, what is left of it.

        A reward model with another tokenizer renders it, and the response after it, in its own way: it reads what the
        policy read.
        """
        return self.prompts[role].messages_as_cut(index, self.chat_format)

    def example_ids(self, role: Role) -> list[str]:
        """The id of each prompt of a role: the row's own, or `file:row`."""
        return self.prompts[role].example_ids

    def train_dataloader(self) -> BatchLoader:
        """Batches of the training prompts, weighted so that each prompt of a step counts the same."""
        self._train_loader = training_loader(
            self.trainer,
            self.prompts["train"],
            self._collate("train"),
            position=self._resume_position if self._train_loader is None else self._train_loader.restored_position,
            num_workers=self.num_workers,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            # Nothing is padded here, and a process with all the long prompts would see other rewards than the rest.
            group_by_length=False,
            seed=self.seed,
            weights=[source.weight for source in self.sources["train"]],
            noun="prompts",
        )
        return self._train_loader

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The position in the training data, for the checkpoint."""
        return training_state(self._train_loader)

    def load_state_dict(self, state_dict: dict[str, dict[str, int]]) -> None:
        self._resume_position = training_position(state_dict)
        if self._train_loader is not None and self._resume_position is not None:
            self._train_loader.go_on_at(self._resume_position)  # some strategies load checkpoints after the data

    def val_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("val", "val")

    def test_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test", "test")

    def predict_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test", "predict")

    def _evaluation_loader(self, role: Role, stage: Stage) -> BatchLoader:
        return evaluation_loader(
            self.trainer,
            self.prompts[role],
            self._collate(role),
            stage=stage,
            num_workers=self.num_workers,
            batch_size=self.eval_batch_size,
            noun="prompts",
        )

    def _collate(self, role: Role) -> functools.partial:
        return functools.partial(collate_prompts, prompts=self.prompts[role])

    def _selected(self, role: Role) -> tuple[TokenizedPrompts, LoadReport]:
        """The prompts of a role: from its own sources, or divided off the training sources."""
        sources, split, part = role_sources(self.sources, role)
        options = {"columns": self.columns, "split": split, "cache_dir": self.cache_dir}
        stores = [tokenize_prompts(source, self.chat_format, **options) for source in sources]
        for store in stores:
            store.report.enforce(self.on_bad_rows)
        masks = part_masks(stores, part, val_fraction=self.val_fraction, noun="prompt")
        options = {"max_length": self.max_prompt_length, "truncation": self.truncation, "unique": self.unique}
        prompts, report = select_prompts(stores, masks, **options, part=part)
        return prompts.sample(self.max_train_prompts if role == "train" else None, seed=self.seed), report

    def _log_statistics(self) -> None:
        """How long the prompts are, and whether validation is held out, in one line."""
        train, val = self.prompts["train"], self.prompts["val"]
        shared = len(shared_prompts(train, val))
        log.log(
            logging.WARNING if shared else logging.INFO,
            "prompts: %d to %d tokens in train, median %d; %s",
            *(train.lengths.min(), train.lengths.max(), np.median(train.lengths)),
            leak_in_words(shared, val, noun="prompts"),
        )
