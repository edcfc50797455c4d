"""The command `generate`: a policy's responses to prompts, scored, as samples, preference pairs or the best of n."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from rlhf_lightning.commands.quiet import quieten
from rlhf_lightning.commands.rows import check_out, kept, write_rows
from rlhf_lightning.commands.settings import parse_settings
from rlhf_lightning.data.examples import OnBadRows, PromptExample
from rlhf_lightning.data.prompts import load_prompts
from rlhf_lightning.data.sources import Source
from rlhf_lightning.errors import ConfigurationError
from rlhf_lightning.evaluation.generate import Response, generate_responses
from rlhf_lightning.evaluation.ranks import Ranks, check_devices, device_of, run_together
from rlhf_lightning.evaluation.settings import Dtype, TopP
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.slot_engine import SlotEngine
from rlhf_lightning.rewards.functions import FunctionScorer, check_text_of
from rlhf_lightning.rewards.source import Reward, RewardSource, check_scores, reward_list
from rlhf_lightning.rewards.writers import load_frozen_policy
from rlhf_lightning.terminal import say

log = logging.getLogger(__name__)

Rows = Literal["samples", "pairs", "best"]

_USAGE = """rlhf-lightning generate --policy MODEL --prompts FILE --out FILE.jsonl [--reward_model MODEL] [--rows KIND]

