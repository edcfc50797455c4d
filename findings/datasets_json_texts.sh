#!/usr/bin/env bash
# datasets 5.2.0: load_dataset("json") changes texts that parse as JSON, in a column that holds lists in other rows.
#
# Preference files often mix both shapes of a response: a text, and a list of messages. Such a column becomes a `Json`
# feature, which decodes every cell, also those that were texts in the file: "42" becomes 42, "true" True, "null" None,
# and a text in quotation marks loses them. The same texts in a column of texts alone stay as they are.
#
# Seen with datasets 5.2.0 (Python 3.11):
#   texts alone: ['42', 'true', 'null', '"quoted"', 'plain']
#   beside a list: [42, True, None, 'quoted', 'plain']
# Exits 0 while this is so, 1 when it has changed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet datasets==5.2.0
cd "$work"
HF_HUB_OFFLINE=1 venv/bin/python - <<'PYTHON'
import json
import sys

import datasets

datasets.disable_progress_bars()
texts = ["42", "true", "null", '"quoted"', "plain"]


def loaded(name, cells):
    with open(name, "w") as file:
        file.writelines(json.dumps({"chosen": cell}) + "\n" for cell in cells)
    rows = datasets.load_dataset("json", data_files=name, split="train", cache_dir="cache")
    return [row["chosen"] for row in rows][: len(texts)]


alone = loaded("alone.jsonl", texts)
mixed = loaded("mixed.jsonl", [*texts, [{"role": "assistant", "content": "Hi."}]])
print("texts alone:", alone)
print("beside a list:", mixed)
sys.exit(not (alone == texts and mixed == [42, True, None, "quoted", "plain"]))
PYTHON
