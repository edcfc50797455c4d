"""Scores of responses: by a reward model, or by how much a policy prefers them to its reference.

R rows (a prompt and one response each), T padded tokens.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.batches import ModelInputs, collate_rows, like_together
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.chat_text import TRANSCRIPT
from rlhf_lightning.data.examples import Message
from rlhf_lightning.data.tokenizer import check_reference_tokenizer, load_tokenizer
from rlhf_lightning.data.truncation import truncate_left
from rlhf_lightning.errors import ConfigurationError, DataError, ModelError
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.classifiers import load_classifier, token_head
from rlhf_lightning.models.configuration import load_config, max_positions
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.head_ensemble import HeadEnsemble
from rlhf_lightning.models.precision import move
from rlhf_lightning.models.reward_network import RewardNetwork, is_reward_network
from rlhf_lightning.models.states import last_states
from rlhf_lightning.rewards.texts import PAIR, EncodedRow, WrittenText, check_pair, check_reward_template
from rlhf_lightning.tiny import resolve_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig

log = logging.getLogger(__name__)

ScorerKind = Literal["Seq. Classifier", "Custom Classifier", "DPO", "DPO Ref. Free"]
"""RewardBench's names for what gave a score."""
LengthNorm = Literal["sum", "average"]
"""Log-probs of a whole response, or per token."""


class Scored(NamedTuple):
    """One response, scored; higher is better."""

    score: float
    """float32"""
    tokens: int
    """Of the response, EOS token included; its characters where a function scores."""
    truncated: bool
    """Whether the beginning of its prompt was cut off, or more."""
    heads: tuple[float, ...] = ()
    """float32, of each head of an ensemble, whose mean is the score; empty for any other scorer."""


class Scorer(Protocol):
    """Scores responses to conversations."""

    name: str
    """As the user gave it."""
    kind: ScorerKind
    fingerprint: str
    """A hash of all that decides the scores: weights, format, longest row, dtype. Not the batch size or the device."""

    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[Scored]:
        """The score of each response to the prompt in the same place.

        One that has not `ended`, being cut at the longest length, is scored as it stands, without an end of turn; all
        have when not given.
        """
        ...


