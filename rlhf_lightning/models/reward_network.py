"""A reward model's network: a transformer backbone and a small head that reads one number off its hidden states.

R rows, T tokens, H hidden size.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_lightning.batches import Layout
from rlhf_lightning.errors import ConfigurationError, ModelError
from rlhf_lightning.functional.reductions import masked_mean
from rlhf_lightning.models.backbones import AttentionImplementation, load_backbone, use_attention
from rlhf_lightning.models.configuration import HEAD_KEY, load_config, rope_limits, write_published_settings
from rlhf_lightning.models.head_ensemble import HeadEnsemble, each_score, head_settings, load_heads, save_heads
from rlhf_lightning.models.linear_head import LinearHead, check_classifier, classifier_without_weights
from rlhf_lightning.models.states import first_position, hidden_states, last_states, layer_states
from rlhf_lightning.models.storage import edited_settings, replaced_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

Activation = Literal["relu", "tanh", "silu", "gelu"]
_ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "tanh": nn.Tanh, "silu": nn.SiLU, "gelu": nn.GELU}
Pooling = Literal["last", "mean", "layers"]
"""What the head reads: the hidden state of the last true token, the mean over all true tokens, or the means of all
layers side by side."""
HeadKind = Literal["mlp", "linear"]
"""Two layers (`RewardHead`), or one (`LinearHead`), which transformers and all that stand on it load by themselves."""
_OWN_CLASS = "RewardModelForSequenceClassification"
_OWN_CLASS_MAP = {"AutoModelForSequenceClassification": f"modeling_reward.{_OWN_CLASS}"}


def is_reward_network(config: PretrainedConfig | None) -> bool:
    """Whether a model's configuration is that of a saved `RewardNetwork`."""
    return getattr(config, HEAD_KEY, None) is not None


def pooling_of(config: PretrainedConfig) -> Pooling | None:
    """How a saved `RewardNetwork` pools; None for the configuration of any other model."""
    saved = saved_head(config)
    return None if saved is None else saved["pooling"]


def head_input_size(config: PretrainedConfig, pooling: Pooling) -> int:
    """How many numbers the head reads of a row: H, or those of the embeddings and of every layer."""
    config = config.get_text_config()
    return config.hidden_size * (config.num_hidden_layers + 1 if pooling == "layers" else 1)


