"""Policies: a causal language model, whole or with LoRA adapters, and the log-probabilities of its responses.

R rows, T padded tokens, N response tokens of all rows together, H hidden size, V vocabulary.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.batches import Layout
from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.files.adapters import (
    BASE,
    CONFIG,
    LANGUAGE_MODEL,
    adapter_task,
    adapters_alone,
    check_base_of_others,
)
from rlhf_lightning.functional.logprobs import linear_argmax, linear_logprobs, sequence_logprobs
from rlhf_lightning.functional.reductions import scatter_to_mask
from rlhf_lightning.functional.shapes import check_layout, check_not_empty
from rlhf_lightning.models.adapters import adapted_layers, switched_off
from rlhf_lightning.models.backbones import AttentionImplementation, load_weights, probed_attention, use_attention
from rlhf_lightning.models.configuration import load_config, write_published_settings
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.four_bits import check_four_bits, dequantized, four_bits, is_quantized, with_whole_weights
from rlhf_lightning.models.packed_attention import FLEX
from rlhf_lightning.models.precision import frozen_linear
from rlhf_lightning.models.reward_network import is_reward_network
from rlhf_lightning.models.row_check import check_rows
from rlhf_lightning.models.states import hidden_states, token_states
from rlhf_lightning.models.storage import edited_settings, replaced_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_PROBE_TOKENS = 6
_PROBE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters: W + (lora_alpha / r) B A, the model's own W at the start (Hu et al. 2021, arXiv 2106.09685).

    Args:
        r: Rank.
        lora_alpha: Scale; the update is multiplied by lora_alpha / r.
        lora_dropout: Of the adapters' input. Above 0 the policy's log-probs become random numbers.
        target_modules: Names of the layers that get adapters (`[q_proj, v_proj]`), or `all-linear` for every linear
            layer but the output layer.
        modules_to_save: Layers that are trained whole in addition to the adapters, such as `lm_head`.
        init_lora_weights: How they begin: true, B = 0 and A uniform; `gaussian`, B = 0 and A normal; `pissa` (arXiv
            2404.02948) or `olora` (arXiv 2406.01775), parts of W that are taken off the weights below them, so that
            with the adapters off the policy is another model: they go with `reference: frozen`.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    init_lora_weights: bool | str = True

    @property
    def changes_base(self) -> bool:
        """Whether the weights below the adapters are others than those of the model they were put on."""
        return self.init_lora_weights in ("pissa", "olora")

    def __post_init__(self) -> None:
        if self.r < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ModelError(
                f"lora: r must be 1 or more, lora_alpha above 0, lora_dropout in [0, 1); given {asdict(self)}"
            )
        if self.init_lora_weights is not True and self.init_lora_weights not in ("gaussian", "pissa", "olora"):
            raise ModelError(
                f"model.lora.init_lora_weights: {self.init_lora_weights} is none of true, gaussian, pissa, olora; "
                "peft's others need data, quantize, or begin as another model than the one below them"
            )


class ResponseStates(NamedTuple):
    """What stands before each response token of R rows: all that the output layer needs, and no prompt or padding."""

    hidden: Tensor
    """[N, H], the last hidden state of the token before."""
    targets: Tensor
    """[N] int64, the response tokens, row by row."""
    mask: Tensor
    """[R, T] bool, True where a response token stands; its N True entries, row by row, are the N tokens."""


class ResponseLogprobs(NamedTuple):
    """Log-probabilities of R responses, EOS token included, in nats, float32."""

    tokens: Tensor
    """[R, T]: log p(token | all before it) at each response token, 0 elsewhere."""
    mask: Tensor
    """[R, T] bool, True on the response tokens."""

    @property
    def sums(self) -> Tensor:
        """Log-probability of each response, [R]."""
        return sequence_logprobs(self.tokens, self.mask)

    @property
    def averages(self) -> Tensor:
        """The same per token, [R]."""
        return sequence_logprobs(self.tokens, self.mask, average=True)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each response, [R] int64."""
        return self.mask.sum(dim=1)


