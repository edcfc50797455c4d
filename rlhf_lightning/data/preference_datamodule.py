"""Preference pairs for training and evaluation, from a source to padded batches."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch import LightningDataModule

from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.data.batching import (
    BatchLoader,
    MicroBatch,
    Stage,
    collate_pairs,
    evaluation_loader,
    run_seed,
    training_loader,
    training_position,
    training_state,
)
from rlhf_lightning.data.chat_format import ChatFormat, load_chat_format
from rlhf_lightning.data.examples import LoadReport, OnBadRows
from rlhf_lightning.data.roles import Part, Role, part_masks, role_sources, roles_of, sources_by_role
from rlhf_lightning.data.sources import Source, Split, WeightedSource
from rlhf_lightning.data.statistics import (
    contradictions,
    counts_in_words,
    duplicates,
    leak_in_words,
    longer_chosen,
    shared_prompts,
)
from rlhf_lightning.data.tokenization import TokenizedPairs, Truncation, select_pairs, tokenize_source

log = logging.getLogger(__name__)


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
        columns: Our names (prompt, chosen, rejected, system, history, margin, id, source) to the file's columns.
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
        self.sources = sources_by_role(train, val, test, noun="pair")
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
        self.seed = run_seed(seed)
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.trust_remote_code = trust_remote_code
        self.pairs: dict[Role, TokenizedPairs] = {}
        """Tokenized pairs by role, once `setup` has run."""
        self.reports: dict[Role, LoadReport] = {}
        """What became of the rows of each role's sources."""
        self.chat_format: ChatFormat | None = None
        self._train_loader: BatchLoader | None = None
        self._resume_position: dict[str, int] | None = None

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs, or find it in the cache. Raises `DataError` or `ModelError`."""
        if stage == "fit":
            self._train_loader = self._resume_position = None  # of an earlier run
        if self.read(roles_of(stage)) and stage == "fit":
            self._log_statistics()

    def read(self, roles: Sequence[Role]) -> list[Role]:
        """Read and tokenize some roles, whatever the stage, and say which of them were not there yet."""
        if self.chat_format is None:
            self.chat_format = load_chat_format(
                self.tokenizer_source,
                chat_template=self.chat_template,
                template_arguments=self.template_arguments,
                trust_remote_code=self.trust_remote_code,
            )
        new = [role for role in roles if role not in self.pairs]
        for role in new:
            pairs, report = self.pairs[role], self.reports[role] = self._selected(role)
            weights = [source.weight for source in self.sources["train"]] if role == "train" else None
            log.info(counts_in_words(role, pairs, report, noun="pairs", limit="max_length", weights=weights))
        return new

    def train_dataloader(self) -> BatchLoader:
        """Batches of the training pairs, weighted so that each pair of an optimizer step counts the same."""
        self._train_loader = training_loader(
            self.trainer,
            self.pairs["train"],
            self._collate("train"),
            position=self._resume_position if self._train_loader is None else self._train_loader.restored_position,
            num_workers=self.num_workers,
            batch_size=self.batch_size,
            shuffle=self.shuffle,
            group_by_length=self.group_by_length,
            seed=self.seed,
            weights=[source.weight for source in self.sources["train"]],
        )
        return self._train_loader

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The position in the training data, for the checkpoint."""
        return training_state(self._train_loader)

    def load_state_dict(self, state_dict: dict[str, dict[str, int]]) -> None:
        self._resume_position = training_position(state_dict)
        if self._train_loader is not None and self._resume_position is not None:
            self._train_loader.go_on_at(self._resume_position)  # some strategies load checkpoints after the data

    def batches(self, role: Role, positions: np.ndarray) -> Iterator[PreferenceBatch]:
        """Some of the pairs of a role once, the longest first, outside of any loader."""
        pairs, order = self.pairs[role], positions[np.argsort(-self.pairs[role].lengths[positions], kind="stable")]
        for start in range(0, len(order), self.eval_batch_size):
            part = MicroBatch(order[start : start + self.eval_batch_size], 1.0)
            yield collate_pairs(part, pairs, pad_id=self.chat_format.pad_id)

    def longest_batch(self) -> PreferenceBatch:
        """The training pairs with the longest rows, as many as a batch has."""
        pairs = self.pairs["train"]
        order = np.argsort(-pairs.lengths, kind="stable")[: self.batch_size]
        return self._collate("train")(MicroBatch(order, 1.0))

    def val_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("val", "val")

    def test_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test", "test")

    def predict_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test", "predict")

    def role_sources(self, role: Role) -> tuple[Sequence[WeightedSource], Split, Part | None]:
        """Sources of a role, the split to read of them, and the part of it where they are divided by prompt."""
        return role_sources(self.sources, role)

    def _evaluation_loader(self, role: Role, stage: Stage) -> BatchLoader:
        return evaluation_loader(
            self.trainer,
            self.pairs[role],
            self._collate(role),
            stage=stage,
            num_workers=self.num_workers,
            batch_size=self.eval_batch_size,
        )

    def _collate(self, role: Role) -> functools.partial:
        assert self.chat_format is not None
        return functools.partial(collate_pairs, pairs=self.pairs[role], pad_id=self.chat_format.pad_id)

    def _selected(self, role: Role) -> tuple[TokenizedPairs, LoadReport]:
        """The pairs of a role: from its own sources, or divided off the training sources by prompt."""
        sources, split, part = self.role_sources(role)
        options = {"columns": self.columns, "split": split, "cache_dir": self.cache_dir}
        stores = [tokenize_source(source, self.chat_format, **options) for source in sources]
        for store in stores:
            store.report.enforce(self.on_bad_rows)
        masks = part_masks(stores, part, val_fraction=self.val_fraction, noun="pair")
        pairs, report = select_pairs(stores, masks, max_length=self.max_length, truncation=self.truncation, part=part)
        return pairs.sample(self.max_train_pairs if role == "train" else None, seed=self.seed), report

    def _log_statistics(self) -> None:
        """What may spoil the numbers of a run, in one line."""
        train, val = self.pairs["train"], self.pairs["val"]
        shared = len(shared_prompts(train, val))
        log.log(
            logging.WARNING if shared else logging.INFO,
            "pairs: the response with more characters is chosen in %.1f %% of val; %d duplicates and %d contradictory "
            "pairs in train; %s; more from `rlhf-lightning doctor`",
            100 * longer_chosen(val),
            len(duplicates(train)),
            len(contradictions(train)),
            leak_in_words(shared, val, noun="pairs"),
        )
