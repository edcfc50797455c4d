"""Batches of tokenized pairs or prompts: which go together, and the tensors made of them.

Rows are regrouped by length only inside one optimizer step, so that the step's mean over its rows, and so the
mathematics, is that of the plain loop: fewer padding tokens for free.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader

from rlhf_lightning.batches import ModelInputs, PreferenceBatch, PromptBatch, SFTBatch, UnpairedBatch, collate_rows
from rlhf_lightning.data.selection import TokenizedConversations, TokenizedPairs, TokenizedPrompts, TokenizedResponses
from rlhf_lightning.data.unpaired import partners
from rlhf_lightning.errors import ConfigurationError


class MicroBatch(NamedTuple):
    """Positions of the pairs of one forward pass, and their weight in the optimizer step."""

    indices: np.ndarray
    weight: float
    mismatched: np.ndarray | None = None
    """[K, 2], where the plan knows the prompts: rows, and for each the row of another prompt whose response is put
    behind its prompt. Of an optimizer step the first batch has all those of its process, the others None."""


class TrainingPlan:
    """The batches of each epoch for one process, from `seed` and the epoch alone.

    Every pair comes exactly once in an epoch. One optimizer step takes `batch_size * accumulate * world_size` pairs;
    the last step of an epoch takes what is left, and fewer leftover pairs than processes join the step before. Every
    process gets the same number of batches, none empty; where the pairs do not divide evenly, a batch may hold
    `batch_size + 1`. `shuffle=False` keeps the file's order (and then nothing is regrouped by length).
    `repeat` makes every epoch the first one again. With `prompts` ([P], a hash of each row's), the rows of a step get
    responses to other prompts of the step, whatever its division into batches and processes.

    In a mixture, pair i belongs to source `source[i]` ([P] int), whose pairs come `weights[source[i]]` times in an
    epoch: 2.5 is every pair twice and half of them, others each epoch, once more.
    """

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        accumulate: int = 1,
        shuffle: bool = True,
        group_by_length: bool = True,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        source: np.ndarray | None = None,
        weights: Sequence[float] = (1.0,),
        repeat: bool = False,
        prompts: np.ndarray | None = None,
    ) -> None:
        self.lengths = lengths
        self.prompts = prompts
        source = np.zeros(len(lengths), dtype=np.int32) if source is None else source
        self.mixture = [(np.flatnonzero(source == number), weight) for number, weight in enumerate(weights)]
        self.epoch_rows = sum(round(len(indices) * weight) for indices, weight in self.mixture)
        if self.epoch_rows < world_size:
            raise ConfigurationError(f"{self.epoch_rows} training rows cannot be shared by {world_size} processes")
        self.step_rows = batch_size * accumulate * world_size
        self.batch_size = batch_size
        self.accumulate = accumulate
        self.shuffle = shuffle
        self.group_by_length = group_by_length and shuffle
        self.seed = seed
        self.repeat = repeat
        self.rank = rank
        self.world_size = world_size

    @property
    def layout(self) -> dict[str, int]:
        """What a position in the plan counts in, under the names that the user gives it."""
        layout = {
            "processes": self.world_size,
            "data.batch_size": self.batch_size,
            "trainer.accumulate_grad_batches": self.accumulate,
            "rows in an epoch": self.epoch_rows,
        }
        return {name: int(number) for name, number in layout.items()}  # the parser's own ints are not plain data

    def __len__(self) -> int:
        """Number of batches that each process gets in an epoch."""
        return sum(self._batches_of(stop - start) for start, stop in self._steps())

    def epoch(self, epoch: int) -> Iterator[MicroBatch]:
        """The batches of this process in one epoch."""
        random = np.random.default_rng([self.seed, 0 if self.repeat else epoch])
        order = np.concatenate([_repeated(indices, weight, random) for indices, weight in self.mixture])
        if self.shuffle:
            order = random.permutation(order)
        for step in self._steps_of(order):
            parts = self._divided(step, self._batches_of(len(step)) * self.world_size)[self.rank :: self.world_size]
            mismatched = None
            if self.prompts is not None:
                mismatched = _mismatched(np.concatenate(parts), np.unique(step), self.prompts)
            for part in parts:
                # Lightning divides by `accumulate` and averages over processes; undone here, so that each pair of the
                # step counts the same, also in the shorter last step.
                yield MicroBatch(part, len(part) * self.accumulate * self.world_size / len(step), mismatched)
                mismatched = None

    def _steps_of(self, order: np.ndarray) -> Iterator[np.ndarray]:
        """The pairs of each optimizer step."""
        for start, stop in self._steps():
            yield order[start:stop]

    def _divided(self, step: np.ndarray, count: int) -> list[np.ndarray]:
        """The pairs of a step in so many batches, those of a process `world_size` apart."""
        if self.group_by_length:
            step = step[np.argsort(-self.lengths[step], kind="stable")]
        return np.array_split(step, count)

    def _steps(self) -> Iterator[tuple[int, int]]:
        """Where the pairs of each optimizer step begin and end in the epoch's order."""
        pairs = self.epoch_rows
        for start in range(0, pairs, self.step_rows):
            stop = start + self.step_rows
            if pairs - stop < self.world_size:
                yield start, pairs
                return
            yield start, stop

    def _batches_of(self, pairs: int) -> int:
        """Batches per process in an optimizer step of so many pairs."""
        return min(self.accumulate, _batches_per_process(pairs, self.batch_size, self.world_size))


def _repeated(indices: np.ndarray, weight: float, random: np.random.Generator) -> np.ndarray:
    """Every index `weight` times; the rest of a fraction goes to indices drawn without replacement."""
    whole = int(weight)
    rest = round(len(indices) * weight) - whole * len(indices)
    drawn = np.sort(random.permutation(indices)[:rest]) if rest else indices[:0]
    return np.concatenate([*[indices] * whole, drawn])


def _mismatched(own: np.ndarray, among: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Some rows and their partners out of others (sorted, `own` among them), [K, 2]; see `partners`."""
    other = partners(prompts[among])[np.searchsorted(among, own)]
    return np.stack([own, among[other]], axis=1)[other >= 0]


class EvaluationPlan:
    """Every pair exactly once, longest first, in the same number of batches on every process.

    With `prompts` ([P], a hash of each row's), each row gets a response to another prompt.

    `limit` is how much of it a trainer looks at, a number of batches of each process or a share of them: the batches up
    to there hold pairs drawn at random, always the same for as many pairs, longest first; the rest comes after them.
    """

    layout: ClassVar[dict[str, int]] = {}
    """No position in it is restored."""

    def __init__(
        self,
        lengths: np.ndarray,
        *,
        batch_size: int,
        limit: float = 1.0,
        rank: int = 0,
        world_size: int = 1,
        prompts: np.ndarray | None = None,
    ) -> None:
        if len(lengths) < world_size:
            raise ConfigurationError(f"{len(lengths)} evaluation rows cannot be shared by {world_size} processes")
        self.lengths = lengths
        self.prompts = prompts
        self.rank = rank
        self.world_size = world_size
        self.batches_per_process = _batches_per_process(len(lengths), batch_size, world_size)
        whole = self.batches_per_process
        self.limit = min(limit, whole) if isinstance(limit, int) else int(limit * whole)

    def __len__(self) -> int:
        return self.batches_per_process

    def epoch(self, epoch: int) -> Iterator[MicroBatch]:
        """The batches of this process, the same in every epoch."""
        sizes = [len(part) for part in np.array_split(self.lengths, self.batches_per_process * self.world_size)]
        drawn = np.random.default_rng(0).permutation(len(self.lengths))
        seen = sum(sizes[: self.limit * self.world_size])
        # The longest alone would be no fair sample of the whole.
        order = np.concatenate([self._longest_first(drawn[:seen]), self._longest_first(drawn[seen:])])
        parts = np.split(order, np.cumsum(sizes)[:-1])
        every = np.arange(len(self.lengths))
        for part in parts[self.rank :: self.world_size]:
            yield MicroBatch(part, 1.0, None if self.prompts is None else _mismatched(part, every, self.prompts))

    def _longest_first(self, indices: np.ndarray) -> np.ndarray:
        indices = np.sort(indices)
        return indices[np.argsort(-self.lengths[indices], kind="stable")]


def _batches_per_process(pairs: int, batch_size: int, world_size: int) -> int:
    """As many as needed for `batch_size` pairs in each, but never so many that one would be empty."""
    return min(-(-pairs // (batch_size * world_size)), pairs // world_size)


class BatchLoader:
    """Iterates over the batches of a plan, an epoch at a time; `collate` makes each of its micro-batch.

    Not a `DataLoader` on purpose: Lightning would put its own distributed sampler into one, which repeats pairs to make
    the processes even and so falsifies every metric; the plans divide the pairs themselves.
    """

    def __init__(
        self,
        collate: Callable[[MicroBatch], NamedTuple],
        plan: TrainingPlan | EvaluationPlan,
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        self.collate = collate
        self.plan = plan
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.current_epoch = 0
        self._position = {"epoch": 0, "batches": 0}
        self._restored = False

    @property
    def sampler(self) -> BatchLoader:
        """Where Lightning looks for `set_epoch`."""
        return self

    @property
    def batch_sampler(self) -> None:
        """Looked for beside `sampler`."""
        return

    def set_epoch(self, epoch: int) -> None:
        self.current_epoch = epoch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches have been handed out."""
        return dict(self._position)

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on from there: the next pass, if it is over that epoch, begins after the last batch handed out.

        Every pass after it begins at the beginning.
        """
        self._position = {name: state_dict[name] for name in ("epoch", "batches")}
        self._restored = True

    @property
    def restored_position(self) -> dict[str, int] | None:
        """The position given to `load_state_dict`, while no pass has begun there."""
        return self.state_dict() if self._restored else None

    def resume_at(self, position: dict[str, int]) -> None:
        """The same for a position that says what it counts in. Raises `ConfigurationError` when that is another.

        The beginning of a run is that of any other: Lightning's search for a batch size goes back to it.
        """
        for name, now in self.plan.layout.items():
            before = position.get(name, now)
            if before != now and (position["epoch"] > 0 or position["batches"] > 0):
                raise ConfigurationError(
                    f"ckpt_path: its run had {name} {before}, this one has {now}, so the data cannot resume where it "
                    "was; give the same, or export the checkpoint and begin a new run with that as model.backbone"
                )
        self.load_state_dict(position)

    def __len__(self) -> int:
        return len(self.plan)

    def __iter__(self) -> Iterator[NamedTuple]:
        goes_on = self._restored and self._position["epoch"] == self.current_epoch
        begun = self._position["batches"] % len(self) if goes_on else 0
        self._restored = False
        self._position = {"epoch": self.current_epoch, "batches": begun}
        loader: DataLoader[NamedTuple] = DataLoader(
            list(self.plan.epoch(self.current_epoch))[begun:],  # type: ignore[arg-type]  # a list will do
            batch_size=None,
            collate_fn=self.collate,  # type: ignore[arg-type]  # without a batch size, of one item
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            worker_init_fn=_leave_signals_to_the_run,
            generator=torch.Generator(),  # its worker seeds; from the global one, validating would change training
        )
        for batch in loader:
            self._position["batches"] += 1
            yield batch


def _leave_signals_to_the_run(_: int) -> None:
    """A signal to the whole group would end the processes that make batches before the run has saved."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)


def collate_pairs(micro_batch: MicroBatch, pairs: TokenizedPairs, *, pad_id: int) -> PreferenceBatch:
    """Right-padded rows of a micro-batch: B chosen rows, then the B rejected rows of the same pairs."""
    indices = np.asarray(micro_batch.indices, dtype=np.int64)
    segments = [pairs.segments(index) for index in indices]
    inputs = _padded([(prompt, side[which]) for which in (0, 1) for prompt, *side in segments], pad_id=pad_id)
    return PreferenceBatch(
        *inputs.text,
        margin=torch.from_numpy(pairs.margin[indices]),
        index=torch.from_numpy(indices),
        weight=torch.tensor(micro_batch.weight, dtype=torch.float32),
    )


def collate_conversations(micro_batch: MicroBatch, conversations: TokenizedConversations, *, pad_id: int) -> SFTBatch:
    """Right-padded rows of a micro-batch, B conversations."""
    indices = np.asarray(micro_batch.indices, dtype=np.int64)
    rows = [torch.from_numpy(np.concatenate(conversations.segments(i), dtype=np.int64)) for i in indices]
    inputs = collate_rows(rows, [0] * len(rows), pad_id=pad_id)
    masks = [torch.from_numpy(conversations.response_mask(i)) for i in indices]
    return SFTBatch(
        inputs.input_ids,
        inputs.attention_mask,
        response_mask=pad_sequence(masks, batch_first=True, padding_value=False),
        index=torch.from_numpy(indices),
        weight=torch.tensor(micro_batch.weight, dtype=torch.float32),
    )


def collate_responses(
    micro_batch: MicroBatch, responses: TokenizedResponses, desirable: np.ndarray, *, pad_id: int
) -> UnpairedBatch:
    """Right-padded rows of a micro-batch, B judged responses of which `desirable` [P] says which are good."""
    indices = np.asarray(micro_batch.indices, dtype=np.int64)
    inputs = _padded([(prompt, response) for prompt, response in map(responses.segments, indices)], pad_id=pad_id)
    mismatched = None
    if micro_batch.mismatched is not None:
        found = (responses.mismatched(*couple) for couple in micro_batch.mismatched.tolist())
        mismatched = _padded([sides for sides in found if sides is not None], pad_id=pad_id)
    return UnpairedBatch(
        *inputs.text,
        desirable=torch.from_numpy(desirable[indices]),
        index=torch.from_numpy(indices),
        weight=torch.tensor(micro_batch.weight, dtype=torch.float32),
        mismatched=mismatched,
    )


def _padded(rows: Sequence[tuple[np.ndarray, np.ndarray]], *, pad_id: int) -> ModelInputs:
    """Right-padded rows of a prompt and a response each; of no row, tensors of the shape [0, 1]."""
    if not rows:
        none = torch.zeros(0, 1, dtype=torch.int64)
        return ModelInputs(none, none.bool(), none.bool())
    ids = [torch.from_numpy(np.concatenate(both, dtype=np.int64)) for both in rows]
    return collate_rows(ids, [len(prompt) for prompt, _ in rows], pad_id=pad_id)


def collate_prompts(micro_batch: MicroBatch, prompts: TokenizedPrompts) -> PromptBatch:
    """The prompts of a micro-batch, each as long as it is."""
    indices = np.asarray(micro_batch.indices, dtype=np.int64)
    return PromptBatch(
        input_ids=[torch.from_numpy(prompts.ids(index).astype(np.int64)) for index in indices],
        index=torch.from_numpy(indices),
        weight=torch.tensor(micro_batch.weight, dtype=torch.float32),
    )
