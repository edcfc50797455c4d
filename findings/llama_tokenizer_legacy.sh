#!/usr/bin/env bash
# transformers 5.24.0: LlamaTokenizer.save_pretrained loses `legacy: true`, so that a tokenizer that was saved and loaded
# again gives other ids for the text behind every special token.
#
# `legacy: true` in a tokenizer_config.json (as in many directories of the first Llama models) means a blank before each
# stretch of text: behind `<|end|>`, "user" is "▁user". It is read, and `tokenizer.json` is written with it
# (`prepend_scheme: always`), but tokenizer_config.json is written without it, and LlamaTokenizer builds its
# pre-tokenizer anew from the latter when it is loaded.
#
# Seen with transformers 5.24.0, tokenizers 0.23.3 (Python 3.11):
#   before: ['<|end|>', '▁user']
#   saved and loaded: ['<|end|>', 'user']
#   prepend_scheme in tokenizer.json: always; legacy in tokenizer_config.json: None
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import sys

from transformers import AutoTokenizer, LlamaTokenizer

pieces = ["<unk>", "<s>", "</s>", "▁", "u", "s", "e", "r", "us", "er", "user", "▁user"]
merges = [("u", "s"), ("e", "r"), ("us", "er"), ("▁", "user")]
tokenizer = LlamaTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=merges, legacy=True)
tokenizer.add_tokens(["<|end|>"], special_tokens=True)
tokenizer.save_pretrained("saved")
before, after = tokenizer.tokenize("<|end|>user"), AutoTokenizer.from_pretrained("saved").tokenize("<|end|>user")
scheme = json.load(open("saved/tokenizer.json"))["pre_tokenizer"]["prepend_scheme"]
legacy = json.load(open("saved/tokenizer_config.json")).get("legacy")
print("before:", before)
print("saved and loaded:", after)
print(f"prepend_scheme in tokenizer.json: {scheme}; legacy in tokenizer_config.json: {legacy}")
sys.exit(not (before == ["<|end|>", "▁user"] and after == ["<|end|>", "user"] and scheme == "always" and not legacy))
PYTHON
