"""The model card of an exported directory: what it is, how it is loaded and asked, what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from string import Template
from typing import Any

from rlhf_lightning import __version__
from rlhf_lightning.files.adapters import hub_name
from rlhf_lightning.models.configuration import HEAD_KEY
from rlhf_lightning.models.head_ensemble import FILE
from rlhf_lightning.training.checkpoints import ORIGIN, metrics_of
from rlhf_lightning.training.results import TABLE_ROWS

_POLICY = Template("""```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("$name")
```
Ask it with the chat template of the tokenizer beside it, as in training. Adapters alone need peft.""")

_REWARD = Template("""```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$name")
model = AutoModelForSequenceClassification.from_pretrained("$name"$trust)
conversation = [
    {"role": "user", "content": "How long do I boil an egg?"},
    {"role": "assistant", "content": "Seven minutes, then put it into cold water."},
]
text = tokenizer.apply_chat_template(conversation, tokenize=False)
batch = tokenizer([text], padding=True, add_special_tokens=False, return_tensors="pt")
score = model(**batch).logits[0, 0].item()
```
The score is a number without bounds; higher is better. A sigmoid belongs on the difference of the scores of two \
responses to one prompt, not on a score. The text has to end with the token that the chat template ends it with.

$heads| with | head `$head`: $about |
|---|---|
| transformers | as above |
| its pipeline | `pipeline("text-classification", "$name"$trust)(text, add_special_tokens=False)` |
| sentence-transformers | `CrossEncoder("$name"$trust)`, of pairs of prompt and response |
| TRL | `GRPOTrainer(..., reward_funcs="$name", args=GRPOConfig(...$trust))`, of prompts that are conversations; \
`RewardTrainer("$name", args=RewardConfig(...$trust), ...)` trains on |
| vLLM | $vllm |
| rlhf_lightning | `RewardNetwork.from_pretrained("$name")`, `evaluate --reward_model $name` |""")

_SERVED = "`vllm serve $name --runner pooling --dtype float32` (half precision where no dtype is given), then POST to "
_IN_VLLM = {
    "linear": _SERVED + '`/classify` `{"messages": [...]}`, as above: `data[0].probs[0]` is the score',
    "Qwen2ForRewardModel": _SERVED + '`/pooling` `{"messages": [...], "task": "token_classify"}`, as above: '
    "`data[0].data[-1][0]`, that of the last token, is the score",
}
"""How vLLM 0.32 is asked, by the head or, of an MLP, by the architecture: the one MLP that it knows."""

_OURS = Template("""```python
from rlhf_lightning import RewardNetwork

model = RewardNetwork.from_pretrained("$name", trust_remote_code=True)
```
The backbone has code of its own, and transformers has no class of it with this head, and stops with an error.""")

_HEADS = Template("""\
The score is the mean of $count heads. transformers, and all that stand on it, load one head that gives this mean. The \
heads themselves lie in `$file` and are read by rlhf_lightning; their standard deviation says how sure the score is.

""")

_ABOUT = {
    "linear": "a class of transformers itself",
    "mlp": "`modeling_reward.py`, which lies here, is run; without `trust_remote_code` loading stops with an error",
}


def write_card(directory: Path, name: str, stored: dict[str, Any], *, merged: bool, proof: str = "") -> None:
    """Write README.md of an exported directory.

    `name` is what users will call the directory, `stored` the checkpoint that it was made from, `proof` a sentence on
    how the export was checked.
    """
    settings = {k: v for k, v in stored["hyper_parameters"].items() if v is not None and not k.startswith("_")}
    measured, origin, file = metrics_of(stored), stored[ORIGIN], directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    usage = reward_usage(name, config) if HEAD_KEY in config else policy_usage(name)
    what = f"adapters of {settings['backbone']}" if (directory / "adapter_config.json").is_file() else "whole weights"
    if settings.get("lora") and merged:
        what += ", LoRA adapters merged"
    words = {metric: f" ({TABLE_ROWS[metric]})" if metric in TABLE_ROWS else "" for metric in measured}
    numbers = "\n".join(f"| `{metric}`{words[metric]} | {value:.6g} |" for metric, value in sorted(measured.items()))
    training = {k: v for k, v in origin.get("training", {}).items() if v is not None}
    base = hub_name(settings["backbone"])
    proved = f"\n{proof}\n" if proof else ""
    base_line = f"base_model: {base}\n" if base else ""  # a path would mean nothing elsewhere
    text = f"""---
{base_line}library_name: transformers
---

# {name}

{origin["class"]} of rlhf_lightning {__version__}, from {settings["backbone"]}, optimizer step \
{stored["global_step"]}; {what}, safetensors, float32.

{usage}

Settings of the model: `{json.dumps(settings, default=str, sort_keys=True)}`

Training: `{json.dumps(training, default=str, sort_keys=True)}`
{proved}
| measured at this checkpoint | |
|---|---|
{numbers or "| nothing | |"}
"""
    (directory / "README.md").write_text(text, encoding="utf-8")


def policy_usage(name: str) -> str:
    """Of a language model in a directory of this name."""
    return _POLICY.substitute(name=name)


def reward_usage(name: str, config: dict[str, Any]) -> str:
    """Of a reward model in a directory of this name, whose config.json is given."""
    head, architecture = config[HEAD_KEY].get("head", "mlp"), config["architectures"][0]
    trusted = head == "mlp"
    if trusted and "AutoModelForSequenceClassification" not in config["auto_map"]:
        return _OURS.substitute(name=name)
    count = config[HEAD_KEY].get("num_heads", 1)
    vllm = Template(_IN_VLLM.get(architecture if trusted else head, "no; it stops with an error"))
    return _REWARD.substitute(
        name=name,
        head=head,
        heads=_HEADS.substitute(count=count, file=FILE) if count > 1 else "",
        about=_ABOUT[head],
        trust=", trust_remote_code=True" if trusted else "",
        vllm=vllm.substitute(name=name),
    )
