"""The command `contrast`: preference pairs out of prompts alone, of a response and one to another instruction."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from rlhf_lightning.commands.quiet import quieten
from rlhf_lightning.commands.rows import check_out, kept, write_rows
from rlhf_lightning.commands.settings import parse_settings
from rlhf_lightning.data.examples import OnBadRows
from rlhf_lightning.data.prompts import load_prompts
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.ranks import Ranks, check_devices, device_of, run_together
from rlhf_lightning.evaluation.self_taught.contrast import REASONS, Building, uncontaminated
from rlhf_lightning.evaluation.self_taught.replies import Asking
from rlhf_lightning.evaluation.settings import Dtype, TopP
from rlhf_lightning.rewards.questions import read_template
from rlhf_lightning.rewards.writers import Sampling, load_writer
from rlhf_lightning.terminal import say

log = logging.getLogger(__name__)

_USAGE = """rlhf-lightning contrast --maker MODEL --prompts FILE --out PAIRS.jsonl

Builds preference pairs without anybody's label: the chosen response answers the prompt, the rejected one answers well,
but another instruction, which a model was asked to write. The rows are preference pairs for `fit`, `doctor` and
`judge`. A run that was killed resumes.
"""


@dataclass(frozen=True)
class ContrastSettings:
    """What pairs are built of, and by whom.

    Args:
        maker: What writes the responses: a causal language model (directory, whole or LoRA adapters alone; hub name;
            GGUF file), the http:// address of a server with OpenAI's routes, or `module:function` of yours, which takes
            conversations and seeds and gives a text for each.
        prompts: Prompts or preference pairs, whose prompts are taken: a file, a directory or a hub data set.
        out: The file of the pairs, JSON Lines. The replies are kept next to it, in `.NAME.kept/`.
        modifier: What writes the modified instructions; the maker when not given.
        two_replies: Ask for the modified instruction alone, and let the maker answer it as any prompt: for small
            models, whose long replies lose the form. Else one reply holds both, as in the paper.
        template: A text file with the request for a modified instruction, in which `{conversation}` and, unless
            `two_replies`, `{answer}` are replaced. Its reply is read below the headings of docs/self_taught.md.
        exclude: Prompts that must not be learned from, such as those of a benchmark: the same ones are left out, and
            those that share 13 words in a row with one.
        pairs_per_prompt: Pairs built of each prompt, each of other replies.
        max_length_ratio: No pair where one response has more than so many times the characters of the other; 0 for no
            bound.
        temperature: Sampling temperature; 0 takes the most likely tokens.
        top_p: Sample from the fewest most likely tokens whose probabilities add up to this or more; 1 keeps all.
        max_new_tokens: Longest reply, in tokens. No pair is made of a longer one.
        prompts_split: Which files of a directory or hub data set these are.
        max_prompts: The first so many prompts.
        on_bad_rows: `error` refuses prompts with unusable rows and names them; `drop` leaves such rows out.
        batch_size: Replies sampled at a time; changes no row, but for rounding.
        device: Such as `cpu` or `cuda`; a GPU where there is one when not given.
        devices: Processes on this machine, each with a device of its own and a share of the prompts.
        dtype: Dtype of the weights and arithmetic.
        seed: Seed of the sampling. A reply depends on the seed and on what is asked alone.
        trust_remote_code: Run code that comes with models.
    """

    maker: str
    prompts: Source
    out: str
    modifier: str | None = None
    two_replies: bool = False
    template: str | None = None
    exclude: Source | None = None
    pairs_per_prompt: PositiveInt = 1
    max_length_ratio: NonNegativeFloat = 4.0
    temperature: NonNegativeFloat = 0.7
    top_p: TopP = 0.9
    max_new_tokens: PositiveInt = 512
    prompts_split: Literal["train", "val", "test"] = "train"
    max_prompts: PositiveInt | None = None
    on_bad_rows: OnBadRows = "error"
    batch_size: PositiveInt = 16
    device: str | None = None
    devices: PositiveInt = 1
    dtype: Dtype = "float32"
    seed: NonNegativeInt = 0
    trust_remote_code: bool = False


def run(arguments: Sequence[str]) -> int:
    """Build the pairs, write them, say what became of the prompts, and return the exit code. Raises `UserError`."""
    quieten()
    settings = parse(arguments)
    check_out("contrast", settings.out)
    device, out = device_of(settings.device), Path(settings.out)
    check_devices(device, settings.devices)
    busy = f"out: {out}: another process is writing there; wait for its end, or give another file"
    run_together(device, settings.devices, kept(out) / ".lock", busy, partial(_run, settings))
    return 0


def parse(arguments: Sequence[str]) -> ContrastSettings:
    """The settings of a command line. Raises `UserError`, and SystemExit after `--help` or `--print_config`."""
    return parse_settings(ContrastSettings, "contrast", _USAGE, arguments)


def _run(settings: ContrastSettings, ranks: Ranks) -> None:
    loaded, report = load_prompts(settings.prompts, split=settings.prompts_split, on_bad_rows=settings.on_bad_rows)
    others = [] if settings.exclude is None else load_prompts(settings.exclude, on_bad_rows="drop")[0]
    clean = uncontaminated(loaded, others)
    prompts = clean[: settings.max_prompts]
    log.info("prompts: %d, of %d rows of %s", len(prompts), report.rows_read, report.source)
    if not prompts:
        raise ConfigurationError(f"exclude: all {len(loaded)} prompts are among those to be left out")
    building = _building(settings, ranks)
    found = building.build(prompts, settings.pairs_per_prompt)
    excluded = len(loaded) - len(clean)
    counts = {"prompts": len(prompts), "excluded": excluded, "pairs": len(found.pairs), **found.dropped}
    words = ", ".join(f"{name} {count}" for name, count in found.dropped.items() if count) or "none dropped"
    if not found.pairs:
        reasons = "; ".join(f"{REASONS[name]}: {count}" for name, count in found.dropped.items() if count)
        raise ConfigurationError(f"contrast: no pair came of {len(prompts)} prompts ({reasons})")
    rows = [
        {
            "id": f"{pair.prompt.example_id}#{pair.number}" if pair.number else pair.prompt.example_id,
            "prompt": list(pair.prompt.prompt),
            "chosen": pair.chosen,
            "rejected": pair.rejected,
            "source": "contrast",
            "modified_prompt": pair.modified,
            "maker": building.maker.name,
            "seed": settings.seed,
        }
        for pair in found.pairs
    ]
    if ranks.rank == 0:
        write_rows(Path(settings.out), rows, counts)
        say(f"{settings.out}: {len(rows)} pairs of {len(prompts)} prompts; {words}; {excluded} prompts excluded")


def _building(settings: ContrastSettings, ranks: Ranks) -> Building:
    needed = ("conversation",) if settings.two_replies else ("conversation", "answer")
    template = read_template(settings.template, *needed)
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p)
    load = partial(
        load_writer,
        sampling=sampling,
        batch_size=settings.batch_size,
        device=ranks.device,
        dtype=getattr(torch, settings.dtype),
        trust_remote_code=settings.trust_remote_code,
    )
    maker = load(settings.maker)
    modifier = maker if settings.modifier in (None, settings.maker) else load(settings.modifier)
    file = kept(Path(settings.out)) / "replies.jsonl"
    asking = Asking(file, settings.seed, 8 * settings.batch_size, ranks)
    ratio = settings.max_length_ratio or None
    return Building(maker, modifier, asking, settings.two_replies, template, ratio)
