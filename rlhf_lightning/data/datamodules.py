"""From sources to batches: what all data modules share, and that of preference pairs."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from jsonargparse.typing import NonNegativeInt, OpenUnitInterval, PositiveInt
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from rlhf_lightning.arguments import CheckedArguments
from rlhf_lightning.batches import Layout, PreferenceBatch
from rlhf_lightning.data.batching import (
    BatchLoader,
    EvaluationPlan,
    MicroBatch,
    TrainingPlan,
    collate_pairs,
)
from rlhf_lightning.data.chat_format import ChatFormat, load_chat_format
from rlhf_lightning.data.examples import LoadReport, OnBadRows
from rlhf_lightning.data.learner import Learner
from rlhf_lightning.data.roles import Role, RoleSources, part_masks, role_sources, roles_of, sources_by_role
from rlhf_lightning.data.selection import TokenizedPairs, TokenizedRows, Truncation
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.statistics import (
    contradictions,
    counts_in_words,
    duplicates,
    leak_in_words,
    longer_chosen,
    shared_prompts,
)
from rlhf_lightning.data.token_budget import TokenPlan, tokens_of
from rlhf_lightning.data.tokenized import tokenize_source
from rlhf_lightning.data.tokenizer import TokenizerSource
from rlhf_lightning.errors import ConfigurationError

log = logging.getLogger(__name__)
Rows = TypeVar("Rows", bound=TokenizedRows)


class DataModule(CheckedArguments, LightningDataModule, Generic[Rows]):
    """What the data modules of pairs and of prompts share: sources by role, a chat format, tokenized rows, loaders.

    In a script, `train`, `val` and `test` may also be a list of rows (dicts) or a `datasets.Dataset`, and `tokenizer`
    a tokenizer; without one, it is that of the model which the Trainer runs. A child gives `rows_class`, `_select`,
    `_collate` and `_statistics`.

    Args:
        train: File (.jsonl, .jsonl.gz, .json, .csv, .tsv, .parquet), directory, hub data set (`owner/name` or
            `owner/name:split`), or `builtin:courtesy`; or a list of them, where `{source: FILE, weight: 0.5}` takes
            half of a source's rows in each epoch, and `weight: 2` each twice.
        val: Held-out rows, a source like `train`. Without it: the directory's own val file, or a part of `train`
            held out by a hash of the prompt, the same part for pairs and for prompts.
        test: Rows for `test` and `predict`. Without it: the directory's own test file, or the validation rows.
        tokenizer: Hub name or directory. The command line fills in the model's backbone.
        batch_size: Rows in one batch on one device; a pair is one row, and two in the forward pass.
        eval_batch_size: The same for validation, test and predict; `batch_size` when not given.
        columns: Our names (prompt, chosen, rejected, system, history, margin, id, source; for SFT also response and
            messages, for judged responses label as well) to the file's columns.
        on_bad_rows: `error` refuses a source with unusable rows and names them; `drop` leaves them out and counts them.
        chat_template: A Jinja file, or `transcript` for plain `Human: ... Assistant: ...`; the tokenizer's own template
            when not given (`transcript` where it has none).
        chat_template_kwargs: Handed to the template: `{enable_thinking: false}` or `{date_string: 26 Jul 2024}`.
        val_fraction: Share of the prompts held out when no validation data is given.
        limit: Train on so many rows, drawn at random by the seed, after validation rows are held out; all when not
            given. A larger limit takes the same rows and more.
        val_limit: The same for validation; the rows are the same for any seed.
        test_limit: The same for `test` and `predict`.
        shuffle: A new order each epoch, from the seed and the epoch; false keeps the file's order.
        seed: Of the order and of the rows that `limit` draws; the run's `seed_everything` when not given, else 0.
        num_workers: Processes that make batches; 0 makes them in the training process.
        cache_dir: Where token ids are kept between runs; `~/.cache/rlhf_lightning/tokens` when not given.
        trust_remote_code: Run code that comes with the tokenizer.
    """

    rows_class: type[Rows]

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        test: Source | None = None,
        tokenizer: TokenizerSource | None = None,
        batch_size: PositiveInt = 8,
        eval_batch_size: PositiveInt | None = None,
        columns: dict[str, str] | None = None,
        on_bad_rows: OnBadRows = "error",
        chat_template: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        val_fraction: OpenUnitInterval = 0.1,
        limit: PositiveInt | None = None,
        val_limit: PositiveInt | None = None,
        test_limit: PositiveInt | None = None,
        shuffle: bool = True,
        seed: NonNegativeInt | None = None,
        num_workers: NonNegativeInt = 0,
        cache_dir: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        self.sources = sources_by_role(train, val, test)
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.columns = columns
        self.on_bad_rows = on_bad_rows
        self.chat_template = chat_template
        self.chat_template_kwargs = chat_template_kwargs
        self.val_fraction = val_fraction
        self.limits: dict[Role, int | None] = {"train": limit, "val": val_limit, "test": test_limit}
        self.shuffle = shuffle
        self.group_by_length = False
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.num_workers = num_workers
        self.cache_dir = cache_dir
        self.trust_remote_code = trust_remote_code
        self.rows: dict[Role, Rows] = {}
        """Tokenized rows by role, once `setup` has run."""
        self.reports: dict[Role, LoadReport] = {}
        """What became of the rows of each role's sources."""
        self.chat_format: ChatFormat | None = None
        self._train_loader: BatchLoader | None = None
        self._resume_position: dict[str, int] | None = None

    @property
    def tokenizer_source(self) -> str | None:
        """Hub name or directory of the tokenizer; of one that was given as an object, those that it was loaded from."""
        if self.tokenizer is None or isinstance(self.tokenizer, str):
            return self.tokenizer
        return self.tokenizer.name_or_path or None

    def setup(self, stage: str) -> None:
        """Read and tokenize what the stage needs, or find it in the cache. Raises `DataError` or `ModelError`.

        Where no tokenizer was given, it is that of the model that the trainer runs.
        """
        if stage == "fit":
            self._train_loader = self._resume_position = None  # of an earlier run
        module = getattr(self.trainer, "lightning_module", None)
        if isinstance(module, Learner):
            module.check_data(self)
            if self.tokenizer is None and self.chat_format is None:
                self.tokenizer = module.tokenizer
        if self.read(roles_of(stage)) and stage == "fit":
            shared = len(shared_prompts(self.rows["train"], self.rows["val"]))
            leak = leak_in_words(shared, self.rows["val"])
            log.log(logging.WARNING if shared else logging.INFO, "%s", self._statistics(leak))

    def read(self, roles: Sequence[Role]) -> list[Role]:
        """Read and tokenize some roles, whatever the stage, and say which of them were not there yet."""
        self._format()
        new = [role for role in roles if role not in self.rows]
        for role in new:
            whole, report = self._select(role)
            seed = self.seed if role == "train" else 0
            rows = whole.sample(self.limits[role], seed=seed)
            self.rows[role], self.reports[role] = rows, report
            drawn = f"{role}_limit {len(rows)}" if role != "train" else f"limit {len(rows)}, seed {seed}"
            weights = self._weights() if role == "train" else None
            log.info(counts_in_words(role, rows, report, weights=weights, drawn=drawn if rows is not whole else None))
        return new

    def lower_limit(self, tokens: int) -> bool:
        """Set the limit of a row's tokens to `tokens` where it is greater, and say whether it was.

        Rows that were read under the greater one are selected anew when they are asked for.
        """
        key = self.rows_class.limit_key
        if getattr(self, key) <= tokens:
            return False
        setattr(self, key, tokens)
        self.rows.clear()
        self.reports.clear()
        return True

    def role_sources(self, role: Role) -> RoleSources:
        """Sources of a role, the split to read of them, and the part of it where they are divided by prompt."""
        return role_sources(self.sources, role)

    def train_dataloader(self) -> BatchLoader:
        """Batches of the training rows, weighted so that each row of an optimizer step counts the same.

        With the trainer's `overfit_batches` every epoch has the same ones. Raises `ConfigurationError` when the trainer
        would change its accumulation.
        """
        trainer = self.trainer
        if trainer and any(isinstance(callback, GradientAccumulationScheduler) for callback in trainer.callbacks):
            raise ConfigurationError(
                "GradientAccumulationScheduler: the batches of an optimizer step are planned for one accumulation "
                "count; use trainer.accumulate_grad_batches"
            )
        rank, world_size = self._process()
        plan = self.training_plan(
            accumulate=trainer.accumulate_grad_batches if trainer else 1,
            repeat=trainer is not None and trainer.overfit_batches > 0,
            rank=rank,
            world_size=world_size,
        )
        earlier, self._train_loader = self._train_loader, self._loader("train", plan)
        position = self._resume_position if earlier is None else earlier.restored_position
        if position is not None:
            self._train_loader.resume_at(position)
        return self._train_loader

    def training_plan(self, **process: Any) -> TrainingPlan:
        """The batches of the training rows; `process` are the arguments of `TrainingPlan` that this does not know."""
        settings = self._plan_settings()
        return TrainingPlan(
            self.rows["train"].lengths,
            batch_size=self.batch_size,
            group_by_length=self.group_by_length,
            **settings,
            **process,
        )

    def _plan_settings(self) -> dict[str, Any]:
        source, weights = self.rows["train"].source, self._weights()
        plain = {"shuffle": self.shuffle, "seed": self.seed, "source": source, "weights": weights}
        return plain | {"prompts": self._prompts("train")}

    def _prompts(self, role: Role) -> np.ndarray | None:
        """A hash of each row's prompt, [P], where rows are to get responses to other prompts."""
        return None

    def val_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("val", "limit_val_batches")

    def test_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test", "limit_test_batches")

    def predict_dataloader(self) -> BatchLoader:
        return self._evaluation_loader("test", "limit_predict_batches")

    def state_dict(self) -> dict[str, dict[str, int]]:
        """The position in the training data, for the checkpoint.

        Lightning would restore the loader's state by itself, but not once a schedule has asked for the number of steps.
        """
        loader = self._train_loader
        return {} if loader is None else {"train_loader": loader.state_dict() | loader.plan.layout}

    def load_state_dict(self, state_dict: dict[str, dict[str, int]]) -> None:
        self._resume_position = state_dict.get("train_loader")
        if self._train_loader is not None and self._resume_position is not None:
            self._train_loader.resume_at(self._resume_position)  # some strategies load checkpoints after the data

    def _format(self) -> ChatFormat:
        """How conversations become token ids; read from the tokenizer when it is first asked for."""
        if self.chat_format is None:
            self.chat_format = load_chat_format(
                self.tokenizer,
                chat_template=self.chat_template,
                chat_template_kwargs=self.chat_template_kwargs,
                trust_remote_code=self.trust_remote_code,
            )
        return self.chat_format

    def _weights(self) -> list[float]:
        return [source.weight for source in self.sources["train"]]

    def _process(self) -> tuple[int, int]:
        """Which process of how many this is; without a trainer, all is for one."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _evaluation_loader(self, role: Role, limit: str) -> BatchLoader:
        """All rows of a role once; those up to the trainer's `limit` are a fair sample."""
        share = getattr(self.trainer, limit) if self.trainer else 1.0
        (rank, world_size), lengths = self._process(), self.rows[role].lengths
        plan = EvaluationPlan(
            lengths,
            batch_size=self.eval_batch_size,
            limit=share,
            rank=rank,
            world_size=world_size,
            prompts=self._prompts(role),
        )
        return self._loader(role, plan)

    def _loader(self, role: Role, plan: TrainingPlan | EvaluationPlan) -> BatchLoader:
        on_gpu = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return BatchLoader(self._collate(role), plan, num_workers=self.num_workers, pin_memory=on_gpu)

    def _fitting(self, role: Role, *, max_length: int, truncation: Truncation) -> tuple[Rows, LoadReport]:
        """The rows of a role that fit: from its own sources, or divided off the training sources by prompt."""
        sources, split, part = self.role_sources(role)
        form, kind, columns, cache = self._format(), self.rows_class.kind, self.columns, self.cache_dir
        stores = [tokenize_source(s, form, kind=kind, columns=columns, split=split, cache_dir=cache) for s in sources]
        for store in stores:
            store.report.enforce(self.on_bad_rows)
        masks = part_masks(stores, part, val_fraction=self.val_fraction, kind=kind)
        return self.rows_class.fitting(stores, masks, max_length=max_length, truncation=truncation, part=part)

    def _select(self, role: Role) -> tuple[Rows, LoadReport]:
        """The rows that a role takes, and what became of the others."""
        raise NotImplementedError

    def _collate(self, role: Role) -> Callable[[MicroBatch], NamedTuple]:
        """What makes the tensors of a batch of a role."""
        raise NotImplementedError

    def _statistics(self, leak: str) -> str:
        """What may spoil the numbers of a run, in one line; `leak` is what is said of prompts on both sides."""
        raise NotImplementedError


