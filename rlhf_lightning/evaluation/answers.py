"""What policies answer to prompts, and what reward models, detectors and classifiers say of the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import astuple
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import Message, PromptExample
from rlhf_lightning.evaluation.estimates import mean_estimate, mean_rate
from rlhf_lightning.evaluation.generate import Response, generate_responses
from rlhf_lightning.evaluation.kl import ResponseKL, kl_of_responses
from rlhf_lightning.evaluation.policy import Anchors, KLSummary, best_of_n, compare_policies, summarise_kl
from rlhf_lightning.evaluation.refusal import (
    BUILTIN_DETECTOR,
    RefusalChange,
    RefusalClassifier,
    RefusalSummary,
    is_refusal,
    refusal_change,
    summarise_refusals,
)
from rlhf_lightning.evaluation.results import Judged, PolicyResults, PromptRow, Side
from rlhf_lightning.evaluation.rounding import ROWS, spread
from rlhf_lightning.evaluation.session import Session, timed
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.evaluation.text_classifier import Loading
from rlhf_lightning.evaluation.toxicity import (
    ToxicityChange,
    ToxicityScorer,
    ToxicitySummary,
    summarise_lexicon,
    summarise_toxicity,
    toxicity_change,
)
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.fingerprint import weights_fingerprint
from rlhf_lightning.models.precision import float32_arithmetic
from rlhf_lightning.models.slot_engine import SlotEngine
from rlhf_lightning.rewards.scorers import Scorer
from rlhf_lightning.rewards.writers import load_frozen_policy


class Policy(NamedTuple):
    """A loaded policy, with the fingerprint of its weights."""

    model: CausalLM
    chat_format: ChatFormat
    fingerprint: str


class Answers:
    """The policies of a session; `measured` does all of it."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.settings, self.data, self.ranks = session.settings, session.data, session.ranks

    def measured(self) -> PolicyResults | None:
        """Responses of the policies to all prompts, and what reward models, detectors and classifiers say of them."""
        settings, data = self.settings, self.data
        if settings.policy is None or not (data.prompts or data.refusal):
            return None
        names: dict[Side, str] = {} if settings.reference is None else {"before": settings.reference}
        names["after"] = settings.policy
        rows, refusal_rows, kl = self._answered(names)
        judged = self._judged(rows)
        toxicity, toxicity_difference = self._toxicity(rows)
        refusal, refusal_difference = self._refusal(refusal_rows)
        sides = list(names) if rows else []
        lexicon = {}
        if data.lexicon is not None:
            for side in sides:
                found = np.array([data.lexicon(row.replies[side]) for row in rows])
                lexicon[side] = summarise_lexicon(found, lexicon=data.lexicon)
        return PolicyResults(
            names=names,
            prompts=rows,
            judged=judged,
            kl=kl,
            unended={side: mean_rate(1 - np.array([row.ended[side] for row in rows]).mean(axis=1)) for side in sides},
            refusal_prompts=refusal_rows,
            refusal=refusal,
            refusal_change=refusal_difference,
            toxicity=toxicity,
            toxicity_change=toxicity_difference,
            lexicon=lexicon,
        )

    def _answered(self, names: dict[Side, str]) -> tuple[list[PromptRow], list[PromptRow], KLSummary | None]:
        """Rows of both kinds of prompts, and the KL; the policies are let go when it returns."""
        settings, data = self.settings, self.data
        policies: dict[Side, Policy] = {}
        responses: dict[Side, list[Response]] = {}
        refusals: dict[Side, list[Response]] = {}
        refusal_prompts = [each.prompt for each in data.refusal]
        for side, name in names.items():
            model, chat_format = self.session.made(load_frozen_policy, name, **self.session.loading)
            policies[side] = Policy(model, chat_format, weights_fingerprint(model))
            self.session.fingerprints[f"policy {side}: {name}"] = policies[side].fingerprint
            responses[side] = self._sampled(side, policies[side], data.prompts, settings.samples, settings.temperature)
            refusals[side] = self._sampled(f"{side}-refusal", policies[side], refusal_prompts, 1, 0.0)
        rows = _prompt_rows(data.prompts, responses)
        kl = self._kl(policies, responses["after"], rows) if len(names) == 2 and rows else None
        return rows, _prompt_rows(refusal_prompts, refusals), kl

    def _sampled(
        self, label: str, policy: Policy, prompts: Sequence[PromptExample], samples: int, temperature: float
    ) -> list[Response]:
        if not prompts:
            return []
        with timed(f"responses {label}: {len(prompts)} x {samples}"):
            return generate_responses(
                policy.model,
                policy.chat_format,
                prompts,
                samples=samples,
                temperature=temperature,
                max_new_tokens=self.settings.max_new_tokens,
                seed=self.settings.seed,
                engine=SlotEngine(self.settings.batch_size, say_progress=self.ranks.rank == 0),
                model=policy.fingerprint,
                file=self.session.kept / f"replies-{label}-{policy.fingerprint[:16]}.jsonl",
                keep_every=4 * self.settings.batch_size,
                ranks=self.ranks,
            )

    def _kl(
        self, policies: dict[Side, Policy], responses: Sequence[Response], rows: Sequence[PromptRow]
    ) -> KLSummary | None:
        """KL of the policy after from that before, along its own responses; also into the rows."""
        settings, note = self.settings, self.session.note
        if settings.temperature != 1:
            note(f"KL: not measured, it needs responses sampled at temperature 1, not {settings.temperature:g}")
            return None
        after, before = policies["after"], policies["before"].model
        if before.config.get_text_config().vocab_size != after.model.config.get_text_config().vocab_size:
            note("KL: not measured, the policies have different vocabularies")
            return None
        along = partial(
            kl_of_responses,
            *(after.model, before, after.chat_format, self.data.prompts),
            batch_size=settings.batch_size,
        )
        fingerprints = [policies[side].fingerprint for side in ("after", "before")]
        file = self.session.kept / f"kl-{'-'.join(each[:16] for each in fingerprints)}.jsonl"
        maker = " ".join([*fingerprints, after.chat_format.fingerprint(), settings.dtype])
        ledger = Ledger(file, maker, ResponseKL, self.ranks)
        keys = [f"{response.prompt_id} {' '.join(map(str, response.ids))}" for response in responses]
        by_key = dict(zip(keys, responses, strict=True))
        with timed("KL"), float32_arithmetic(after.model, before):
            ledger.fill(
                "KL of the responses",
                sorted(by_key, key=lambda key: len(by_key[key].ids)),
                lambda part: along([by_key[key] for key in part]),
                at_a_time=4 * settings.batch_size,
            )
        found = np.array([astuple(ledger.known[key]) for key in keys], dtype=np.float64)
        if settings.dtype != "float32":
            note(
                f"KL: computed in float32 of policies with weights rounded to {settings.dtype}, in which they answered"
            )
        tokens, exact, k1 = found.reshape(len(rows), settings.samples, 3).transpose(2, 0, 1)
        for row, own in zip(rows, exact.tolist(), strict=True):
            row.kl = own
        return summarise_kl(np.maximum(exact, 0.0), k1, tokens, seed=settings.seed)  # float32 rounds below 0

    def _judged(self, rows: Sequence[PromptRow]) -> list[Judged]:
        """The policies by each reward model. The first one's rewards go into the rows."""
        found: list[Judged] = []
        for title, name, load in self.session.reward_models() if rows else ():
            with timed(f"rewards of the responses by {name}"):
                scorer = self.session.made(load)
                rewards = {side: self._rewards(scorer, rows, side) for side in rows[0].replies}
                anchors = self._anchors(scorer)
            if not self.session.sample():  # else it was measured where the scorer was judged
                own = [(prompt.prompt, text) for prompt, row in self._with(rows) for text in row.replies["after"]]
                self.session.rounding("rewards of", load, scorer, spread(own, ROWS))
            if not found:
                for place, row in enumerate(rows):
                    row.rewards = {side: of[place].tolist() for side, of in rewards.items()}
            seed, comparison = self.settings.seed, None
            if "before" in rewards:
                before, after = (np.array([row.tokens[side] for row in rows], dtype=np.float64) for side in rewards)
                both = rewards["before"], rewards["after"]
                comparison = compare_policies(*both, anchors=anchors, tokens=(before, after), seed=seed)
            curve = best_of_n(rewards.get("before", rewards["after"]), seed=seed)
            mean = mean_estimate(rewards["after"].mean(axis=1), seed=seed)
            found.append(Judged(name, title == "held-out", comparison, mean, curve))
        return found

    def _rewards(self, scorer: Scorer, rows: Sequence[PromptRow], side: Side) -> np.ndarray:
        asked = [
            (prompt.prompt, text, ended)
            for prompt, row in self._with(rows)
            for text, ended in zip(row.replies[side], row.ended[side], strict=True)
        ]
        return np.array(self._scores(scorer, asked), dtype=np.float64).reshape(len(rows), -1)

    def _scores(self, scorer: Scorer, rows: Sequence[tuple[Sequence[Message], str, bool]]) -> list[float]:
        """Of prompts and responses, in their order, with whether they have ended."""
        return [each.score for each in self.ranks.each(rows, lambda own: scorer(*zip(*own, strict=True)))]

    def _anchors(self, scorer: Scorer) -> Anchors | None:
        """None where some prompts lack pairs."""
        pairs = [self.data.anchors.get(prompt.example_id, []) for prompt in self.data.prompts]
        if not all(pairs):
            return None

        def means(side: str) -> np.ndarray:
            asked = [(prompt.prompt, getattr(pair, side), True) for prompt, own in self._with(pairs) for pair in own]
            scores = iter(self._scores(scorer, asked))
            return np.array([np.mean([next(scores) for _ in own]) for own in pairs])

        return Anchors(means("chosen"), means("rejected"))

    def _with(self, others: Sequence[Any]) -> zip[tuple[PromptExample, Any]]:
        return zip(self.data.prompts, others, strict=True)

    @property
    def _classifying(self) -> Loading:
        settings = self.settings
        return {
            "batch_size": settings.batch_size,
            "device": self.ranks.device,
            "trust_remote_code": settings.trust_remote_code,
        }

    def _toxicity(self, rows: Sequence[PromptRow]) -> tuple[dict[Side, ToxicitySummary], ToxicityChange | None]:
        settings, scores = self.settings, dict[Side, np.ndarray]()
        if settings.toxicity_model is None or not rows:
            return {}, None
        labels = settings.toxic_labels or None
        scorer = self.session.made(ToxicityScorer, settings.toxicity_model, toxic_labels=labels, **self._classifying)
        for side in rows[0].replies:
            with timed(f"toxicity {side}"):
                flat = self.ranks.each([text for row in rows for text in row.replies[side]], scorer)
            scores[side] = np.array(flat, dtype=np.float64).reshape(len(rows), -1)
            for row, own in zip(rows, scores[side].tolist(), strict=True):
                row.toxicity[side] = [None if math.isnan(score) else score for score in own]
        summaries = {
            side: summarise_toxicity(of, method=scorer.method, seed=settings.seed) for side, of in scores.items()
        }
        if "before" not in scores:
            return summaries, None
        return summaries, toxicity_change(scores["before"], scores["after"], seed=settings.seed)

    def _refusal(self, rows: Sequence[PromptRow]) -> tuple[dict[Side, RefusalSummary], RefusalChange | None]:
        settings, method = self.settings, BUILTIN_DETECTOR
        if not rows:
            return {}, None
        classify: Callable[[Sequence[tuple[str, str]]], Sequence[bool | None]] | None = None
        if settings.refusal_classifier is not None:
            label = settings.refusal_label
            classifier = self.session.made(
                RefusalClassifier, settings.refusal_classifier, refusal_label=label, **self._classifying
            )
            classify, method = classifier.refuses, classifier.method
        safety, refused = [each.safety for each in self.data.refusal], dict[Side, np.ndarray]()
        for row, kind in zip(rows, safety, strict=True):
            row.safety = kind
        for side in rows[0].replies:
            asked = [(row.prompt, row.replies[side][0]) for row in rows]
            found = [None] * len(rows) if classify is None else self.ranks.each(asked, classify)
            if classify is not None and (failed := found.count(None)):
                self.session.note(
                    f"refusal {side}: {failed} responses were not classified; the built-in detector decided"
                )
            for row, (_, text), each in zip(rows, asked, found, strict=True):
                row.refused[side] = is_refusal(text) if each is None else each
            refused[side] = np.array([row.refused[side] for row in rows])[:, None]
        summaries = {side: summarise_refusals(of, safety, method=method) for side, of in refused.items()}
        if "before" not in refused:
            return summaries, None
        return summaries, refusal_change(refused["before"], refused["after"], safety, seed=settings.seed)


def _prompt_rows(prompts: Sequence[PromptExample], responses: dict[Side, list[Response]]) -> list[PromptRow]:
    """The responses of each side, which has as many to each prompt, by prompt."""
    rows = []
    for place, prompt in enumerate(prompts):
        ends = {side: [each * len(of) // len(prompts) for each in (place, place + 1)] for side, of in responses.items()}
        own = {side: of[slice(*ends[side])] for side, of in responses.items()}
        rows.append(
            PromptRow(
                prompt.example_id,
                "\n\n".join(prompt.texts),
                {side: [each.text for each in few] for side, few in own.items()},
                {side: [each.tokens for each in few] for side, few in own.items()},
                {side: [each.ended for each in few] for side, few in own.items()},
            )
        )
    return rows
