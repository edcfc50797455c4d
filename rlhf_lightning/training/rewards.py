"""Where the reward of a response comes from: a reward model, a sequence classifier, or a function of the user's.

B responses.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lightning.data.chat_format import ChatFormat, load_tokenizer
from rlhf_lightning.data.examples import Message
from rlhf_lightning.errors import ConfigurationError, ModelError, TrainingError
from rlhf_lightning.functional.reductions import last_token_index
from rlhf_lightning.models.backbones import hidden_states, load_config, max_positions, reason_of
from rlhf_lightning.models.reward_network import RewardNetwork, is_reward_network
from rlhf_lightning.tiny import TINY, resolve_model

RewardFunction = Callable[[Sequence[list[Message]], Sequence[str]], Sequence[float]]
"""Takes B conversations, each a list of {role, content}, and the B responses as text; gives B floats."""


def reward_source(given: str, *, batch_size: int, trust_remote_code: bool = False) -> RewardSource:
    """What a `reward_model` key names: `module:function`, or a directory or hub name of a model that scores.

    Raises `ConfigurationError` or `ModelError` when it names nothing of the kind.
    """
    module, colon, function = given.partition(":")
    names = colon and function.isidentifier() and all(part.isidentifier() for part in module.split("."))
    if names and given != TINY:
        return FunctionReward(_imported(module, function, given), given)
    return ModelReward(given, batch_size=batch_size, trust_remote_code=trust_remote_code)


class RewardSource:
    """Scores responses; higher is better."""

    name: str

    def __call__(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        """Scores [B], float32, on the CPU."""
        raise NotImplementedError

    def to(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move a model there, its weights in `dtype` where one is given."""


class FunctionReward(RewardSource):
    """A Python function. Raises `TrainingError` when it raises, or gives another number of scores than of responses."""

    def __init__(self, function: RewardFunction, name: str) -> None:
        self.function = function
        self.name = name

    def __call__(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        try:
            scores = [float(score) for score in self.function(prompts, responses)]
        except Exception as error:
            raise TrainingError(
                f"model.reward_model: {self.name} raised {type(error).__name__} ({reason_of(error)})"
            ) from error
        if len(scores) != len(responses):
            raise TrainingError(
                f"model.reward_model: {self.name} gave {len(scores)} scores for {len(responses)} responses"
            )
        return torch.tensor(scores, dtype=torch.float32)


class ModelReward(RewardSource):
    """A saved `RewardNetwork`, or an `AutoModelForSequenceClassification` with one label, with its own tokenizer.

    Conversations and responses are written in the format of *its* tokenizer, response and terminator included, as in
    the training of our reward models; so the policy may have another one. A row that is longer than the model has
    positions for loses the beginning of its prompt, and `cut` counts them.
    """

    def __init__(self, name: str, *, batch_size: int, trust_remote_code: bool = False) -> None:
        self.name = name
        self.batch_size = batch_size
        self.cut = 0
        config = load_config(name, trust_remote_code=trust_remote_code)
        self.model: nn.Module
        if is_reward_network(config):
            self.model = RewardNetwork.from_pretrained(resolve_model(name), trust_remote_code=trust_remote_code)
        else:
            self.model = _classifier(name, config, trust_remote_code)
        self.model.eval().requires_grad_(False)
        self.limit = max_positions(config.get_text_config())
        self.chat_format = ChatFormat(load_tokenizer(name, trust_remote_code=trust_remote_code))

    def to(self, device: torch.device, dtype: torch.dtype | None) -> None:
        for parameter in self.model.parameters():  # weights alone: rotary frequencies stay float32
            parameter.data = parameter.data.to(dtype or parameter.dtype).to(device)
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> Tensor:
        rows = self._rows(prompts, responses)
        scores = torch.empty(len(rows), dtype=torch.float32)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        device = next(self.model.parameters()).device
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            width = len(rows[part[-1]])
            ids = torch.full((len(part), width), self.chat_format.pad_id)
            mask = torch.zeros(len(part), width, dtype=torch.bool)
            for place, i in enumerate(part):
                ids[place, : len(rows[i])] = torch.tensor(rows[i])
                mask[place, : len(rows[i])] = True
            scores[part] = self._scores(ids.to(device), mask.to(device)).float().cpu()
        return scores

    def _rows(self, prompts: Sequence[list[Message]], responses: Sequence[str]) -> list[list[int]]:
        form = self.chat_format
        heads = form.encode_prompts([form.prompt_text(messages) for messages in prompts])
        tails = [
            [*ids, form.terminator_id] for ids in form.encode([form.response_text(response) for response in responses])
        ]
        rows = []
        for head, tail in zip(heads, tails, strict=True):
            over = 0 if self.limit is None else len(head) + len(tail) - self.limit
            if over > 0:
                self.cut += 1
                head, tail = head[over:], tail[-self.limit :]
            rows.append(head + tail)
        return rows

    def _scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        if isinstance(self.model, RewardNetwork):
            return self.model(ids, mask)
        head = getattr(self.model, "score", None)
        if head is None:  # an encoder's own pooling, which goes by the mask
            return self.model(input_ids=ids, attention_mask=mask.long()).logits[:, 0]
        # A decoder's own pooling goes by the pad id, which may be the terminator's.
        hidden = hidden_states(self.model.base_model, ids, mask)
        rows = torch.arange(len(ids), device=ids.device)
        return head(hidden[rows, last_token_index(mask)])[:, 0]


def check_scores(scores: Tensor, example_ids: Sequence[str], name: str) -> None:
    """Stop before a NaN or infinite score, [B], becomes a gradient. Raises `TrainingError` naming the prompts."""
    wrong = [
        (example, score)
        for example, score in zip(example_ids, scores.tolist(), strict=True)
        if not math.isfinite(score)
    ]
    if wrong:
        named = ", ".join(f"{example} ({score})" for example, score in wrong[:5])
        raise TrainingError(
            f"model.reward_model: {name} gave scores that are not finite for the prompts {named}"
            + (f" and {len(wrong) - 5} more" if len(wrong) > 5 else "")
            + "; the weights were not changed by them"
        )


def _imported(module: str, function: str, given: str) -> RewardFunction:
    sys.path.insert(0, os.getcwd())  # a file beside the user's configuration
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigurationError(
            f"model.reward_model: {given} cannot be imported ({reason_of(error)}); give module:function of a module in "
            "this directory or of an installed package, or the directory of a reward model"
        ) from error
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise ConfigurationError(f"model.reward_model: {given} is a {type(found).__name__}, not a function")
    return found


def _classifier(name: str, config: Any, trust_remote_code: bool) -> nn.Module:
    from transformers import AutoModelForSequenceClassification

    if not any("SequenceClassification" in each for each in config.architectures or []):
        raise ModelError(
            f"{name}: a {config.model_type} model without a reward head; give the directory of a trained reward model, "
            "a sequence classifier with one label, or module:function"
        )
    if config.num_labels != 1:
        raise ModelError(
            f"{name}: a classifier of {config.num_labels} labels, of which none is the reward; give one with a single "
            "label, or call it from a module:function"
        )
    try:
        return AutoModelForSequenceClassification.from_pretrained(
            str(Path(resolve_model(name)).expanduser()) if Path(name).expanduser().exists() else name,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
        )
    except Exception as error:
        raise ModelError(f"{name}: its weights could not be loaded ({reason_of(error)})") from error
