"""Trains by TRL what `test_against_trl.py` trains by this package: python trl_program.py JOB.json

Runs in an environment of its own, without this package. Prints one line of JSON: the losses of the steps, seconds of
CPU of the whole process, and its peak memory in MiB.
"""

from __future__ import annotations

import json
import resource
import sys


def train(job: dict) -> list[float]:
    """Losses of the optimizer steps."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

    torch.set_num_threads(1)
    kind, best = job["kind"], job["way"] == "best"
    settings = dict(job["settings"])
    settings |= {"output_dir": job["output"], "use_cpu": True, "bf16": job["bf16"], "report_to": "none"}
    settings |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "lr_scheduler_type": "constant"}
    settings |= {"max_length": None, "gradient_checkpointing": not best}
    rows = Dataset.from_list(job["rows"])
    if best:
        # Without the column the sampler has no lengths to group by, and the trainer would drop it.
        rows = rows.add_column("length", [len(row["prompt"]) + len(row["chosen"]) for row in job["rows"]])
        settings |= {"train_sampling_strategy": "group_by_length", "remove_unused_columns": False}
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    if kind == "dpo":
        config = DPOConfig(**settings, beta=0.1, precompute_ref_log_probs=best)
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    else:
        config = RewardConfig(**settings)
        model = AutoModelForSequenceClassification.from_pretrained(job["model"], dtype=torch.float32, num_labels=1)
        trainer = RewardTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        losses = train(json.load(file))
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(json.dumps({"losses": losses, "seconds": used.ru_utime + used.ru_stime, "mib": used.ru_maxrss / 1024}))
