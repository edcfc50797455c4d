"""What policies answer to prompts, and what reward models, detectors and classifiers say of the answers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch

from rlhf_lightning.data.chat_format import ChatFormat, load_tokenizer
from rlhf_lightning.data.examples import Message, PromptExample
from rlhf_lightning.evaluation.estimates import mean_estimate, wilson
from rlhf_lightning.evaluation.generate import GeneratedReply, generate_replies, kl_of_replies
from rlhf_lightning.evaluation.policy import best_of_n, compare_policies, summarise_kl
from rlhf_lightning.evaluation.refusal import (
    BUILTIN_DETECTOR,
    RefusalClassifier,
    is_refusal,
    refusal_change,
    summarise_refusals,
)
from rlhf_lightning.evaluation.results import SIDES, Judged, PolicyResults, PromptRow, Side
from rlhf_lightning.evaluation.rounding import ROWS, spread
from rlhf_lightning.evaluation.session import Session, timed
from rlhf_lightning.evaluation.toxicity import ToxicityScorer, summarise_lexicon, summarise_toxicity
from rlhf_lightning.evaluation.toxicity import toxicity_change as change_of_toxicity
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.generation import TransformersEngine
from rlhf_lightning.models.precision import float32_arithmetic, move
from rlhf_lightning.rewards.functions import reward_scorer
from rlhf_lightning.rewards.scorers import Scorer, load_policy


class Answers:
    """The policies of a session; `measured` does all of it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.settings, self.data = session.settings, session.data

    def measured(self) -> PolicyResults | None:
        """Replies of the policies to all prompts, and what reward models, detectors and classifiers say of them."""
        settings, data = self.settings, self.data
        if settings.policy is None or not (data.prompts or data.refusal):
            return None
        names: dict[Side, str] = {"after": settings.policy}
        if settings.reference is not None:
            names = {"before": settings.reference, "after": settings.policy}
        replies: dict[Side, list[GeneratedReply]] = {}
        refusals: dict[Side, list[GeneratedReply]] = {}
        loaded: dict[Side, tuple[CausalLM, ChatFormat]] = {}
        for side, name in names.items():
            loaded[side] = self.session.made(self._load, name)
            self.session.fingerprints[f"policy {side}: {name}"] = weights_fingerprint(loaded[side][0])
            if data.prompts:
                replies[side] = self._draw(side, *loaded[side], data.prompts, settings.samples, settings.temperature)
            if data.refusal:
                prompts = [each.prompt for each in data.refusal]
                refusals[side] = self._draw(f"{side}-refusal", *loaded[side], prompts, 1, 0.0)
        rows = self._prompt_rows(data.prompts, replies)
        kl = self._kl(loaded, replies, rows) if len(names) == 2 and data.prompts else None
        del loaded
        judged = self._judged(rows)
        toxicity, toxicity_change = self._toxicity(rows)
        refusal_rows, refusal, change = self._refusal(refusals)
        lexicon = {}
        if data.lexicon is not None:
            for side in replies:
                found = [data.lexicon(row.replies[side]) for row in rows]
                lexicon[side] = summarise_lexicon(np.array(found), lexicon=data.lexicon)
        unended = {side: _unended([row.ended[side] for row in rows]) for side in replies}
        return PolicyResults(
            names, rows, judged, kl, unended, refusal_rows, refusal, change, toxicity, toxicity_change, lexicon
        )

    def _load(self, name: str) -> tuple[CausalLM, ChatFormat]:
        policy = load_policy(name, trust_remote_code=self.settings.trust_remote_code)
        move(policy.eval().requires_grad_(False), torch.device(self.session.ranks.device), self.session.dtype)
        return policy, ChatFormat(load_tokenizer(name, trust_remote_code=self.settings.trust_remote_code))

    def _draw(
        self,
        label: str,
        policy: CausalLM,
        chat_format: ChatFormat,
        prompts: Sequence[PromptExample],
        samples: int,
        temperature: float,
    ) -> list[GeneratedReply]:
        model = weights_fingerprint(policy)
        with timed(f"replies {label}: {len(prompts)} x {samples}"):
            return generate_replies(
                policy,
                chat_format,
                prompts,
                samples=samples,
                temperature=temperature,
                max_new_tokens=self.settings.max_new_tokens,
                seed=self.settings.seed,
                engine=TransformersEngine(self.settings.batch_size),
                model=model,
                file=self.session.kept / f"replies-{label}-{model[:16]}.jsonl",
                keep_every=4 * self.settings.batch_size,
                ranks=self.session.ranks,
            )

    def _prompt_rows(
        self, prompts: Sequence[PromptExample], replies: dict[Side, list[GeneratedReply]]
    ) -> list[PromptRow]:
        rows = []
        for place, prompt in enumerate(prompts):
            own = {
                side: of_side[place * self._each(of_side, prompts) :][: self._each(of_side, prompts)]
                for side, of_side in replies.items()
            }
            rows.append(
                PromptRow(
                    prompt.example_id,
                    "\n\n".join(prompt.texts),
                    {side: [reply.text for reply in few] for side, few in own.items()},
                    {side: [reply.tokens for reply in few] for side, few in own.items()},
                    {side: [reply.ended for reply in few] for side, few in own.items()},
                )
            )
        return rows

    @staticmethod
    def _each(replies: Sequence[GeneratedReply], prompts: Sequence[PromptExample]) -> int:
        return len(replies) // len(prompts)

    def _kl(self, loaded, replies, rows: list[PromptRow]):
        """KL of the policy after from that before, along its own replies; also into the rows."""
        settings = self.settings
        if settings.temperature != 1:
            self.session.note(
                f"KL: not measured, it needs replies drawn at temperature 1, not {settings.temperature:g}"
            )
            return None
        (before, _), (after, chat_format) = loaded["before"], loaded["after"]
        if before.config.get_text_config().vocab_size != after.config.get_text_config().vocab_size:
            self.session.note("KL: not measured, the policies have different vocabularies")
            return None
        with timed("KL"):
            measured = partial(
                kl_of_replies, after, before, chat_format, self.data.prompts, batch_size=settings.batch_size
            )
            with float32_arithmetic(after, before):
                found = self.session.ranks.each(replies["after"], measured)
        if settings.dtype != "float32":
            self.session.note(
                f"KL: computed in float32 of policies with weights rounded to {settings.dtype}, in which they answered"
            )
        shape = (len(rows), settings.samples)
        exact, k1, tokens = (
            np.array([getattr(each, name) for each in found], dtype=np.float64).reshape(shape)
            for name in ("exact", "k1", "tokens")
        )
        for place, row in enumerate(rows):
            rows[place] = replace(row, kl=exact[place].tolist())
        return summarise_kl(np.maximum(exact, 0.0), k1, tokens, seed=settings.seed)  # float32 rounds below 0

    def _judged(self, rows: list[PromptRow]) -> list[Judged]:
        """The policies by each reward model. The first one's rewards go into the rows."""
        settings, found = self.settings, []
        if not rows:
            return found
        for name, text in (
            (settings.reward_model, settings.reward_chat_template),
            (settings.held_out_reward_model, settings.held_out_reward_chat_template),
        ):
            if name is None:
                continue
            with timed(f"rewards of the replies by {name}"):
                make = partial(reward_scorer, name, chat_template=text, **self.session.loading)
                scorer = self.session.made(make)
                rewards = {side: self._rewards(scorer, rows, side) for side in rows[0].replies}
                anchors = self._anchor_rewards(scorer)
            if not self.session.sample():  # else it was measured where the scorer was judged
                replies = [(prompt.prompt, text) for prompt, row in self._with(rows) for text in row.replies["after"]]
                self.session.rounding("rewards of", make, scorer, spread(replies, ROWS))
            if not found:
                for place, row in enumerate(rows):
                    rows[place] = replace(row, rewards={side: of[place].tolist() for side, of in rewards.items()})
            tokens = {side: np.array([row.tokens[side] for row in rows], dtype=np.float64) for side in rewards}
            comparison = None
            if "before" in rewards:
                sides = {"tokens_before": tokens["before"], "tokens_after": tokens["after"]}
                both = rewards["before"], rewards["after"]
                comparison = compare_policies(*both, **anchors, **sides, seed=settings.seed)
            curve = best_of_n(rewards.get("before", rewards["after"]), seed=settings.seed)
            after = mean_estimate(rewards["after"].mean(axis=1), seed=settings.seed)
            found.append(Judged(name, name == settings.held_out_reward_model, comparison, after, curve))
        return found

    def _rewards(self, scorer: Scorer, rows: Sequence[PromptRow], side: Side) -> np.ndarray:
        replies = [
            (prompt.prompt, text, ended)
            for prompt, row in self._with(rows)
            for text, ended in zip(row.replies[side], row.ended[side], strict=True)
        ]
        return np.array(self._scores(scorer, replies), dtype=np.float64).reshape(len(rows), -1)

    def _scores(self, scorer: Scorer, rows: Sequence[tuple[Sequence[Message], str, bool]]) -> list[float]:
        """Of prompts and responses, in their order, with whether they have ended."""
        return [each.score for each in self.session.ranks.each(rows, lambda own: scorer(*zip(*own, strict=True)))]

    def _anchor_rewards(self, scorer: Scorer) -> dict[str, np.ndarray]:
        """Mean reward of the chosen and of the rejected responses of each prompt, [P]; nothing where some lack them."""
        pairs = [self.data.anchors.get(prompt.example_id, []) for prompt in self.data.prompts]
        if not all(pairs):
            return {}
        found = {}
        for side in ("chosen", "rejected"):
            flat = [(prompt.prompt, getattr(pair, side), True) for prompt, own in self._with(pairs) for pair in own]
            scores = iter(self._scores(scorer, flat))
            found[side] = np.array([np.mean([next(scores) for _ in own]) for own in pairs])
        return found

    def _with(self, others):
        return zip(self.data.prompts, others, strict=True)

    def _toxicity(self, rows: list[PromptRow]):
        settings = self.settings
        if settings.toxicity_model is None or not rows:
            return {}, None
        scorer = self.session.made(
            ToxicityScorer,
            settings.toxicity_model,
            toxic_labels=settings.toxic_labels or "auto",
            batch_size=settings.batch_size,
            device=self.session.ranks.device,
            trust_remote_code=settings.trust_remote_code,
        )
        scores: dict[Side, np.ndarray] = {}
        for side in rows[0].replies:
            with timed(f"toxicity {side}"):
                flat = self.session.ranks.each([text for row in rows for text in row.replies[side]], scorer)
            scores[side] = np.array(flat, dtype=np.float64).reshape(len(rows), -1)
        for place, row in enumerate(rows):
            own = {side: [None if math.isnan(x) else x for x in of[place].tolist()] for side, of in scores.items()}
            rows[place] = replace(row, toxicity=own)
        summaries = {
            side: summarise_toxicity(of, method=scorer.method, threshold=scorer.threshold, seed=settings.seed)
            for side, of in scores.items()
        }
        both = [scores[side] for side in SIDES if side in scores]
        change = change_of_toxicity(*both, threshold=scorer.threshold, seed=settings.seed) if len(both) == 2 else None
        return summaries, change

    def _refusal(self, replies: dict[Side, list[GeneratedReply]]):
        settings, prompts = self.settings, self.data.refusal
        if not replies:
            return [], {}, None
        examples, safety = [each.prompt for each in prompts], [each.safety for each in prompts]
        rows = self._prompt_rows(examples, replies)
        method, refused = BUILTIN_DETECTOR, {}
        classifier = None
        if settings.refusal_classifier is not None:
            classifier = self.session.made(
                RefusalClassifier,
                settings.refusal_classifier,
                refusal_label=settings.refusal_label,
                batch_size=settings.batch_size,
                device=self.session.ranks.device,
                trust_remote_code=settings.trust_remote_code,
            )
            method = classifier.method
        for side in replies:
            texts = [row.replies[side][0] for row in rows]
            if classifier is None:
                refused[side] = [is_refusal(text) for text in texts]
            else:
                asked = [(row.prompt, text) for row, text in zip(rows, texts, strict=True)]
                found = self.session.ranks.each(asked, lambda own: classifier(*zip(*own, strict=True)))
                failed = sum(each is None for each in found)
                if failed:
                    self.session.note(
                        f"refusal {side}: {failed} replies could not be classified; the detector told them"
                    )
                refused[side] = [
                    is_refusal(text) if each is None else each for each, text in zip(found, texts, strict=True)
                ]
        rows = [
            replace(row, safety=safety[place], refused={side: of[place] for side, of in refused.items()})
            for place, row in enumerate(rows)
        ]
        arrays = {side: np.array(of)[:, None] for side, of in refused.items()}
        summaries = {side: summarise_refusals(of, safety, method=method) for side, of in arrays.items()}
        change = None
        if len(arrays) == 2:
            change = refusal_change(arrays["before"], arrays["after"], safety, seed=settings.seed)
        return rows, summaries, change


def _unended(ended: Sequence[Sequence[bool]]):
    shares = [1 - sum(few) / len(few) for few in ended]
    return wilson(min(math.fsum(shares), len(shares)), len(shares))