class ResponseDataModule(DataModule[Rows]):
    """What the data modules of rows with responses share; a child gives `rows_class`, `_collate` and `_statistics`.

    Args:
        max_length: Longest row in tokens: prompt, response and EOS; lowered to what the model has positions for.
        truncation: For rows over max_length. `left` truncates the prompt from the left, the oldest turns first, and
            drops what still does not fit; `drop` drops the row; `error` refuses the source.
        group_by_length: Put rows of like length into one forward pass, within an optimizer step. Changes no result.
        tokens_per_batch: Fill training batches up to so many tokens in the place of `batch_size` rows: batches of equal
            cost, whatever their rows. Steps then take equal numbers of tokens, so their numbers of rows differ; each
            row of a step counts the same. With model.layout packed or shared.
    """

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        test: Source | None = None,
        tokenizer: TokenizerSource | None = None,
        max_length: PositiveInt = 1024,
        truncation: Truncation = "left",
        group_by_length: bool = True,
        tokens_per_batch: PositiveInt | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(train, val, test, tokenizer, **kwargs)
        self.tokens_per_batch = tokens_per_batch
        self.max_length = max_length
        self.truncation = truncation
        self.group_by_length = group_by_length

    def batches(self, role: Role, positions: np.ndarray) -> Iterator[Any]:
        """Some of the rows of a role once, the longest first, outside of any loader."""
        collate, order = self._collate(role), self.rows[role].longest_first(positions)
        for start in range(0, len(order), self.eval_batch_size):
            yield collate(MicroBatch(order[start : start + self.eval_batch_size], 1.0))

    def training_plan(self, **process: Any) -> TrainingPlan:
        """As `DataModule.training_plan`, or one by tokens. Raises `ConfigurationError` for padded rows and a budget."""
        if self.tokens_per_batch is None:
            return super().training_plan(**process)
        return TokenPlan(self._tokens(), tokens_per_batch=self.tokens_per_batch, **self._plan_settings(), **process)

    def _tokens(self) -> np.ndarray:
        """What each training row takes of a budget of tokens, in the layout of the model that the trainer runs."""
        module = getattr(self.trainer, "lightning_module", None)
        layout: Layout = getattr(module, "layout", "packed")
        return tokens_of(self.rows["train"].segment_lengths, layout)

    def longest_batch(self) -> Any:
        """The longest training rows, as many as a batch has."""
        rows = self.rows["train"]
        order = rows.longest_first(np.arange(len(rows)))
        if self.tokens_per_batch is None:
            return self._collate("train")(MicroBatch(order[: self.batch_size], 1.0))
        fitting = np.cumsum(self._tokens()[order]) <= self.tokens_per_batch
        return self._collate("train")(MicroBatch(order[fitting], 1.0))

    def _select(self, role: Role) -> tuple[Rows, LoadReport]:
        return self._fitting(role, max_length=self.max_length, truncation=self.truncation)


class PreferenceDataModule(ResponseDataModule[TokenizedPairs]):
    """Preference pairs as right-padded `PreferenceBatch`es, chosen and rejected in one forward."""

    rows_class = TokenizedPairs

    @property
    def pairs(self) -> dict[Role, TokenizedPairs]:
        """Tokenized pairs by role, once `setup` has run."""
        return self.rows

    def _collate(self, role: Role) -> Callable[[MicroBatch], PreferenceBatch]:
        return functools.partial(collate_pairs, pairs=self.rows[role], pad_id=self._format().pad_id)

    def _statistics(self, leak: str) -> str:
        train, val = self.rows["train"], self.rows["val"]
        return (
            f"pairs: the response with more characters is chosen in {100 * longer_chosen(val):.1f} % of val; "
            f"{len(duplicates(train))} duplicates and {len(contradictions(train))} contradictory pairs in train; "
            f"{leak}; more from `rlhf-lightning doctor`"
        )


def chat_format_of(data: LightningDataModule | None) -> ChatFormat | None:
    """How the data is rendered; None before it is read, and where no data module of this package has done so."""
    return data.chat_format if isinstance(data, DataModule) else None