class CausalLM(nn.Module):
    """A decoder with its output layer, and with LoRA adapters where asked for.

    The output layer is applied to response positions alone and in chunks: the [tokens, V] logits never exist.
    """

    def __init__(self, model: PreTrainedModel, *, temperature: float = 1.0) -> None:
        super().__init__()
        self.model: PreTrainedModel = model
        """Wrapped by peft where there are adapters."""
        self.temperature = temperature
        """What the model itself divides its logits by: 1 for most, 1 / logit_scale for Cohere."""
        self.base_fingerprint = weights_fingerprint(model, frozen_alone=True)
        """A hash of the weights that are not trained, as loaded: mixed precision may round them later."""
        self._adapted: list[Any] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PreTrainedModel,
        *,
        lora: Lora | None = None,
        load_in_4bit: bool = False,
        attn_implementation: AttentionImplementation | None = None,
        layout: Layout = "padded",
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> CausalLM:
        """Load a causal language model by hub name, directory or `builtin:tiny`; float32, in train mode, dropout off.

        A model object (see `models.objects.prepared`) is taken itself, not copied.

        float32 because these are the master weights: mixed precision is the Trainer's business. Raises `ModelError` for
        what is no causal language model, for one whose log-probs cannot be had from its hidden states, for LoRA targets
        that match nothing, and when peft or bitsandbytes is asked for and missing.
        """
        from transformers import AutoModelForCausalLM

        if load_in_4bit and lora is None:
            raise ModelError("model.load_in_4bit: 4-bit weights cannot be trained; give model.lora as well")
        if load_in_4bit and lora is not None and lora.changes_base:
            raise ModelError(
                f"model.lora.init_lora_weights: {lora.init_lora_weights} takes a part off the weights below, and 4 "
                "bits cannot hold the rest; leave it out, or load_in_4bit"
            )
        check_four_bits(name_or_path, load_in_4bit)
        if isinstance(name_or_path, str):
            config = load_causal_config(name_or_path, trust_remote_code=trust_remote_code)
            model = load_weights(
                AutoModelForCausalLM,
                name_or_path,
                config,
                attn_implementation=probed_attention(attn_implementation, layout),
                trust_remote_code=trust_remote_code,
                **({"quantization_config": four_bits()} if load_in_4bit else {}),
            )
        elif load_in_4bit:
            raise ModelError("model.load_in_4bit: a model object is taken as it is; give its directory or hub name")
        else:
            model, name_or_path = name_or_path, type(name_or_path).__name__
            if model.get_output_embeddings() is None:
                raise ModelError(f"model.backbone: a {name_or_path} has no output layer; use AutoModelForCausalLM")
        check_rows(decoder(model), name_or_path, layout, flex=attn_implementation == FLEX)
        temperature = _measured_temperature(model, name_or_path)
        if lora is not None:
            model = with_adapters(model, lora)
            _check_adapters(model, lora)
        if gradient_checkpointing:
            inner_model(model).activation_checkpointing_enable()
        use_attention(decoder(model), attn_implementation)
        return cls(model.train(), temperature=temperature)

    @property
    def config(self) -> PretrainedConfig:
        return inner_model(self.model).config

    @property
    def has_adapters(self) -> bool:
        return inner_model(self.model) is not self.model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> ResponseLogprobs:
        """Log-probabilities of the response tokens of R rows; arguments as `states`."""
        return self.logprobs(self.states(input_ids, attention_mask, response_mask))

    def states(self, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor) -> ResponseStates:
        """The hidden states that predict the response tokens.

        `input_ids` [R, T] int64; `attention_mask` [R, T] bool, True on tokens; `response_mask` [R, T] bool, True on
        the response and its EOS token. Padding may stand on any side. Raises `ValueError` for other shapes and for a
        row without a response token that follows another token (on an accelerator such a row is empty).
        """
        rows = {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}
        check_layout(**{name: (tensor, "R T") for name, tensor in rows.items()})
        # The first token of a row has no token before it that could predict it.
        mask = F.pad(response_mask[:, 1:] & attention_mask[:, :-1], (1, 0))
        check_not_empty(mask.sum(dim=1))
        places = mask.flatten().nonzero().squeeze(1)  # how many there are is what an accelerator is waited for
        hidden = token_states(decoder(self.model), input_ids, attention_mask, places - 1)
        return ResponseStates(hidden, input_ids.flatten()[places], mask)

    def logprobs(self, states: ResponseStates) -> ResponseLogprobs:
        """Log-probabilities of the tokens that `states` lead to, float32, in nats."""
        return ResponseLogprobs(scatter_to_mask(self.token_logprobs(states), states.mask), states.mask)

    def token_logprobs(self, states: ResponseStates) -> Tensor:
        """The same of the N tokens alone, [N]."""
        weight, bias = output_layer(self.model)
        return linear_logprobs(states.hidden, weight, states.targets, bias=bias, temperature=self.temperature)

    def most_likely(self, states: ResponseStates) -> Tensor:
        """The most likely token at each of the N positions, [N] int64."""
        weight, bias = output_layer(self.model)
        return linear_argmax(states.hidden, weight, bias=bias)

    @contextlib.contextmanager
    def adapters_off(self) -> Iterator[None]:
        """Inside, the model is the one that the adapters were put on. Raises `ModelError` when there are none."""
        if not self.has_adapters:
            raise ModelError("this model has no adapters that could be switched off; give model.lora")
        if self._adapted is None:
            self._adapted = adapted_layers(self.model)
        with switched_off(self._adapted):
            yield

    def save_pretrained(self, directory: str | Path, *, merge: bool = True) -> Path:
        """Write a directory that `AutoModelForCausalLM` loads; tied weights stay tied. Returns the directory.

        Adapters are merged into the weights, for good (into a copy of 4-bit weights, in the dtype of the embeddings);
        with `merge=False` they alone are written, beside the name of the model that they belong to. Written beside the
        directory first, so that it is never half there.
        """
        model = self.model
        if self.has_adapters and not merge:
            check_base_of_others(inner_model(model).name_or_path)
        if self.has_adapters and merge and is_quantized(inner_model(model)):
            model = with_whole_weights(inner_model(model), self.merged_weights())
        elif self.has_adapters and merge:
            for layer in frozen_linear(model):  # see `halve_frozen`: the sum is none of halves
                layer.weight.data = layer.weight.data.to(model.get_input_embeddings().weight.dtype)
            model = self.model = model.merge_and_unload()
        with replaced_model(directory) as made:
            model.save_pretrained(made, max_shard_size="5GB")
            write_published_settings(inner_model(model), made)
            (made / "README.md").unlink(missing_ok=True)  # peft's model card, a form to be filled in
            with edited_settings(made / CONFIG) as settings:  # peft looks for a relative path where it is run
                if Path(base := settings.get(BASE) or "").is_dir() and base:
                    settings[BASE] = str(Path(base).resolve())
        return Path(directory).expanduser()

    def save_copy(self, directory: str | Path, *, dtype: torch.dtype) -> None:
        """Write the policy as it is now in another dtype, adapters merged into the copy alone: this model stays.

        Raises `ModelError` for 4-bit weights.
        """
        model = inner_model(self.model)
        if is_quantized(model):
            raise ModelError("4-bit weights cannot be handed on with adapters merged into them; leave out load_in_4bit")
        with replaced_model(directory) as made:
            merged = {name: weight.to(dtype).cpu() for name, weight in self.merged_weights()}
            model.save_pretrained(made, state_dict=merged, max_shard_size="5GB")
            write_published_settings(model, made)

    def merged_weights(self) -> Iterator[tuple[str, Tensor]]:
        """All weights by the names of the model without adapters, with the adapters' part added, one at a time.

        Each is added to on its device: never is there a second copy of all of them. Those in 4 bits are given as what
        they stand for. They have no gradient.
        """
        model = inner_model(self.model)
        layers = {name: module for name, module in model.named_modules() if hasattr(module, "get_delta_weight")}
        held = dict(model.named_parameters())
        for name, weight in model.state_dict().items():
            owner = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
            if ".original_module." in name or (owner is not None and ".base_layer." not in name):
                continue
            if f"{name.partition('.weight.')[0]}.weight" in held and ".weight." in name:
                continue  # how a weight is quantized
            weight = dequantized(held.get(name, weight)).detach()
            if owner is not None and name.endswith(".weight"):
                weight = weight + layers[owner].get_delta_weight(layers[owner].active_adapters[0]).detach()
            yield name.replace(".modules_to_save.default.", ".").replace(".base_layer.", "."), weight


