"""LoRA adapters of a directory, made by peft, TRL or this package: merged into the model that they belong to."""

from __future__ import annotations

import pickle
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lightning.errors import ModelError, reason_of
from rlhf_lightning.files.adapters import CLASSIFIER, LANGUAGE_MODEL, adapter_settings, adapter_task
from rlhf_lightning.models.probe import probe_rows

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_LARGEST_DIFFERENCE = 1e-3
"""Between the outputs with adapters beside the weights and merged into them, by the largest output."""
_ROOT = "base_model.model."
"""Begins the name of every tensor in a file of adapters."""


def auto_class_of(directory: Path) -> Any:
    """The class of transformers that adapters were made on. Raises `ModelError` for a task that has none here."""
    import transformers

    known = {LANGUAGE_MODEL: "AutoModelForCausalLM", CLASSIFIER: "AutoModelForSequenceClassification"}
    known |= {"FEATURE_EXTRACTION": "AutoModel"}
    task = adapter_task(directory)
    if task not in known:
        raise ModelError(f"{directory}: adapters of task_type {task}; one of {', '.join(known)} can be loaded")
    return getattr(transformers, known[task])


def describe_classifier(config: PretrainedConfig, directory: Path) -> None:
    """Let the configuration of a base model say that its adapters make it a classifier, where they do, and its labels.

    Their file holds the whole head, and no configuration says its size. Raises `ModelError`.
    """
    from transformers import AutoModelForSequenceClassification

    if adapter_task(directory) != CLASSIFIER:
        return
    heads = tuple(f"{_ROOT}{name}." for name in adapter_settings(directory).get("modules_to_save") or ())
    rows = [len(tensor) for name, tensor in stored_tensors(directory).items() if name.startswith(heads) and heads]
    if rows:  # else its base has a head of its own, or loading it will say that there is none
        config.num_labels = min(rows)
    known = AutoModelForSequenceClassification._model_mapping
    if type(config) not in known:
        raise ModelError(f"{directory}: adapters of a classifier, and a {config.model_type} model can be none")
    config.architectures = [known[type(config)].__name__]


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """The tensors of adapters, by the names in their file. Raises `ModelError` where there are none, or not peft."""
    _require_peft(directory)
    from peft import load_peft_weights

    try:
        return load_peft_weights(str(directory), device="cpu")
    except (OSError, ValueError, RuntimeError, KeyError, pickle.UnpicklingError) as error:
        raise ModelError(f"{directory}: its adapters could not be read ({reason_of(error)})") from error


def names_of_whole_layers(directory: Path) -> set[str]:
    """The weights that adapters bring whole, such as a classifier's head, by their names in the model."""
    return {name.removeprefix(_ROOT) for name in stored_tensors(directory) if ".lora_" not in name}


def merged(model: PreTrainedModel, directory: Path, name: str) -> PreTrainedModel:
    """The model, float32, with the adapters of a directory merged into its weights; all of them can be trained.

    Raises `ModelError` when weights of the adapters are missing or left over, and when the merged model would compute
    something else than the model with adapters beside it.
    """
    _require_peft(directory)
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft 0.21 asks by the old name
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # untied below
            _untie_where_needed(model, adapter_settings(directory), directory)
            wrapped = PeftModel.from_pretrained(model, str(directory))
            loaded = wrapped.load_adapter(str(directory), wrapped.active_adapter)  # again, since this one tells
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        base = model.name_or_path
        raise ModelError(f"{name}: its adapters could not be put on {base} ({reason_of(error)})") from error
    for what, keys in (
        ("of its adapters are not in its file", loaded.missing_keys),
        ("in its file have no place in the model", loaded.unexpected_keys),
    ):
        if keys:
            raise ModelError(f"{name}: {len(keys)} weights {what}, the first {sorted(keys)[0]}; give whole adapters")
    beside = _outputs(wrapped)
    model = wrapped.merge_and_unload()
    vars(model).pop("peft_config", None)  # else it would count as wrapped
    model.name_or_path = name
    _check_merged(beside, _outputs(model), name)
    return model.requires_grad_(True).train()  # peft has frozen them


def _require_peft(directory: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{directory}: LoRA adapters need the package peft; pip install 'rlhf-lightning[lora]'")


def _untie_where_needed(model: PreTrainedModel, settings: dict[str, Any], directory: Path) -> None:
    """Give the output layer weights of its own where adapters change one end of tied embeddings.

    Merged into tied weights, the part of the output layer would change the embeddings as well.
    """
    config, ends = model.config.get_text_config(), (model.get_input_embeddings(), model.get_output_embeddings())
    if not getattr(config, "tie_word_embeddings", False) or None in ends or settings.get("ensure_weight_tying"):
        return
    names = {each for each, layer in model.named_modules() if layer in ends}
    changed = {name.removeprefix(_ROOT) for name in stored_tensors(directory)}
    if not any(name.startswith(f"{end}.") for name in changed for end in names):
        return
    output = ends[1]
    output.weight = nn.Parameter(output.weight.detach().clone())
    config.tie_word_embeddings = model.config.tie_word_embeddings = False


@torch.no_grad()
def _outputs(model: Any) -> Tensor:
    """Logits, or hidden states, of a few fixed tokens."""
    model.eval()
    ids, mask = probe_rows(model.config.get_text_config().vocab_size)
    return model(input_ids=ids[:1], attention_mask=mask[:1].long())[0]


def _check_merged(beside: Tensor, inside: Tensor, name: str) -> None:
    difference = ((beside - inside).abs().max() / beside.abs().max()).item()
    if not difference < _LARGEST_DIFFERENCE:
        raise ModelError(
            f"{name}: with its adapters merged the outputs differ by {difference:.2g} of their size from those with "
            "the adapters beside the weights; merge them with peft's merge_and_unload, and give the result's directory"
        )