Samples responses of a policy to prompts, scores them with a reward model or a function, and writes rows that the other
commands read: `samples`, every response with its score; `pairs`, the best and the worst response to each prompt as
chosen and rejected; `best`, the best response to each prompt (best of n). A run that was killed resumes.
"""


@dataclass(frozen=True)
class GenerationSettings:
    """What is generated, and what is written of it.

    Args:
        policy: Directory (whole, or LoRA adapters alone), hub name or GGUF file of a causal language model.
        prompts: Prompts or preference pairs, whose prompts are taken: a file, a directory or a hub data set.
        out: The file of the rows, JSON Lines. What was sampled is kept next to it, in `.NAME.kept/`.
        rows: `samples`, every response; `pairs`, best and worst of each prompt; `best`, the best of each prompt.
        reward_model: Directory or hub name of a reward model, ours or a sequence classifier with one label, or
            `module:function` of yours; or a list of them, `{source: ..., weight: 1, name: ..., chat_template: ...}`
            each, whose weighted sum is the score. `samples` alone can do without.
        reward_chat_template: The text that it reads: `plain`, `pair`, `transcript` or a Jinja file; when not given, its
            tokenizer's chat template, else the transcript.
        num_generations: Responses to each prompt.
        temperature: Sampling temperature; 0 takes the most likely tokens.
        top_p: Sample from the fewest most likely tokens whose probabilities add up to this or more; 1 keeps all.
        max_new_tokens: Longest response, in tokens.
        min_score_gap: Pairs are written where the scores of best and worst differ by more than this.
        require_eos: Leave out of `pairs` and `best` responses that did not end with an EOS token within
            `max_new_tokens`: learned from, they teach a policy to stop in the middle.
        prompts_split: Which files of a directory or hub data set these are.
        max_prompts: The first so many prompts.
        on_bad_rows: `error` refuses prompts with unusable rows and names them; `drop` leaves such rows out.
        batch_size: Responses sampled or scored at a time; changes no row, but for rounding.
        device: Such as `cpu` or `cuda`; a GPU where there is one when not given.
        devices: Processes on this machine, each with a device of its own and a share of the prompts.
        dtype: Dtype of the weights and arithmetic of policy and reward model.
        seed: Seed of the sampling. A response depends on the seed, its prompt's id and its number alone.
        trust_remote_code: Run code that comes with models.
    """

    policy: str
    prompts: Source
    out: str
    rows: Rows = "samples"
    reward_model: Reward | None = None
    reward_chat_template: str | None = None
    num_generations: PositiveInt = 4
    temperature: NonNegativeFloat = 1.0
    top_p: TopP = 1.0
    max_new_tokens: PositiveInt = 256
    min_score_gap: NonNegativeFloat = 0.0
    require_eos: bool = True
    prompts_split: Literal["train", "val", "test"] = "train"
    max_prompts: PositiveInt | None = None
    on_bad_rows: OnBadRows = "error"
    batch_size: PositiveInt = 16
    device: str | None = None
    devices: PositiveInt = 1
    dtype: Dtype = "float32"
    seed: NonNegativeInt = 0
    trust_remote_code: bool = False


@dataclass(frozen=True, slots=True)
class Scored:
    """The responses to one prompt, with their scores; without any where nothing scores."""

    prompt: PromptExample
    responses: Sequence[Response]
    scores: Sequence[float]

    def ranked(self, *, require_eos: bool) -> list[tuple[float, Response]]:
        """Responses that hold a text, worst first; of equal scores the later one first."""
        both = zip(self.scores, self.responses, strict=True)
        return sorted(
            ((score, each) for score, each in both if each.text.strip() and (each.ended or not require_eos)),
            key=lambda scored: (scored[0], -scored[1].sample),
        )


def run(arguments: Sequence[str]) -> int:
    """Generate, write, say what was written, and return the exit code. Raises `UserError`."""
    quieten()
    settings = parse(arguments)
    check(settings)
    device, out = device_of(settings.device), Path(settings.out)
    check_devices(device, settings.devices)
    busy = f"out: {out}: another process is writing there; wait for its end, or give another file"
    run_together(device, settings.devices, kept(out) / ".lock", busy, partial(_run, settings))
    return 0


def parse(arguments: Sequence[str]) -> GenerationSettings:
    """The settings of a command line. Raises `UserError`, and SystemExit after `--help` or `--print_config`."""
    return parse_settings(GenerationSettings, "generate", _USAGE, arguments)


def _run(settings: GenerationSettings, ranks: Ranks) -> None:
    scored = generate(settings, ranks)
    if ranks.rank == 0:
        _write(settings, scored)


def check(settings: GenerationSettings) -> None:
    """Refuse settings that contradict each other, before a model is loaded. Raises `ConfigurationError`."""
    check_out("generate", settings.out)
    if settings.rows != "samples" and settings.reward_model is None:
        raise ConfigurationError(f"rows: {settings.rows} are chosen by their scores; give reward_model")
    if settings.rows != "samples" and settings.num_generations < 2:
        raise ConfigurationError(f"rows: {settings.rows} need several responses; set num_generations to 2 or more")
    if settings.top_p < 1 and settings.temperature == 0:
        raise ConfigurationError("top_p: at temperature 0 the most likely token is taken; leave top_p out")
    if settings.num_generations > 1 and settings.temperature == 0:
        raise ConfigurationError("temperature: at 0 all responses to a prompt are the same; set num_generations to 1")
    if settings.reward_model is None:
        check_text_of(None, settings.reward_chat_template)
    else:
        reward_list(settings.reward_model, settings.reward_chat_template, key="reward_model")


def generate(settings: GenerationSettings, ranks: Ranks) -> list[Scored]:
    """The responses to every prompt, with their scores, in all processes. Raises `UserError`."""
    prompts, report = load_prompts(settings.prompts, split=settings.prompts_split, on_bad_rows=settings.on_bad_rows)
    prompts = prompts[: settings.max_prompts]
    log.info("prompts: %d, of %d rows of %s", len(prompts), report.rows_read, report.source)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    policy, chat_format = load_frozen_policy(
        settings.policy, device=ranks.device, dtype=dtype, trust_remote_code=settings.trust_remote_code
    )
    responses = generate_responses(
        policy,
        chat_format,
        prompts,
        samples=settings.num_generations,
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        engine=SlotEngine(settings.batch_size, say_progress=ranks.rank == 0),
        model=weights_fingerprint(policy),
        file=kept(Path(settings.out)) / "responses.jsonl",
        keep_every=4 * settings.batch_size,
        ranks=ranks,
    )
    del policy
    scores = _scores(settings, prompts, responses, dtype, ranks)
    count = settings.num_generations
    parts = [slice(start, start + count) for start in range(0, len(responses), count)]
    return [Scored(prompt, responses[part], scores[part]) for prompt, part in zip(prompts, parts, strict=True)]


def _scores(
    settings: GenerationSettings,
    prompts: Sequence[PromptExample],
    responses: Sequence[Response],
    dtype: torch.dtype,
    ranks: Ranks,
) -> list[float]:
    """The score of each response. Raises `TrainingError` naming the prompts of scores that are not finite."""
    if settings.reward_model is None:
        return []
    source = RewardSource(
        settings.reward_model,
        chat_template=settings.reward_chat_template,
        batch_size=settings.batch_size,
        trust_remote_code=settings.trust_remote_code,
    )
    source.to(torch.device(ranks.device), dtype)
    by_id = {prompt.example_id: prompt for prompt in prompts}

    def score(part: Sequence[Response]) -> list[float]:
        conversations = [by_id[each.prompt_id].prompt for each in part]
        scores = source(conversations, [each.text for each in part], [each.ended for each in part])
        check_scores(scores, [each.prompt_id for each in part], source.name)
        return scores.tolist()

    if any(
        isinstance(scorer, FunctionScorer) for scorer in source.scorers
    ):  # which may tell responses apart by what it has seen
        return ranks.once(lambda: score(responses))
    return ranks.each(responses, score)


def _write(settings: GenerationSettings, scored: Sequence[Scored]) -> None:
    rows = list({"samples": _samples, "pairs": _pairs, "best": _best}[settings.rows](settings, scored))
    if not rows:
        raise ConfigurationError(
            f"rows: no {settings.rows} came of {len(scored)} prompts ({_why(settings, scored)}); raise max_new_tokens, "
            "num_generations or temperature, or lower min_score_gap"
        )
    write_rows(Path(settings.out), rows, _numbers(scored))
    say(f"{settings.out}: {len(rows)} {settings.rows} of {len(scored)} prompts; {_why(settings, scored)}")


def _why(settings: GenerationSettings, scored: Sequence[Scored]) -> str:
    """What the responses were like, in words."""
    numbers = _numbers(scored)
    words = f"{numbers['ended']} of {numbers['responses']} responses ended with an EOS token"
    if "reward" in numbers:
        best = f"mean of the best of {settings.num_generations} {numbers['best_of_n']:.4f}"
        words += f", mean score {numbers['reward']:.4f}, {best}"
    return words


def _numbers(scored: Sequence[Scored]) -> dict[str, float]:
    """What was measured: of all responses their mean reward, of each prompt's best the same (best of n)."""
    responses = [response for each in scored for response in each.responses]
    numbers: dict[str, float] = {
        "prompts": len(scored),
        "responses": len(responses),
        "ended": sum(response.ended for response in responses),
        "response_length": math.fsum(response.tokens for response in responses) / len(responses),
    }
    if scores := [score for each in scored for score in each.scores]:
        numbers["reward"] = math.fsum(scores) / len(scores)
        numbers["best_of_n"] = math.fsum(max(each.scores) for each in scored) / len(scored)
    return numbers


