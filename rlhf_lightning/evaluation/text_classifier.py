"""Probabilities of a label that a text classifier gives to texts: of toxicity, or of a refusal.

W windows of texts, T padded tokens, L labels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lightning.data.chat_format import load_tokenizer
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.models.backbones import load_config, max_positions
from rlhf_lightning.models.classifiers import last_states, load_classifier, token_head
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.precision import move

Activation = Literal["softmax", "sigmoid"]
"""`softmax` where a text has one of the labels, `sigmoid` where it may have several."""

_UNNAMED = re.compile(r"label_\d+")


class TextClassifier:
    """Any `AutoModelForSequenceClassification` with a fast tokenizer.

    The probability of a text is that of its labels asked for: their sum under softmax, the highest under sigmoid. A
    long text is read in windows of `max_length` tokens, and the highest window counts. A text that cannot be scored
    (half of a surrogate pair, logits that are not finite) gets None.

    Args:
        name: Hub name or directory.
        labels: Names of the labels asked for, as in the model's `id2label`.
        activation: Of the logits.
        max_length: Longest window in tokens; as many as the model has positions for when not given.
        stride: Tokens that neighbouring windows share; an eighth of a window when not given.
        batch_size: Windows at a time; it changes no number.
        device: Where it computes.
        dtype: Of the weights. Probabilities are float32 whatever it is.
        trust_remote_code: Run code that comes with the model.

    Raises `ModelError` for what is no classifier or has no fast tokenizer, and `ConfigurationError` for a label that
    it does not have, and for windows that cannot move on.
    """

    def __init__(
        self,
        name: str,
        *,
        labels: Sequence[str],
        activation: Activation,
        max_length: int | None = None,
        stride: int | None = None,
        batch_size: int = 32,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        self.activation = activation
        config = _classifier_config(name, trust_remote_code=trust_remote_code)
        self.labels = list(labels)
        known = label_names(config)
        if not labels or (absent := [label for label in labels if label not in known]):
            asked = absent[0] if labels else "none"
            raise ConfigurationError(f"{name}: label {asked!r} is not one of its labels, {', '.join(known)}")
        self.label_ids = [known.index(label) for label in labels]
        self.model = load_classifier(name, config, trust_remote_code=trust_remote_code)
        move(self.model, torch.device(device), dtype)
        self.tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        if not self.tokenizer.is_fast:
            raise ModelError(f"{name}: its tokenizer has no fast version, which cuts windows; give one that has")
        self.limit = self._limit(max_length, max_positions(config.get_text_config()))
        room = self.limit - self.tokenizer.num_special_tokens_to_add(pair=False)
        stride = self.limit // 8 if stride is None else stride
        if not 0 <= stride < room:
            raise ConfigurationError(
                f"{name}: windows of {self.limit} tokens, {room} of them text, that share {stride}, do not move on; "
                "lower stride, or raise max_length"
            )
        self.stride = stride
        self.weights = weights_fingerprint(self.model)

    def __call__(self, texts: Sequence[str], *, prompts: Sequence[str] | None = None) -> list[float | None]:
        """The probability of each text, or None where it failed.

        With `prompts` a text is read as the second of a pair, in one window: the longer of the two loses its end.
        """
        windows = [
            window
            for place, text in enumerate(texts)
            for window in self._windows(place, text, None if prompts is None else prompts[place])
        ]
        highest: list[float | None] = [None] * len(texts)
        broken = set(range(len(texts))) - {window.text for window in windows}
        order = sorted(range(len(windows)), key=lambda i: len(windows[i].ids))
        for start in range(0, len(order), self.batch_size):
            part = [windows[i] for i in order[start : start + self.batch_size]]
            for window, probability in zip(part, self._probabilities(part), strict=True):
                if not math.isfinite(probability):
                    broken.add(window.text)
                elif highest[window.text] is None or probability > highest[window.text]:
                    highest[window.text] = probability
        return [None if place in broken else value for place, value in enumerate(highest)]

    def _windows(self, place: int, text: str, prompt: str | None) -> list[_Window]:
        for part in (text, prompt or ""):
            try:
                part.encode("utf-8")
            except UnicodeEncodeError:
                return []
        settings = {"truncation": True, "max_length": self.limit, "return_token_type_ids": True}
        if prompt is not None:
            encoded = self.tokenizer(prompt, text, verbose=False, **settings)
            return [_Window(place, encoded["input_ids"], encoded["token_type_ids"])]
        encoded = self.tokenizer(text, stride=self.stride, return_overflowing_tokens=True, verbose=False, **settings)
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
            return head(last_states(self.model, ids, mask))
        types = getattr(self.model.config, "type_vocab_size", 0) or 0
        arguments = {"token_type_ids": kinds} if types > 1 and "token_type_ids" in self._inputs() else {}
        return self.model(input_ids=ids, attention_mask=mask.long(), **arguments).logits

    def _inputs(self) -> Sequence[str]:
        return self.tokenizer.model_input_names

    def _limit(self, max_length: int | None, positions: int | None) -> int:
        own = self.tokenizer.model_max_length
        known = [limit for limit in (positions, own) if limit is not None and limit < 10**6]
        if max_length is None and not known:
            raise ConfigurationError(f"{self.name}: it does not say how long a text may be; give max_length")
        if max_length is not None and positions is not None and max_length > positions:
            raise ConfigurationError(
                f"max_length: {max_length} is more than the {positions} positions of {self.name}; leave it out"
            )
        return min(known) if max_length is None else max_length


class _Window(NamedTuple):
    text: int
    """Position of its text."""
    ids: list[int]
    kinds: list[int]
    """Token types: 1 on the second text of a pair."""


class Labels(NamedTuple):
    """The labels of a classifier, and how its logits become their probabilities."""

    names: list[str]
    multi_label: bool
    """Whether its configuration says that a text may have several."""


def read_labels(name: str, *, trust_remote_code: bool = False) -> Labels:
    """The labels of a classifier, in order. Raises `ModelError` for what is none."""
    config = _classifier_config(name, trust_remote_code=trust_remote_code)
    if getattr(config, "problem_type", None) == "regression":
        raise ModelError(f"{name}: a regression, whose output is no probability; give a classifier")
    return Labels(label_names(config), getattr(config, "problem_type", None) == "multi_label_classification")


def label_names(config: Any) -> list[str]:
    return [config.id2label[place] for place in sorted(config.id2label)]


def unnamed(label: str) -> bool:
    """Whether a label is `LABEL_0` and the like, which transformers fills in."""
    return _UNNAMED.fullmatch(label.casefold()) is not None


def _classifier_config(name: str, *, trust_remote_code: bool) -> Any:
    config = load_config(name, trust_remote_code=trust_remote_code)
    if not any("SequenceClassification" in each for each in config.architectures or []):
        raise ModelError(f"{name}: a {config.model_type} model without a classification head; give a text classifier")
    return config
