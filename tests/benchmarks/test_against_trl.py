"""DPO and reward models against TRL 1.16 on the same pairs, model and optimizer steps: whole processes, seconds of CPU.

python3.11 -m venv trl && trl/bin/pip install torch==2.13.0 && trl/bin/pip install trl==1.16.0
RLHF_LIGHTNING_TRL=trl/bin/python python -m pytest -m benchmark tests/benchmarks/test_against_trl.py -s

TRL runs at its best in each round: without gradient checkpointing, the log-probs of its reference computed once, rows
grouped by length; with RLHF_LIGHTNING_TRL_DEFAULTS set also once with its defaults. RLHF_LIGHTNING_EARLIER may be a
checkout of an earlier commit of this package, which then runs in each round as well. Losses are compared first.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from rlhf_lightning.models.reward_network import RewardNetwork
from rlhf_lightning.tiny import builtin_texts, make_tiny_model

TRL, EARLIER = os.environ.get("RLHF_LIGHTNING_TRL"), os.environ.get("RLHF_LIGHTNING_EARLIER")
ROUNDS = int(os.environ.get("RLHF_LIGHTNING_ROUNDS", "3"))
PAIRS, BATCH_SIZE, EPOCHS = 32, 8, 2
"""All pairs make one step, so that the second step shows what the first one did."""
BF16 = bool(os.environ.get("RLHF_LIGHTNING_BF16"))
"""float32 else, as on processors without products of bfloat16."""
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not TRL, reason="needs RLHF_LIGHTNING_TRL, the python of an environment with TRL"),
]


@pytest.fixture(scope="module")
def tokenizer_directory(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tokenizer"), builtin_texts(), architecture="llama")


def hh_like_pairs(tokenizer) -> list[dict[str, str]]:
    """Pairs of words, with the token counts of hh-rlhf harmless-base: prompts of 85 tokens in the median and 112 in the
    mean, responses of 31 and 44 (lognormal)."""
    draw = np.random.default_rng(0)
    words = sorted({word for text in builtin_texts() for word in text.split()})
    tokens = {word: len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) for word in words}

    def text(wanted: int) -> str:
        taken, count = [], 0
        while count < wanted:
            taken.append(words[draw.integers(len(words))])
            count += tokens[taken[-1]]
        return " ".join(taken)

    prompts = np.exp(draw.normal(np.log(85), 0.75, PAIRS)).clip(8, 800).astype(int)
    responses = np.exp(draw.normal(np.log(31), 0.84, (PAIRS, 2))).clip(2, 500).astype(int)
    return [
        {"prompt": text(prompt), "chosen": text(chosen), "rejected": text(rejected)}
        for prompt, (chosen, rejected) in zip(prompts, responses, strict=True)
    ]


def model_of(kind: str, directory: Path, tokenizer) -> Path:
    """8 layers of width 512 and a vocabulary of 32,000, random."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = LlamaConfig(vocab_size=32_000, num_key_value_heads=4, **sizes, **ids)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    if kind == "rm":  # with the same head
        RewardNetwork.from_backbone(str(directory), head="linear").save_pretrained(directory / "reward")
        tokenizer.save_pretrained(directory / "reward")
        return directory / "reward"
    return directory


def run(python: str, program: str, job: dict, directory: Path, path: str | None = None) -> dict:
    file = directory / "job.json"
    file.write_text(json.dumps(job))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("PYTHONPATH", None)
    if path is not None:
        environment["PYTHONPATH"] = path
    command = [python, str(Path(__file__).with_name(program)), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=directory, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("kind", ["dpo", "rm"])
def test_the_same_losses_for_less(kind, tmp_path, tokenizer_directory):
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    model = model_of(kind, tmp_path / "model", tokenizer)
    pairs = hh_like_pairs(tokenizer)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rendered = [
        pair
        | {
            "prompt": tokenizer.apply_chat_template(
                [{"role": "user", "content": pair["prompt"]}], tokenize=False, add_generation_prompt=True
            )
        }
        for pair in pairs
    ]
    settings = {"per_device_train_batch_size": BATCH_SIZE, "gradient_accumulation_steps": PAIRS // BATCH_SIZE}
    settings |= {"num_train_epochs": EPOCHS, "learning_rate": 1e-4}
    job = {"kind": kind, "model": str(model), "output": str(tmp_path / "out"), "bf16": BF16, "settings": settings}
    trl = job | {"rows": rendered}
    own = job | {"pairs": str(tmp_path / "pairs.jsonl"), "model_settings": {}, "schedule_key": "lr_scheduler_type"}
    if kind == "dpo":
        own["model_settings"]["precompute_reference"] = True
        own["model_settings"]["reference_cache"] = str(tmp_path / "references")
    here = str(Path(__file__).parents[2])
    ways = {
        "TRL, best": lambda: run(str(TRL), "trl_program.py", trl | {"way": "best"}, tmp_path),
        "ours": lambda: run(sys.executable, "own_program.py", own, tmp_path, here),
    }
    if EARLIER:
        earlier = {"reference": "precomputed", "reference_cache": str(tmp_path / "earlier")} if kind == "dpo" else {}
        before = own | {"model_settings": earlier, "schedule_key": "schedule", "model": str(tmp_path / "model")}
        ways["ours, earlier"] = lambda: run(sys.executable, "own_program.py", before, tmp_path, EARLIER)
    seen: dict[str, list[dict]] = {}
    if "RLHF_LIGHTNING_TRL_DEFAULTS" in os.environ:
        seen["TRL, defaults"] = [run(str(TRL), "trl_program.py", trl | {"way": "default"}, tmp_path)]
    for _ in range(ROUNDS):
        for way, train in ways.items():
            seen.setdefault(way, []).append(train())
            if kind == "dpo" and way != "TRL, best":
                for cache in ("references", "earlier"):  # computed in each run
                    for file in (tmp_path / cache).rglob("*.part"):
                        file.unlink()
    ours = statistics.median(made["seconds"] for made in seen["ours"])
    for way, made in seen.items():
        seconds, mib = (statistics.median(each[key] for each in made) for key in ("seconds", "mib"))
        losses = ", ".join(f"{loss:.6f}" for loss in made[0]["losses"])
        print(f"{kind}, {way}: {seconds:.1f} CPU s ({seconds / ours:.2f}x ours), {mib:.0f} MiB, losses {losses}")
    expected = seen["TRL, best"][0]["losses"]
    assert seen["ours"][0]["losses"] == pytest.approx(expected, abs=2e-3 if BF16 else 2e-5)
    assert ours < statistics.median(made["seconds"] for made in seen["TRL, best"])