def pooled(backbone: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """What the head reads, [R, H], or with `layers` [R, (layers + 1) H] in float32.

    `input_ids` [R, T] int64; `attention_mask` [R, T] bool, True on tokens. Raises `ValueError` when a row is empty.
    """
    mask = attention_mask.bool()
    if pooling == "layers":
        return torch.cat([_mean(state, mask) for state in layer_states(backbone, input_ids, mask)], dim=-1)
    if pooling == "mean":
        return _mean(hidden_states(backbone, input_ids, mask), mask)
    return last_states(backbone, input_ids, mask)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    return masked_mean(hidden, mask[..., None].expand_as(hidden), dim=1)


class RewardHead(nn.Sequential):
    """Two-layer MLP, `Linear(H, hidden_size), activation, dropout, Linear(hidden_size, 1)`, computed in float32.

    The last layer begins with standard deviation 1/sqrt(hidden_size + 1) and bias 0 (Stiennon et al. 2020, arXiv
    2009.01325, and its code). Under fp16 or bf16 weights and under autocast the arithmetic stays float32.
    """

    def __init__(
        self, input_size: int, *, hidden_size: int | None = None, activation: Activation = "relu", dropout: float = 0.0
    ) -> None:
        hidden_size = hidden_size or input_size
        first, last = nn.Linear(input_size, hidden_size), nn.Linear(hidden_size, 1)
        super().__init__(first, _ACTIVATIONS[activation](), *([nn.Dropout(dropout)] if dropout > 0 else []), last)
        self.settings = {"hidden_size": hidden_size, "activation": activation, "dropout": dropout}
        nn.init.zeros_(first.bias)
        nn.init.normal_(last.weight, std=(hidden_size + 1) ** -0.5)
        nn.init.zeros_(last.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Scores [R] float32 of hidden states [R, H]."""
        with torch.autocast(hidden.device.type, enabled=False):
            x = hidden.float()
            for layer in self:
                x = F.linear(x, layer.weight.float(), layer.bias.float()) if isinstance(layer, nn.Linear) else layer(x)
        return x.squeeze(-1)


Head = RewardHead | LinearHead | HeadEnsemble
"""What gives the score: one head, or the mean of several."""


class HeadSettings(TypedDict, total=False):
    """Keys of a head: the `mlp` has all of them, a `linear` one none but its own name and `num_heads`."""

    head: HeadKind
    hidden_size: int | None
    """The backbone's when not given."""
    activation: Activation
    dropout: float
    pooling: Pooling
    num_heads: int
    """Above 1, a `HeadEnsemble`."""


_USUAL: HeadSettings = {
    "head": "mlp",
    "hidden_size": None,
    "activation": "relu",
    "dropout": 0.0,
    "pooling": "last",
    "num_heads": 1,
}


def saved_head(config: PretrainedConfig) -> HeadSettings | None:
    """The head of a saved `RewardNetwork`; None for the configuration of any other model."""
    return {**_USUAL, **head_settings(getattr(config, HEAD_KEY))} if is_reward_network(config) else None


def check_head(settings: HeadSettings) -> None:
    """Raise `ConfigurationError` where a `linear` head is to have what it has not."""
    if settings.get("head") == "linear":
        for key, value in settings.items():
            if key not in ("head", "num_heads") and value != _USUAL.get(key):
                raise ConfigurationError(
                    f"model.{key}: {value} goes with model.head: mlp; a linear head is one layer on the last token's "
                    f"state. Leave model.{key} out"
                )


def new_head(config: PretrainedConfig, **settings: Unpack[HeadSettings]) -> Head:
    """A head, or `num_heads` of them, for a backbone of this configuration.

    Raises `ConfigurationError` as `check_head` does.
    """
    check_head(settings)
    given: HeadSettings = {**_USUAL, **settings}
    heads = [_one_head(config, given) for _ in range(given["num_heads"])]
    return HeadEnsemble(heads) if len(heads) > 1 else heads[0]


def _one_head(config: PretrainedConfig, given: HeadSettings) -> RewardHead | LinearHead:
    width = head_input_size(config, "last")
    if given["head"] == "linear":
        return LinearHead(width)
    return RewardHead(
        head_input_size(config, given["pooling"]),
        hidden_size=given["hidden_size"] or width,
        activation=given["activation"],
        dropout=given["dropout"],
    )


class RewardNetwork(nn.Module):
    """Scores whole rows: `backbone -> one hidden state of the row -> score`.

    Any `AutoModel` decoder or encoder. The hidden state is that of the last true token, or with `pooling="mean"` the
    float32 mean over the true tokens, which is how sentence encoders are pretrained. `pooling="layers"` puts the means
    of the embeddings and of all layers side by side, each token's states normalised: surface and syntax
    show in lower layers than meaning (Tenney et al. 2019, arXiv 1905.05950). Tokens are found by the mask, so
    left, right or any padding, and a pad id equal to the EOS id, give the same score.
    """

    def __init__(self, backbone: PreTrainedModel, **head: Unpack[HeadSettings]) -> None:
        super().__init__()
        self.backbone = backbone
        self.pooling: Pooling = head.get("pooling", "last")
        self.score = new_head(backbone.config, **head)
        one = self.score.one if isinstance(self.score, HeadEnsemble) else self.score
        if isinstance(one, LinearHead):
            check_classifier(backbone, one)

    @classmethod
    def from_backbone(
        cls,
        name_or_path: str | PreTrainedModel,
        *,
        attn_implementation: AttentionImplementation | None = None,
        layout: Layout = "padded",
        trust_remote_code: bool = False,
        **head: Unpack[HeadSettings],
    ) -> RewardNetwork:
        """A pretrained backbone (hub name, directory or prepared object) with a fresh head, of the keys of `new_head`.

        Raises `ModelError`, and `ConfigurationError` as `check_head` does.
        """
        backbone = load_backbone(
            name_or_path,
            attn_implementation=attn_implementation,
            layout=layout,
            trust_remote_code=trust_remote_code,
        )
        network = cls(backbone, **head)
        use_attention(backbone, attn_implementation)
        return network

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        *,
        attn_implementation: AttentionImplementation | None = None,
        layout: Layout = "padded",
        trust_remote_code: bool = False,
    ) -> RewardNetwork:
        """Load what `save_pretrained` wrote, float32, in eval mode.

        Raises `ModelError` when the directory is no model, or a model without a reward head.
        """
        directory = Path(directory).expanduser()
        config = load_config(str(directory), trust_remote_code=trust_remote_code)
        if (head := saved_head(config)) is None:
            raise ModelError(
                f"{directory}: a {config.model_type} model without a reward head (no {HEAD_KEY} in config.json); "
                "train one with `rlhf-lightning fit`, or use it as a backbone"
            )
        network = cls.from_backbone(
            str(directory),
            **head,
            attn_implementation=attn_implementation,
            layout=layout,
            trust_remote_code=trust_remote_code,
        )
        try:
            tensors = _head_tensors(directory)
            if isinstance(network.score, HeadEnsemble):
                load_heads(network.score, directory, tensors)
            else:
                network.score.load_state_dict(tensors)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{directory}: its score.* weights do not make up the head ({reason})") from error
        return network.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [R], float32.

        `input_ids` [R, T] int64; `attention_mask` [R, T] bool, True on tokens. Raises `ValueError` when a row of the
        mask is empty.
        """
        return self.each(input_ids, attention_mask).mean(dim=-1)

    def each(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Scores [R, K] of all heads, float32; `forward` gives their mean, and says what is taken."""
        return self.each_of(pooled(self.backbone, input_ids, attention_mask, self.pooling))

    def each_of(self, states: Tensor) -> Tensor:
        """Scores [R, K] float32 of what the heads read of rows (see `pooled`)."""
        return each_score(self.score, states)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write `config.json` and safetensors; the weights are named as a sequence classifier's.

        The backbone's tensors stand under its own prefix (`model.` for Qwen2), the head's under `score.0` and `score.2`
        (`score.3` with dropout), or `score.weight`. Transformers loads a linear head by itself, and an MLP with
        `trust_remote_code=True`, by a module that is written beside it, unless the backbone has code of its own;
        else it stops with an error. Of several heads this is one that gives their mean, and they stand in a file of
        their own. Written beside the directory first, so that it is never half there; what the
        directory held under other names stays. Returns the directory.
        """
        prefix = self.backbone.base_model_prefix or "model"
        tensors = {f"{prefix}.{key}": value for key, value in self.backbone.state_dict().items()}
        tensors |= {f"score.{key}": value for key, value in self._written_head.state_dict().items()}
        with replaced_model(directory) as made:
            self.backbone.save_pretrained(made, state_dict=tensors, max_shard_size="5GB")
            write_published_settings(self.backbone, made)
            with edited_settings(made / "config.json") as config:
                _forget_other_head(config)
                config |= self._settings_to_save()
                if isinstance(self._written_head, LinearHead):
                    _forget_padding_that_ends_rows(config)
                elif "AutoModel" not in config.get("auto_map", {}):
                    config["auto_map"] = config.get("auto_map", {}) | _OWN_CLASS_MAP
                    shutil.copy(Path(__file__).with_name("modeling_reward.py"), made)
            if isinstance(self.score, HeadEnsemble):
                save_heads(self.score, made)
        return Path(directory).expanduser()

    @property
    def _written_head(self) -> RewardHead | LinearHead:
        """The one whose weights stand beside the backbone's."""
        return self.score.mean() if isinstance(self.score, HeadEnsemble) else self.score

    def _settings_to_save(self) -> dict[str, Any]:
        """What config.json says besides what it says of the backbone."""
        settings: dict[str, Any] = {"num_labels": 1, HEAD_KEY: self.score.settings | {"pooling": self.pooling}}
        # Who loads it shall give the score as it is: pipelines, CrossEncoder and vLLM take a sigmoid of it else.
        settings |= {"problem_type": "regression"}
        settings |= {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}
        architecture = type(self.backbone).__name__.removesuffix("Model")
        if isinstance(self._written_head, LinearHead):
            name = type(classifier_without_weights(self.backbone.config)).__name__
            return settings | {"architectures": [name]}
        from rlhf_lightning.models.modeling_reward import STOP

        limits = [limit for _, limit in rope_limits(self.backbone.config)]
        rows = {"first_position": first_position(self.backbone), "longest": min(limits, default=None)}
        settings |= {"reward_rows": rows, "transformers_weights": STOP}
        return settings | {"architectures": [f"{architecture}ForRewardModel" if self._is_vllms else _OWN_CLASS]}

    @property
    def _is_vllms(self) -> bool:
        """Whether vLLM's `*ForRewardModel` computes this head; it looks at the name, and not at the other settings."""
        width = head_input_size(self.backbone.config, "last")
        own = {"hidden_size": width, "activation": "relu", "dropout": 0.0}
        return self.pooling == "last" and self._written_head.settings == own


def _forget_other_head(config: dict[str, Any]) -> None:
    """Remove what the configuration of the backbone says of a head that it was saved with before."""
    for key in ("reward_rows", "transformers_weights"):
        config.pop(key, None)
    for name in _OWN_CLASS_MAP:
        config.get("auto_map", {}).pop(name, None)


def _forget_padding_that_ends_rows(config: dict[str, Any]) -> None:
    """Without a padding id, transformers refuses batches; with one that ends rows, it would read the token before."""
    ends = config.get("eos_token_id")
    if config.get("pad_token_id") in (ends if isinstance(ends, list) else [ends]):
        config["pad_token_id"] = None


def _head_tensors(directory: Path) -> dict[str, Tensor]:
    from safetensors import safe_open

    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            names = [name for name in stored.keys() if name.startswith("score.")]  # noqa: SIM118 (not a dict)
            tensors |= {name.removeprefix("score."): stored.get_tensor(name) for name in names}
    return tensors
