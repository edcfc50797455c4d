#!/usr/bin/env bash
# sentence-transformers 6.2.0: CrossEncoder renders a pair by the model's chat template with the roles `query` and
# `document`, so a reward model that was trained on `user` and `assistant` scores another text, without a word.
#
# A template that writes the role of each message as it stands (ChatML does) takes any role. The pair (prompt, response)
# becomes <|im_start|>query ... <|im_start|>document ..., a conversation that no reward model has seen, and the scores
# are plausible numbers. Only a template that cannot carry the two roles raises an error.
#
# Seen with sentence-transformers 6.2.0, transformers 5.24.0, torch 2.13.0+cpu (Python 3.11):
#   CrossEncoder reads: <|im_start|>query\nIs 7 prime?<|im_end|>\n<|im_start|>document\nYes.<|im_end|>\n
#   its score is that of query and document: True; that of user and assistant: False
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0
"$work/venv/bin/pip" install --quiet sentence-transformers==6.2.0 transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON' 2>/dev/null
import sys

import torch
from sentence_transformers import CrossEncoder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast
from transformers import Qwen2Config, Qwen2ForSequenceClassification

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|pad|>")
tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
tokenizer.chat_template = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
torch.manual_seed(0)
config = Qwen2Config(
    vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, num_labels=1, pad_token_id=tokenizer.pad_token_id,
)
Qwen2ForSequenceClassification(config).save_pretrained("model")
tokenizer.save_pretrained("model")

prompt, response = "Is 7 prime?", "Yes."
encoder = CrossEncoder("model", device="cpu", activation_fn=torch.nn.Identity())
score = encoder.predict([(prompt, response)]).item()
model, tokenizer = AutoModelForSequenceClassification.from_pretrained("model").eval(), AutoTokenizer.from_pretrained("model")


def score_as(first, second):
    chat = [{"role": first, "content": prompt}, {"role": second, "content": response}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    with torch.no_grad():
        return text, model(**tokenizer(text, return_tensors="pt")).logits.item()


(read, theirs), (_, ours) = score_as("query", "document"), score_as("user", "assistant")
same = abs(score - theirs) < 1e-5, abs(score - ours) < 1e-5
print("CrossEncoder reads:", read.replace("\n", "\\n"))
print(f"its score is that of query and document: {same[0]}; that of user and assistant: {same[1]}")
sys.exit(same != (True, False))
PYTHON
