"""The keys and values of responses that are made side by side, of which each begins and ends when it will.

P prompts that are computed together, S slots, N of them in use, C columns, D size of a head, V vocabulary. The tokens
of all slots end at the same column, as with padding on the left, so that a step writes one column and a model sees what
it sees in `generate`. Slots in use are the first N: the last ones move to where a response has ended. Columns at the
left, which no slot reaches any more, are dropped now and then.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, DynamicCache, DynamicLayer

from rlhf_lightning.models.causal_lm import CausalLM, decoder, inner_model
from rlhf_lightning.models.states import position_ids_of

_MORE_COLUMNS = 64
"""Columns that are free when the slots move to others; the move costs about as much as a step."""


class Prompts(NamedTuple):
    """P prompts, computed with padding on the left to T tokens."""

    cache: DynamicCache
    """Keys and values of each layer, [P, heads, T, D]."""
    mask: Tensor
    """[P, T] bool, True on tokens."""
    lengths: list[int]
    scores: Tensor
    """[P, V], of the token after each."""


def compute_prompts(policy: CausalLM, prompts: Sequence[Tensor]) -> Prompts:
    """Keys and values of P prompts (1-D int64), each computed once, and the scores of the token after it."""
    lengths = [len(prompt) for prompt in prompts]
    ids = pad_sequence(list(prompts), batch_first=True, padding_side="left")
    mask = (torch.arange(ids.shape[1]).flip(0) < torch.tensor(lengths)[:, None]).to(ids.device)
    cache = DynamicCache()  # of whole rows, whatever windows the layers have
    scores = _scores(policy, ids, mask, cache)
    return Prompts(cache, mask, lengths, scores)


def _scores(policy: CausalLM, ids: Tensor, mask: Tensor, cache: Cache) -> Tensor:
    """Scores [R, V] of what follows each row of ids [R, Q], the last tokens in `mask` [R, T]; keys go into `cache`."""
    positions = position_ids_of(decoder(policy.model), mask)
    arguments: dict[str, Any] = {} if positions is None else {"position_ids": positions[:, -ids.shape[1] :]}
    if ids.shape[1] > 1 and "logits_to_keep" in inspect.signature(inner_model(policy.model).forward).parameters:
        arguments["logits_to_keep"] = 1
    output = policy.model(input_ids=ids, attention_mask=mask.long(), past_key_values=cache, use_cache=True, **arguments)
    return output.logits[:, -1]


class Slots(Cache):
    """Up to S slots, each with the tokens of one row, which end in the same column."""

    layers: list[Any]
    """Of those of the model that have keys, a `_Layer` each."""

    def __init__(self, policy: CausalLM, size: int) -> None:
        super().__init__(layers=[])
        self.policy, self.size = policy, size
        self.device = next(policy.parameters()).device
        self.lengths: list[int] = []
        """Tokens of the slots in use without the last one, which has no keys yet."""
        self.column = 0
        """Where that one stands."""
        self.ids = torch.empty(size, 0, dtype=torch.long, device=self.device)
        """[S, C] int64: what was sampled, -1 elsewhere."""
        self.mask = torch.empty(size, 0, dtype=torch.bool, device=self.device)
        """[S, C], True on tokens that have keys."""

    @property
    def seen(self) -> tuple[slice, slice]:
        """Slots that are in use, and the columns of their tokens."""
        return slice(len(self.lengths)), slice(self.column - max(self.lengths, default=0), self.column + 1)

    @property
    def sampled(self) -> Tensor:
        """What was sampled in the slots in use, ending with the last token, [N, T]; -1 where nothing was."""
        return self.ids[self.seen]

    def put(self, tokens: Tensor) -> None:
        """Set the last tokens of the last slots, [N] int64."""
        count = len(self.lengths)
        self.ids[count - len(tokens) : count, self.column] = tokens

    def step(self) -> Tensor:
        """Scores [N, V] of the token that follows the last one in each slot in use; the next `put` is for it."""
        if self.column + 1 == self.ids.shape[1]:
            self.move()
        self.mask[: len(self.lengths), self.column] = True
        slots, columns = self.seen
        ids = self.ids[slots, self.column : self.column + 1]
        scores = _scores(self.policy, ids, self.mask[slots, columns], self)
        self.column += 1
        self.lengths = [length + 1 for length in self.lengths]
        return scores

    def fill(self, prompts: Prompts, rows: list[int]) -> None:
        """Put some of the prompts into the next free slots, each as often as `rows` has it."""
        width, used = prompts.mask.shape[1], len(self.lengths)
        if not self.layers:
            self.layers = [
                _Layer(self, layer) if layer.is_initialized else DummyLayer() for layer in prompts.cache.layers
            ]
        if self.column < width or not self.ids.shape[1]:
            self.move(width)
        slots, columns = slice(used, used + len(rows)), slice(self.column - width, self.column)
        which = torch.tensor(rows, device=self.device)
        self.ids[slots], self.mask[slots] = -1, False
        self.mask[slots, columns] = prompts.mask[which]
        for layer, given in zip(self.layers, prompts.cache.layers, strict=True):
            if isinstance(layer, _Layer):
                layer.keys[slots, :, columns] = given.keys[which].to(layer.keys.dtype)
                layer.values[slots, :, columns] = given.values[which].to(layer.values.dtype)
        self.lengths += [prompts.lengths[row] for row in rows]

    def free(self, places: list[int]) -> list[int]:
        """Empty some slots. The others then lie together: returns the places that they had before."""
        if not places:
            return list(range(len(self.lengths)))
        left = len(self.lengths) - len(places)
        order = list(range(left))
        holes = [place for place in places if place < left]
        movers = [place for place in range(left, len(self.lengths)) if place not in places]
        for hole, mover in zip(holes, movers, strict=True):
            order[hole] = mover
        if holes:
            _, columns = self.seen
            to, origin = torch.tensor(holes, device=self.device), torch.tensor(movers, device=self.device)
            for tensor in (self.ids, self.mask):
                tensor[to] = tensor[origin]
            for layer in self.layers:
                if isinstance(layer, _Layer):
                    for part in (layer.keys[:, :, columns], layer.values[:, :, columns]):
                        part[to] = part[origin]
        self.lengths = [self.lengths[place] for place in order]
        return order

    def move(self, width: int = 0) -> None:
        """Take other columns, of which `width` or more stand before the last tokens, and some are free behind them."""
        slots, columns = self.seen
        width = max(width, *self.lengths, 0)

        def moved(tensor: Tensor, dim: int, empty: int = 0) -> Tensor:
            shape = list(tensor.shape)
            shape[dim] = width + 1 + _MORE_COLUMNS
            new = tensor.new_full(shape, empty)  # what is masked is multiplied by 0, and must be a number
            if tensor.shape[dim]:
                old = tensor[slots].narrow(dim, columns.start, columns.stop - columns.start)
                new[slots].narrow(dim, width + 1 - old.shape[dim], old.shape[dim]).copy_(old)
            return new

        self.ids, self.mask = moved(self.ids, 1, -1), moved(self.mask, 1)
        for layer in self.layers:
            if isinstance(layer, _Layer):
                layer.keys, layer.values = moved(layer.keys, 2), moved(layer.values, 2)
        self.column = width


class _Layer(CacheLayerMixin):
    """Keys and values of one layer, [S, heads, C, D] each. Windows are the mask's business."""

    is_sliding = False
    is_compileable = True  # so that no mask is looked at to find out whether it could be left out: a wait at each step

    def __init__(self, slots: Slots, like: DynamicLayer) -> None:
        super().__init__()
        self.slots = slots
        self.keys, self.values = (_empty(tensor, slots.size) for tensor in (like.keys, like.values))
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write the keys and values of one token of each slot in use, [N, heads, 1, D]; returns those of all."""
        slots, columns = self.slots.seen
        self.keys[slots, :, columns.stop - 1] = key_states[:, :, 0].to(self.keys.dtype)
        self.values[slots, :, columns.stop - 1] = value_states[:, :, 0].to(self.values.dtype)
        return self.keys[slots, :, columns], self.values[slots, :, columns]

    def get_seq_length(self) -> int:
        return self.get_mask_sizes(0)[0]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        columns = self.slots.seen[1]
        return columns.stop - columns.start - 1 + query_length, 0

    def get_max_length(self) -> int:
        return -1


def _empty(like: Tensor, size: int) -> Tensor:
    """No columns, in the dtype in which attention will read them: autocast would cast all at every step."""
    kind = like.device.type
    half = torch.is_autocast_enabled(kind) and like.dtype == torch.float32
    dtype = torch.get_autocast_dtype(kind) if half else like.dtype
    return torch.empty((size, like.shape[1], 0, like.shape[3]), dtype=dtype, device=like.device)