class RewardScorer:
    """A saved `RewardNetwork`, or an `AutoModelForSequenceClassification` with one label, with its own tokenizer.

    Conversations and responses are written in the format of *its* tokenizer, response and EOS token included, as in
    the training of our reward models, or as `chat_template` says; a line in the log shows it. A row that is too long
    loses the beginning of its prompt, after the template's head, and never its response, unless that alone is too long:
    then its end is kept. The score is read at the last true token, in float32, so that it is the same in any batch and
    with padding on either side.

    Args:
        name: Directory or hub name.
        chat_template: A Jinja file of the whole text, response included; `plain`, the words alone, a line for each
            turn; `pair`, prompt and response as the tokenizer's two texts; or `transcript`, the built-in format. When
            not given, the tokenizer's own chat template, and without one the transcript.
        batch_size: Rows at a time.
        max_length: Longest row in tokens; as many as the model has positions for when not given.
        device: Where it computes.
        dtype: Of the weights. Scores are float32 whatever it is: bfloat16 scores tie.
        trust_remote_code: Run code that comes with the model.

    Raises `ModelError` for what is no reward model, and `ConfigurationError` for a `max_length` that it has no
    positions for and for a `chat_template` that is none.
    """

    def __init__(
        self,
        name: str,
        *,
        chat_template: str | None = None,
        batch_size: int = 8,
        max_length: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = name
        self.batch_size = batch_size
        check_reward_template(chat_template)
        config = check_scores_rows(name, trust_remote_code=trust_remote_code)
        self.model: nn.Module
        self.kind: ScorerKind
        if is_reward_network(config):
            self.kind = "Custom Classifier"
            self.model = RewardNetwork.from_pretrained(
                resolve_model(name), layout="auto", trust_remote_code=trust_remote_code
            )
        else:
            self.kind = "Seq. Classifier"
            self.model = load_classifier(name, config, layout="auto", trust_remote_code=trust_remote_code)
        self.model.eval().requires_grad_(False)
        self.limit = _limit(name, max_length, max_positions(config.get_text_config()))
        self.tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
        self.chat_format: ChatFormat | WrittenText
        if chat_template in (None, TRANSCRIPT):
            self.chat_format = ChatFormat(self.tokenizer, chat_template=chat_template)
        else:
            self.chat_format = WrittenText(self.tokenizer, chat_template)
        self.pairs = chat_template == PAIR
        if self.pairs:
            check_pair(self.tokenizer, name)
        self._say_text(chat_template)
        parts = (weights_fingerprint(self.model), self.chat_format.fingerprint(), self.limit, str(dtype))
        self.fingerprint = _digest(self.kind, *parts)
        head = getattr(self.model, "score", None)
        self.num_heads = len(head) if isinstance(head, HeadEnsemble) else 1
        self.to(torch.device(device), dtype)

    def to(self, device: torch.device, dtype: torch.dtype | None) -> None:
        """Move it there, its weights in `dtype` where one is given."""
        move(self.model, device, dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[Scored]:
        """As `Scorer`. Raises `DataError` when the chat template does not take a conversation."""
        rows = self._rows(prompts, responses, ended)
        return _in_batches(rows, self._scores, batch_size=self.batch_size, pad_id=self.chat_format.pad_id)

    def _rows(
        self, prompts: Sequence[Sequence[Message]], responses: Sequence[str], ended: Sequence[bool] | None
    ) -> list[EncodedRow]:
        if isinstance(self.chat_format, WrittenText):
            ended = [True] * len(responses) if ended is None else ended
            return self.chat_format.rows(prompts, responses, ended, limit=self.limit)
        return encode_rows(self.chat_format, prompts, responses, limit=self.limit, ended=ended)

    def _say_text(self, chat_template: str | None) -> None:
        """How the text is made, with the ids of an example written out, since a wrong text gives wrong scores."""
        row = self._rows([[{"role": "user", "content": "PROMPT"}]], ["RESPONSE"], None)[0]
        source = f"reward_chat_template {chat_template}"
        if chat_template is None:
            source = "its tokenizer's chat template"
            if isinstance(self.chat_format, ChatFormat) and self.chat_format.template is None:
                source = "the built-in transcript, its tokenizer having no chat template"
        text = self.tokenizer.decode([*row.prompt, *row.response], clean_up_tokenization_spaces=False)
        log.info("reward model %s: reads %r, by %s", self.name, text, source)

    def _scores(self, ids: Tensor, mask: Tensor, response_mask: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        if isinstance(self.model, RewardNetwork):
            return self.model.each(ids, mask)
        head = token_head(self.model)
        if head is None:  # an encoder's own pooling, which goes by the mask
            types = {"token_type_ids": response_mask.long().to(device)} if self._has_types else {}
            return self.model(input_ids=ids, attention_mask=mask.long(), **types).logits[:, 0]
        last = last_states(self.model.base_model, ids, mask)
        if isinstance(head, nn.Linear):
            return F.linear(last.float(), head.weight.float(), None if head.bias is None else head.bias.float())[:, 0]
        return head(last)[:, 0]

    @property
    def _has_types(self) -> bool:
        """Whether the model is told the two texts of a pair by the types of their tokens."""
        types = getattr(self.model.config, "type_vocab_size", 0)
        return self.pairs and types > 1 and "token_type_ids" in self.tokenizer.model_input_names


class ImplicitScorer:
    """DPO's implicit reward: log pi(response | prompt) - log pi_ref(response | prompt), in nats, without beta.

    The tokens that count are those of the response, after the generation prompt, and one EOS token. (RewardBench's
    own script counts the assistant's header too, and BOS and EOS twice where the template has them.) Rafailov et al.
    2023 (arXiv 2305.18290), eq. 5; the prompt's partition function is the same for all its responses.

    Args:
        policy: Directory or hub name of a causal language model, whole or LoRA adapters alone.
        reference: Another one of the same tokenizer; without it the score is the policy's own log-prob.
        length_norm: `sum` over the response's tokens, or their `average`.
        batch_size: Rows at a time.
        max_length: Longest row in tokens; as many as the models have positions for when not given.
        device: Where it computes.
        dtype: Of the weights. Log-softmax and sums are float32 whatever it is.
        trust_remote_code: Run code that comes with the models.

    Raises `ModelError` for what is no language model or has another tokenizer than the policy, and
    `ConfigurationError` for a `max_length` that one of them has no positions for.
    """

    def __init__(
        self,
        policy: str,
        reference: str | None = None,
        *,
        length_norm: LengthNorm = "sum",
        batch_size: int = 8,
        max_length: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        trust_remote_code: bool = False,
    ) -> None:
        self.name = policy
        self.reference_name = reference
        self.kind: ScorerKind = "DPO Ref. Free" if reference is None else "DPO"
        self.length_norm = length_norm
        self.batch_size = batch_size
        tokenizer = load_tokenizer(policy, trust_remote_code=trust_remote_code)
        self.chat_format = ChatFormat(tokenizer)
        loading: dict[str, Any] = {"layout": "auto", "trust_remote_code": trust_remote_code}
        self.policy = CausalLM.from_pretrained(policy, **loading)
        self.reference = None
        if reference is not None:
            check_reference_tokenizer(reference, tokenizer, trust_remote_code=trust_remote_code)
            self.reference = CausalLM.from_pretrained(reference, **loading)
        self.models = [model for model in (self.policy, self.reference) if model is not None]
        sizes = [model.config.get_text_config().vocab_size for model in self.models]
        if min(sizes) < len(tokenizer):
            raise ModelError(
                f"{(policy, reference)[sizes.index(min(sizes))]}: knows {min(sizes)} token ids, and the tokenizer of "
                f"{policy} has {len(tokenizer)}; give a model of the same tokenizer"
            )
        positions = [max_positions(model.config.get_text_config()) for model in self.models]
        known = [limit for limit in positions if limit is not None]
        self.limit = _limit(policy, max_length, min(known) if known else None)
        parts = (*map(weights_fingerprint, self.models), self.chat_format.fingerprint(), self.limit, str(dtype))
        self.fingerprint = _digest(self.kind, length_norm, *parts)
        for model in self.models:
            move(model.eval().requires_grad_(False), torch.device(device), dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[Sequence[Message]],
        responses: Sequence[str],
        ended: Sequence[bool] | None = None,
    ) -> list[Scored]:
        """As `Scorer`. Raises `DataError` when the chat template does not take a conversation."""
        rows = encode_rows(self.chat_format, prompts, responses, limit=self.limit, ended=ended)
        return _in_batches(rows, self._scores, batch_size=self.batch_size, pad_id=self.chat_format.pad_id)

    def _scores(self, *rows: Tensor) -> Tensor:
        rows = tuple(tensor.to(next(self.policy.parameters()).device) for tensor in rows)
        own, *others = (self._logprobs(model, rows) for model in self.models)
        return own - others[0] if others else own

    def _logprobs(self, model: CausalLM, rows: tuple[Tensor, ...]) -> Tensor:
        responses = model(*rows)
        return responses.averages if self.length_norm == "average" else responses.sums


def encode_rows(
    chat_format: ChatFormat,
    prompts: Sequence[Sequence[Message]],
    responses: Sequence[str],
    *,
    limit: int | None,
    ended: Sequence[bool] | None = None,
) -> list[EncodedRow]:
    """Rows of at most `limit` tokens, of the same ids as in training (see `ChatFormat`).

    The EOS token is behind each response that has `ended` (all when not given). An encoder's SEP ends every row: it is
    no sign of the response.

    A prompt that is too long is cut as in training (see `ChatFormat.encode_turns`): its head stays, then come the
    latest turns that fit. A response that alone is too long loses its beginning. Raises `DataError` when the chat
    template does not take a prompt; a response that it would change is written as it stands.
    """
    if ended is None or chat_format.eos_id == chat_format.tokenizer.sep_token_id:
        ended = [True] * len(responses)
    heads = chat_format.encode_turns([(messages, chat_format.generation_text(messages)) for messages in prompts])
    encoded = chat_format.encode_responses(heads, [[each] for each in responses], ended=ended, refuse=False)
    rows = []
    for prompt, found in zip(heads, encoded, strict=True):
        if isinstance(found, DataError):
            raise found
        head, (tail,) = found
        if limit is None or len(head) + len(tail) <= limit:
            rows.append(EncodedRow(head, tail, False))
            continue
        tail = tail[-(limit - 1) :]  # a token before it, so that its first one has a log-prob
        room = limit - len(tail)
        if room > prompt.turns[0] + chat_format.tail_length:
            head = truncate_left(head, prompt.turns, room=room)
        else:
            head = head[-room:]
        rows.append(EncodedRow(head, tail, True))
    return rows


def padded(rows: Sequence[EncodedRow], pad_id: int) -> ModelInputs:
    """Rows for a forward pass, right-padded."""
    ids = [torch.tensor([*row.prompt, *row.response]) for row in rows]
    return collate_rows(ids, [len(row.prompt) for row in rows], pad_id=pad_id)


def _in_batches(
    rows: Sequence[EncodedRow], score: Callable[[Tensor, Tensor, Tensor], Tensor], *, batch_size: int, pad_id: int
) -> list[Scored]:
    """The rows in their order, scored in batches of like length and of the same prompts.

    `score` gives scores [R], or those of K heads, [R, K].
    """
    found: list[Scored] = [Scored(0.0, 0, False)] * len(rows)
    order = like_together([row.prompt for row in rows], [len(row.prompt) + len(row.response) for row in rows])
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        scores = score(*padded([rows[i] for i in part], pad_id).text).float().cpu()
        each = scores if scores.dim() == 2 else scores[:, None]
        for i, mean, heads in zip(part, each.mean(dim=1).tolist(), each.tolist(), strict=True):
            found[i] = Scored(mean, len(rows[i].response), rows[i].truncated, tuple(heads) if len(heads) > 1 else ())
    return found


def _limit(name: str, max_length: int | None, positions: int | None) -> int | None:
    if max_length is not None and max_length < 2:
        raise ConfigurationError(f"max_length: {max_length} leaves no room for a prompt and a response")
    if max_length is not None and positions is not None and max_length > positions:
        log.warning(
            "max_length is %d, but %s has positions for %d tokens: it is set to that", max_length, name, positions
        )
        return positions
    return positions if max_length is None else max_length


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def check_scores_rows(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model that gives a row one score. Raises `ModelError` for any other."""
    config = load_config(name, trust_remote_code=trust_remote_code)
    if is_reward_network(config):
        return config
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
    return config