def _samples(settings: GenerationSettings, scored: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    for each in scored:
        for place, response in enumerate(each.responses):
            row = {"id": f"{each.prompt.example_id}#{response.sample}", "prompt": list(each.prompt.prompt)}
            found = {"response": response.text, "ended": response.ended, "tokens": response.tokens}
            yield row | found | ({"score": each.scores[place]} if each.scores else {})


def _best(settings: GenerationSettings, scored: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    for each in scored:
        if ranked := each.ranked(require_eos=settings.require_eos):
            score, response = ranked[-1]
            row = {"id": each.prompt.example_id, "prompt": list(each.prompt.prompt)}
            yield row | {"response": response.text, "score": score}


def _pairs(settings: GenerationSettings, scored: Sequence[Scored]) -> Iterator[dict[str, Any]]:
    for each in scored:
        ranked = each.ranked(require_eos=settings.require_eos)
        if len(ranked) < 2:
            continue
        (low, worst), (high, best) = ranked[0], ranked[-1]
        if high - low > settings.min_score_gap and best.text != worst.text:
            yield {
                "id": each.prompt.example_id,
                "prompt": list(each.prompt.prompt),
                "chosen": best.text,
                "rejected": worst.text,
                "score_chosen": high,
                "score_rejected": low,
            }
