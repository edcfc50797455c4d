"""LoRA adapters of a directory, made by peft, TRL or this package: merged into the model that they belong to."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
_WHOLE = ("original_module.weight", "token_adapter.base_layer.weight", "base_layer.weight", "weight")
"""What peft calls embeddings in a file of adapters, before what was trained on top of them."""
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


def describe_vocabulary(config: PretrainedConfig, directory: Path) -> None:
    """Let the configuration of a base model say how many tokens its adapters were trained with, where some were added.

    Their file then holds the embeddings whole. Raises `ModelError` as `stored_tensors`.
    """
    if not names_of_whole_layers(directory):
        return
    try:
        with torch.device("meta"):
            model = auto_class_of(directory).from_config(config)
    except ValueError:  # code of its own, which is not run for that; loading will say whether the sizes are its base's
        return
    embeddings = model.get_input_embeddings()
    (place,) = (f"{_ROOT}{name}." for name, layer in model.named_modules() if layer is embeddings)
    for name, tensor in stored_tensors(directory).items():
        if name.removeprefix(place) in _WHOLE:
            config.get_text_config().vocab_size = len(tensor)


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


def merged(model: PreTrainedModel, directory: Path, name: str, *, vocabulary: int) -> PreTrainedModel:
    """The model, float32, with the adapters of a directory merged into its weights; all of them can be trained.

    `vocabulary` is the number of tokens that the adapters were trained with (`describe_vocabulary`). Raises
    `ModelError` when weights of the adapters are missing or left over, when the merged model would compute something
    else than the model with adapters beside it, and as `_check_start`.
    """
    _require_peft(directory)
    _check_start(adapter_settings(directory), name)
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing")  # peft 0.21 asks by the old name
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # refused below
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")  # untied below
            _resize_where_needed(model, vocabulary, directory)
            _untie_where_needed(model, adapter_settings(directory), directory)
            wrapped = PeftModel.from_pretrained(model, str(directory))
            loaded = wrapped.load_adapter(str(directory), wrapped.active_adapter)  # again, since this one tells
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        base = model.name_or_path
        raise ModelError(f"{name}: its adapters could not be put on {base} ({reason_of(error)})") from error
    for what, keys in (
        ("of its adapters are not in its file", loaded.missing_keys),
        ("in its file have no place in the model", _without_copies(loaded.unexpected_keys, directory)),
    ):
        if keys:
            raise ModelError(f"{name}: {len(keys)} weights {what}, the first {sorted(keys)[0]}; give whole adapters")
    beside = _outputs(wrapped)
    model = wrapped.merge_and_unload()
    vars(model).pop("peft_config", None)  # else it would count as wrapped
    model.name_or_path = name
    _check_merged(beside, _outputs(model), name)
    return model.requires_grad_(True).train()  # peft has frozen them


def _without_copies(left_over: list[str], directory: Path) -> list[str]:
    """Of the weights that a model has no place for, those that no other weight of the file is equal to.

    Where peft stores embeddings whole, it stores some of them under two names.
    """
    stored = stored_tensors(directory)
    used = [tensor for name, tensor in stored.items() if name not in left_over]
    return [name for name in left_over if not any(torch.equal(stored[name], tensor) for tensor in used)]


def adapted_layers(model: nn.Module) -> list[Any]:
    """The layers of a model that peft has put adapters or a trained copy on."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper)]


@contextmanager
def switched_off(layers: Sequence[Any]) -> Iterator[None]:
    """Inside, the adapters of some layers do nothing; no flag of a gradient changes.

    peft's `disable_adapter` walks all modules and their parameters: 80 ms of a CPU at 224 layers, for 2 here.
    """
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, before, strict=True):
            layer._disable_adapters = off


def _check_start(settings: dict[str, Any], name: str) -> None:
    """Raise `ModelError` for adapters that belong to weights which their start made of the base's, and no other can.

    peft 0.21 changes the base's weights where it loads such adapters, too. `pissa` and `olora` do so in one way only;
    `pissa_niter_N` by chance, the others by data or a 4-bit base that are not in the directory.
    """
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and (start.startswith(("pissa_niter", "corda")) or start in ("loftq", "lora_ga")):
        raise ModelError(
            f"{name}: its adapters began by {start}, which changed the weights below them, and those are not here; "
            "merge them where they were trained (peft's merge_and_unload), and give the directory of the result"
        )


def _require_peft(directory: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("peft") is None:
        raise ModelError(f"{directory}: LoRA adapters need the package peft; pip install 'rlhf-lightning[lora]'")


def _resize_where_needed(model: PreTrainedModel, vocabulary: int, directory: Path) -> None:
    """Give the model the tokens that adapters were trained with, and their embeddings from the adapters' file.

    Raises `ModelError` where rows of the output layer would stay random.
    """
    known, stored = model.config.get_text_config().vocab_size, stored_tensors(directory)
    if vocabulary == known:
        return
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    ends = {model.get_input_embeddings(), model.get_output_embeddings()}
    for end, layer in ((name, layer) for name, layer in model.named_modules() if layer in ends):
        found = [f"{_ROOT}{end}.{name}" for name in _WHOLE if f"{_ROOT}{end}.{name}" in stored]
        if found:
            layer.weight.data.copy_(stored[found[0]])
        elif vocabulary > known and not model.config.get_text_config().tie_word_embeddings:
            raise ModelError(
                f"{vocabulary - known} tokens were added to it, and their rows of {end} are not in the adapters' file; "
                "save them by peft's save_pretrained(..., save_embedding_layers=True)"
            )


def _untie_where_needed(model: PreTrainedModel, settings: dict[str, Any], directory: Path) -> None:
    """Give the output layer weights of its own where adapters change one end of tied embeddings.

    Merged into tied weights, the part of the output layer would change the embeddings as well.
    """
    config, ends = model.config.get_text_config(), (model.get_input_embeddings(), model.get_output_embeddings())
    kept_tied = settings.get("ensure_weight_tying") or settings.get("trainable_token_indices")  # by peft itself
    if not getattr(config, "tie_word_embeddings", False) or None in ends or kept_tied:
        return
    places = tuple(f"{_ROOT}{name}." for name, layer in model.named_modules() if layer in ends)
    changed = {name: tensor for name, tensor in stored_tensors(directory).items() if name.startswith(places)}
    both_whole = changed.keys() == {f"{place}weight" for place in places} and torch.equal(*changed.values())
    if not changed or both_whole:
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
            "unmerged adapters; merge them with peft's merge_and_unload, and give the result's directory"
        )
