"""The program `rlhf-lightning`. Heavy imports stand inside functions, so that `--help` answers at once."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from rlhf_lightning import __version__
from rlhf_lightning.commands.pipeline.processes import OF_A_PIPELINE, end_with_pipeline
from rlhf_lightning.errors import UserError, with_causes
from rlhf_lightning.user_code import find_in_working_directory

TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
COMMANDS = {
    "pipeline": "pipeline.command",
    **dict.fromkeys(TRAINER_COMMANDS, "fit"),
    "evaluate": "evaluate",
    "generate": "generate",
    "contrast": "contrast",
    "judge": "judge",
    "doctor": "doctor",
    "plan": "plan",
    "export": "export",
    "configs": "configs",
}
"""Each command and its module below `rlhf_lightning.commands`, whose `run` takes the arguments after its name and
returns an exit code; that of the Trainer's commands takes the name as well."""

HELP = f"""rlhf-lightning {__version__}: RLHF with PyTorch Lightning, the losses written by hand

usage: rlhf-lightning COMMAND --config FILE.yaml [--config OVERLAY.yaml ...] [--KEY VALUE ...]

commands:
  pipeline   runs and an evaluation after each other, from one file; what is done and unchanged is not done again
  fit        train, validate while training, keep the best checkpoint, print a results table
  validate   evaluate on the validation pairs   [--ckpt_path FILE]
  test       evaluate on the test pairs         [--ckpt_path FILE]
  predict    write the scores of the test pairs [--ckpt_path FILE]
  evaluate   judge models without training, and write a report: reward model, RewardBench, policy, refusal, toxicity
  generate   sample a policy's responses, score them, write them as samples, preference pairs or the best of n
             --policy MODEL --prompts FILE --out FILE.jsonl [--reward_model MODEL] [--rows samples|pairs|best]
  contrast   build preference pairs out of prompts alone: a response, and a good one to a modified instruction
             --maker MODEL --prompts FILE --out PAIRS.jsonl
  judge      judge pairs many times in both orders; keep what agrees with their labels as rows that train a judge
             --judge MODEL --pairs FILE --out DIRECTORY
  doctor     say what is in preference data     [SOURCE] [--json FILE] [--html FILE]
  plan       say whether a run fits, before it runs   --config FILE [--gpu NAME] [--json FILE]
  export     write a checkpoint as a Hugging Face directory, and load it again to prove it
             --ckpt_path FILE --out DIRECTORY [--merge true|false]
  configs    list the configurations that come with the program, or copy one   [copy NAME FILE]

examples:
  rlhf-lightning pipeline --config builtin:quickstart
  rlhf-lightning fit --config configs/quickstart/reward_model.yaml
  rlhf-lightning fit --config configs/reward_model.yaml --data.train pairs.jsonl --model.optimizer.lr 1e-5
  rlhf-lightning fit --config configs/dpo.yaml --model.backbone models/sft --data.train pairs.jsonl
  rlhf-lightning fit --config configs/ppo.yaml --model.backbone models/sft --model.reward_model models/reward_model
  rlhf-lightning test --config configs/reward_model.yaml --ckpt_path CHECKPOINT
  rlhf-lightning evaluate --config configs/evaluate.yaml --reward_model models/reward_model --pairs pairs.jsonl
  rlhf-lightning generate --policy models/policy --prompts prompts.jsonl --out pairs.jsonl --rows pairs --reward_model \
      models/reward_model
  rlhf-lightning fit --config configs/reward_model.yaml --print_config
  rlhf-lightning doctor pairs.jsonl --data.tokenizer Qwen/Qwen2-0.5B --html doctor.html
  rlhf-lightning doctor --config configs/reward_model.yaml
  rlhf-lightning plan --config configs/dpo.yaml --config configs/hardware/zero2.yaml --gpu 4xA10
  rlhf-lightning export --ckpt_path CHECKPOINT --out models/policy
  rlhf-lightning configs copy reward_model mine.yaml

options:
  -h, --help       this text; `rlhf-lightning fit --help` lists every key, and
                   `rlhf-lightning fit --model.help RewardModel` (SFT, DPO, KTO, PPO, OnlineDPO) and
                   `--data.help PreferenceDataModule` those of a class
  --version        the version
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program with `argv` (default: the process's arguments) and return its exit code.

    0: done. 1: `doctor` found rows that would be left out. 2: the user can mend it; one line on stderr says where,
    what, why and what to do, or `doctor` prints why nothing is left of the data. Anything else that goes wrong is ours
    and ends in a traceback.
    """
    try:
        return _run(argv)
    finally:
        _leave_group()


def _run(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments else "--help"
    if command in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if command == "--version":
        print(__version__)
        return 0
    if command not in COMMANDS:
        return _refuse(f"unknown command {command!r}; use one of {', '.join(COMMANDS)}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the older name, which would not be read beside the newer one
        # Rows of ever other lengths leave gaps that no later tensor fits into; such segments grow instead.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    find_in_working_directory()  # a user's own classes
    if OF_A_PIPELINE in os.environ:
        end_with_pipeline()
    try:
        if {"-c", "--config"} & set(arguments) or any("builtin:" in argument for argument in arguments):
            from rlhf_lightning.commands.configs import with_paths

            arguments = [command, *with_paths(arguments[1:])]
        run = importlib.import_module(f"rlhf_lightning.commands.{COMMANDS[command]}").run
        if command in TRAINER_COMMANDS:
            run(arguments)
            return 0
        return run(arguments[1:])
    except SystemExit as exit_:  # argparse's way out of --help and of a refused argument
        return int(exit_.code or 0)
    except UserError as error:
        return _refuse("; ".join([str(error), *getattr(error, "__notes__", ())]))
    except Exception as error:
        if any(isinstance(cause, KeyboardInterrupt) for cause in with_causes(error)):  # in the midst of a library
            return _interrupted()
        from rlhf_lightning.files.disks import named_full_disk

        if (full := named_full_disk(error, ["."])) is not None:
            return _refuse(str(full))
        if not isinstance(error, OSError):
            raise
        return _refuse(f"{error.filename or 'files'}: {error.strerror or error}; give another path, or make room there")
    except KeyboardInterrupt:
        return _interrupted()


def _interrupted() -> int:
    if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes one says it
        print("rlhf-lightning: interrupted", file=sys.stderr)
    return 130


def _refuse(message: str) -> int:
    from rlhf_lightning.terminal import say

    say(f"rlhf-lightning: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _leave_group() -> None:
    """Stop gloo's threads: a process that ends while they run may abort, with words of C++ and another exit code.

    A group of NCCL is left as it is: Lightning ends it at exit, and to do so while others fail can hang.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    if distributed.get_backend() == "gloo":
        distributed.destroy_process_group()
