"""Probabilities of a label that a text classifier gives to texts: of toxicity, or of a refusal.

W windows of texts, T padded tokens, L labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from torch import Tensor

from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.models.classifiers import load_classifier, token_head
from rlhf_lightning.models.configuration import load_config, max_positions
from rlhf_lightning.models.precision import move
from rlhf_lightning.models.states import last_states

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class Loading(TypedDict, total=False):
    """How a classifier is loaded; see `TextClassifier`."""

    batch_size: int
    device: str
    trust_remote_code: bool


class TextClassifier:
    """Any `AutoModelForSequenceClassification` with a fast tokenizer, in float32.

    The probability of a text is that of its labels asked for: their sum under softmax, or, where a text may have
    several labels, the highest under sigmoid. A long text is read in windows of as many tokens as the model has
    positions for, an eighth of which neighbours share, and the highest window counts. A text that cannot be scored
    (half of a surrogate pair, logits that are not finite) gets None.

    Args:
        name: Hub name or directory.
        labels: Names of the labels asked for, as in the model's `id2label`.
        batch_size: Windows at a time; it changes no number.
        device: Such as `cpu` or `cuda`.
        trust_remote_code: Run code that comes with the model.

    Raises `ModelError` for what is no classifier or has no fast tokenizer, and `ConfigurationError` for a label that
    it does not have.
    """

    def __init__(
        self,
        name: str,
        *,
        labels: Sequence[str],
        batch_size: int = 32,
        device: str = "cpu",
        trust_remote_code: bool = False,
    ) -> None:
        self.name = name
        self.labels = list(labels)
        self.batch_size = batch_size
        known = read_labels(name, trust_remote_code=trust_remote_code)
        if absent := [label for label in labels if label not in known.names]:
            raise ConfigurationError(f"{name}: label {absent[0]!r} is not one of its labels, {', '.join(known.names)}")
        self.label_ids = [known.names.index(label) for label in labels]
        self.activation = "sigmoid" if known.several else "softmax"
        config = load_config(name, trust_remote_code=trust_remote_code)
        self.model = load_classifier(name, config, trust_remote_code=trust_remote_code)
        move(self.model, torch.device(device), torch.float32)
        self.tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        if not self.tokenizer.is_fast:
            raise ModelError(f"{name}: its tokenizer has no fast version, which cuts windows; give one that has")
        limits = max_positions(config.get_text_config()), self.tokenizer.model_max_length
        bounded = [limit for limit in limits if limit is not None and limit < 10**6]
        if not bounded:
            raise ModelError(f"{name}: neither its configuration nor its tokenizer says how long a text may be")
        self.limit = min(bounded)
        """Longest window in tokens."""

    def __call__(self, texts: Sequence[str], *, prompts: Sequence[str] | None = None) -> list[float | None]:
        """The probability of each text, or None where it failed.

        With `prompts` a text is read as the second of a pair, in one window: the longer of the two loses its end.
        """
        windows = [
            window
            for place, text in enumerate(texts)
            for window in self._windows(place, text, None if prompts is None else prompts[place])
        ]
        highest = [-math.inf] * len(texts)
        order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
        for start in range(0, len(order), self.batch_size):
            part = [windows[i] for i in order[start : start + self.batch_size]]
            for window, probability in zip(part, self._probabilities(part), strict=True):
                # False for NaN too; infinity then stays, since one window that failed fails its text.
                if not probability <= highest[window.text]:
                    highest[window.text] = probability if math.isfinite(probability) else math.inf
        return [value if math.isfinite(value) else None for value in highest]

    def _windows(self, place: int, text: str, prompt: str | None) -> list[_Window]:
        try:
            (text + (prompt or "")).encode("utf-8")
        except UnicodeEncodeError:
            return []
        settings = {"truncation": True, "max_length": self.limit, "return_token_type_ids": True, "verbose": False}
        if prompt is not None:
            encoded = self.tokenizer(prompt, text, **settings)
            return [_Window(place, encoded["input_ids"], encoded["token_type_ids"])]
        encoded = self.tokenizer(text, stride=self.limit // 8, return_overflowing_tokens=True, **settings)
        rows = zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
        return [_Window(place, ids, kinds) for ids, kinds in rows]

    @torch.no_grad()
    def _probabilities(self, windows: Sequence[_Window]) -> list[float]:
        width = max(max(len(window.ids) for window in windows), 1)
        pad = self.tokenizer.pad_token_id or 0
        device = next(self.model.parameters()).device
        ids = torch.tensor([[*w.ids, *[pad] * (width - len(w.ids))] for w in windows], device=device)
        kinds = torch.tensor([[*w.kinds, *[0] * (width - len(w.kinds))] for w in windows], device=device)
        lengths = torch.tensor([max(len(w.ids), 1) for w in windows], device=device)
        logits = self._logits(ids, torch.arange(width, device=device) < lengths[:, None], kinds).float()
        if self.activation == "sigmoid":
            return logits.sigmoid()[:, self.label_ids].amax(dim=1).tolist()
        return logits.softmax(dim=1)[:, self.label_ids].sum(dim=1).tolist()

    def _logits(self, ids: Tensor, mask: Tensor, kinds: Tensor) -> Tensor:
        """[W, L], for ids, mask (bool) and token types, all [W, T]."""
        head = token_head(self.model)
        if head is not None:
            return head(last_states(self.model.base_model, ids, mask))
        types = getattr(self.model.config, "type_vocab_size", 0) or 0
        has_types = types > 1 and "token_type_ids" in self.tokenizer.model_input_names
        arguments = {"token_type_ids": kinds} if has_types else {}
        return self.model(input_ids=ids, attention_mask=mask.long(), **arguments).logits


class _Window(NamedTuple):
    text: int
    """Position of its text."""
    ids: list[int]
    kinds: list[int]
    """Token types: 1 on the second text of a pair."""


class Labels(NamedTuple):
    """The labels of a classifier, in order."""

    names: list[str]
    multi_label: bool
    """Whether its configuration says that a text may have several."""

    @property
    def several(self) -> bool:
        """Whether the probability of each label is its own sigmoid."""
        return self.multi_label or len(self.names) == 1


def read_labels(name: str, *, trust_remote_code: bool = False) -> Labels:
    """The labels of a classifier. Raises `ModelError` for what is none."""
    config: PretrainedConfig = load_config(name, trust_remote_code=trust_remote_code)
    if not any("SequenceClassification" in each for each in config.architectures or []):
        raise ModelError(f"{name}: a {config.model_type} model without a classification head; give a text classifier")
    kind = getattr(config, "problem_type", None)
    if kind == "regression":
        raise ModelError(f"{name}: a regression, whose output is no probability; give a classifier")
    names = [config.id2label[place] for place in sorted(config.id2label)]
    return Labels(names, kind == "multi_label_classification")
