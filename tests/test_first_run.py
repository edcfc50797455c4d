"""docs/first_run.md: its commands one after another, each on what the earlier ones wrote, with few rows and steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlhf_lightning.data.courtesy.make import as_jsonl, make_rows
from tests.programs import Ended, run
from tests.test_configs import ROOT
from tests.test_readme import PAGES, commands

FEW = {"fit": ["--data.limit", "32", "--trainer.max_epochs", "1"], "evaluate": ["--samples", "1"], "doctor": []}


@pytest.fixture(scope="module")
def chain(tmp_path_factory) -> tuple[Path, list[Ended]]:
    """The directory in which they were run, and how each ended."""
    directory = tmp_path_factory.mktemp("first_run")
    (directory / "pairs.jsonl").write_text(as_jsonl(make_rows("train")[:60]))
    (directory / "held_out.jsonl").write_text(as_jsonl(make_rows("val")[:20]))
    ended = []
    for command in commands(PAGES[ROOT / "docs" / "first_run.md"]):
        fewer = ["--model.max_new_tokens", "12", "--data.batch_size", "4"] if "builtin:ppo" in command else []
        ended.append(run(directory, *command, *FEW[command[0]], *fewer))
        assert ended[-1].code == 0, (command, ended[-1].error[-2000:])
    return directory, ended


def test_each_step_goes_on_from_the_models_of_the_earlier_ones(chain):
    directory, ended = chain
    assert len(ended) == 6
    files = {name: directory / "models" / name / "model.safetensors" for name in ("sft", "rl_policy", "ppo_policy")}
    weights = {name: load_file(file)["model.embed_tokens.weight"] for name, file in files.items()}
    assert not weights["sft"].equal(weights["rl_policy"])
    numbers = json.loads((directory / "reports" / "first" / "metrics.json").read_text())["metrics"]
    assert {"rm/auroc", "policy/win_rate", "policy/kl_nats"} <= set(numbers)


def test_nothing_of_lightning_s_is_shown_and_few_prompts_are_validated_at_the_ends_alone(chain):
    _, ended = chain
    assert not [line for each in ended for line in each.error.splitlines() if "Warning" in line]
    (ppo,) = [each.error for each in ended if "rollout 1 " in each.error]
    assert re.findall(r"^validation at step (\d+):", ppo, re.MULTILINE) == ["0", re.findall(r"\(step (\d+)\)", ppo)[-1]]
