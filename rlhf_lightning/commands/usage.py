"""How an exported model is loaded and asked, for its model card."""

from __future__ import annotations

from string import Template
from typing import Any

from rlhf_lightning.models.configuration import HEAD_KEY

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

| with | head `$head`: $about |
|---|---|
| transformers | as above |
| its pipeline | `pipeline("text-classification", "$name"$trust)(text, add_special_tokens=False)` |
| sentence-transformers | `CrossEncoder("$name"$trust)`, of pairs of prompt and response |
| TRL | `GRPOTrainer(..., reward_funcs="$name", args=GRPOConfig(...$trust))`, of prompts that are conversations; \
`RewardTrainer("$name", args=RewardConfig(...$trust), ...)` trains on |
| vLLM | $vllm |
| rlhf_lightning | `RewardNetwork.from_pretrained("$name")`, `evaluate --reward_model $name` |""")

_OURS = Template("""```python
from rlhf_lightning import RewardNetwork

model = RewardNetwork.from_pretrained("$name", trust_remote_code=True)
```
The backbone has code of its own, and transformers has no class of it with this head, and stops with an error.""")

_ABOUT = {
    "linear": "a class of transformers itself",
    "mlp": "`modeling_reward.py`, which lies here, is run; without `trust_remote_code` loading stops with an error",
}


def policy_usage(name: str) -> str:
    """Of a language model in a directory of this name."""
    return _POLICY.substitute(name=name)


def reward_usage(name: str, config: dict[str, Any]) -> str:
    """Of a reward model in a directory of this name, whose config.json is given."""
    head, architecture = config[HEAD_KEY].get("head", "mlp"), config["architectures"][0]
    trusted = head == "mlp"
    if trusted and "AutoModelForSequenceClassification" not in config["auto_map"]:
        return _OURS.substitute(name=name)
    vllm = f'`LLM("{name}", runner="pooling")`, as `{architecture}`'
    if trusted:
        vllm = f"{vllm}, which it knows for Qwen2 alone" if architecture.endswith("ForRewardModel") else "no"
    return _REWARD.substitute(
        name=name,
        head=head,
        about=_ABOUT[head],
        trust=", trust_remote_code=True" if trusted else "",
        vllm=vllm,
    )