def load_causal_config(name_or_path: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a causal language model. Raises `ModelError` for anything else that can be told by it."""
    config = load_config(name_or_path, trust_remote_code=trust_remote_code)
    if is_reward_network(config):
        raise ModelError(f"{name_or_path}: a reward network, which gives scores, not tokens; give a language model")
    adapters = adapters_alone(name_or_path)
    if adapters is not None and adapter_task(adapters) != LANGUAGE_MODEL:
        raise ModelError(f"{name_or_path}: adapters of task_type {adapter_task(adapters)}; give a language model's")
    return config


def inner_model(model: PreTrainedModel) -> PreTrainedModel:
    """The transformers model inside of peft's wrapping, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The part of a language model, wrapped by peft or not, that makes hidden states.

    Raises `ModelError` where it is no part of its own.
    """
    model = inner_model(model)
    found = model.base_model
    if found is model:  # Llama 4 names its part by the name that it has beside an image tower
        found = getattr(model, "model", model)
    if found is model:
        raise ModelError(f"a {model.config.model_type} model without a decoder of its own, whose states could be read")
    return found


def output_layer(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Weight [V, H] and bias [V] of the layer that makes logits, as trained by now or, with adapters off, as loaded."""
    layer = inner_model(model).get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # trained whole beside adapters
        off = layer.disable_adapters
        layer = layer.original_module if off else layer.modules_to_save[layer.active_adapters[0]]
    return layer.weight, getattr(layer, "bias", None)


@torch.no_grad()
def _measured_temperature(model: PreTrainedModel, name: str) -> float:
    """What the model divides `hidden @ weight.T + bias` by to get its logits.

    Measured on a few tokens, since every family that scales its logits has another name for the scale. Raises
    `ModelError` when the logits are no multiple of that product, and when a token sees those after it.
    """
    kind, text_config = model.config.model_type, model.config.get_text_config()
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"{name}: a {kind} model without a linear output layer; give a causal language model")
    ids = torch.arange(_PROBE_TOKENS, device=model.device)[None] % text_config.vocab_size
    mask = torch.ones_like(ids, dtype=torch.bool)
    hidden = hidden_states(decoder(model), ids, mask)
    other_end = hidden_states(decoder(model), torch.cat([ids[:, :-1], ids[:, :1]], dim=1), mask)
    if not torch.allclose(hidden[:, :-1], other_end[:, :-1], rtol=_PROBE_TOLERANCE, atol=_PROBE_TOLERANCE):
        raise ModelError(f"{name}: an encoder ({kind}), where a token sees those after it; give a decoder")
    product = F.linear(hidden.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    logits = model(input_ids=ids, attention_mask=mask.long()).logits.double()
    scale = ((logits * product).sum() / product.square().sum()).item()
    softcapping = getattr(text_config, "final_logit_softcapping", None)
    error = (logits - scale * product).abs().max().item() / logits.abs().max().item()
    if softcapping is not None or not error < _PROBE_TOLERANCE:
        cause = "final_logit_softcapping" if softcapping is not None else f"they differ by {error:.1%}"
        raise ModelError(
            f"{name}: the logits of a {kind} model are no multiple of hidden states times output layer ({cause}), "
            "which the chunked log-probs need; use a model without soft-capping of its logits"
        )
    return 1.0 if abs(scale - 1) < _PROBE_TOLERANCE else 1 / scale


def with_adapters(model: PreTrainedModel, lora: Lora) -> PreTrainedModel:
    """The model wrapped by peft, of which the adapters alone can be trained. Raises `ModelError`."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ModelError("model.lora: the package peft is not installed; pip install 'rlhf-lightning[lora]'") from error
    layers = sorted({name.split(".")[-1] for name, layer in model.named_modules() if isinstance(layer, nn.Linear)})
    names = [f".{name}" for name, _ in model.named_modules()]
    targets = [] if isinstance(lora.target_modules, str) else lora.target_modules  # one text is a regular expression
    for key, given in (("target_modules", targets), ("modules_to_save", lora.modules_to_save or [])):
        for layer in given:
            if not any(name.endswith(f".{layer}") for name in names):
                raise ModelError(f"model.lora.{key}: {layer} matches no layer of this model; use some of {layers}")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # refused below, in our words
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft 0.21 asks by the old name
        try:
            wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asdict(lora)))
        except ValueError as error:
            raise ModelError(
                f"model.lora.target_modules: {lora.target_modules} matches no layer that can have adapters "
                f"({reason_of(error)}); use all-linear, or some of {layers}"
            ) from error
    _check_ends(inner_model(wrapped), lora)
    return wrapped


def _check_ends(model: PreTrainedModel, lora: Lora) -> None:
    """Refuse adapters on the output layer, and changes to embeddings that are tied to it. Raises `ModelError`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    ends = {"output layer": model.get_output_embeddings(), "embeddings": model.get_input_embeddings()}
    for what, layer in ends.items():
        if isinstance(layer, BaseTunerLayer) and (tied or what == "output layer"):
            raise ModelError(
                f"model.lora.target_modules: {lora.target_modules} matches the {what}; leave it out of the targets"
            )
        if hasattr(layer, "modules_to_save") and tied:
            raise ModelError(
                f"model.lora.modules_to_save: the {what} share their weights with the other end of this model, and "
                "would no longer once trained; leave them out"
            )


@torch.no_grad()
def _check_adapters(model: PreTrainedModel, lora: Lora) -> None:
    """Refuse adapters on layers that give more than a tensor, as Llama 4's routers. Raises `ModelError`."""
    ids = torch.ones(1, 2, dtype=torch.long, device=inner_model(model).device)
    try:
        hidden_states(decoder(model), ids, ids.bool())
    except Exception as error:  # peft asks for nothing, and fails in the middle of a layer
        raise ModelError(
            f"model.lora.target_modules: adapters on {lora.target_modules} do not run in a "
            f"{inner_model(model).config.model_type} model ({reason_of(error)}); name other layers, such as "
            "[q_proj, v_proj]"
        ) from error
