"""One evaluation under way: where its models compute, what it keeps, and what it has to say about it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from rlhf_lightning.evaluation.inputs import Inputs
from rlhf_lightning.evaluation.ranks import Ranks
from rlhf_lightning.evaluation.rounding import ROWS, Rounding, Row, measured_rounding, spread
from rlhf_lightning.evaluation.settings import EvaluationSettings
from rlhf_lightning.rewards.functions import FunctionScorer
from rlhf_lightning.rewards.scorers import Scorer
from rlhf_lightning.rewards.source import reward_list
from rlhf_lightning.rewards.weighted import scorer_of
from rlhf_lightning.user_code import name_of

log = logging.getLogger(__name__)

Made = TypeVar("Made")


class RewardModel(NamedTuple):
    """A reward model of the settings: `title` is `reward model` or `held-out`, `load` takes what it overrides."""

    title: str
    name: str
    load: Callable[..., Scorer]


class Session:
    """One evaluation: where its models compute, what it keeps, and what it has to say about it."""

    def __init__(self, settings: EvaluationSettings, data: Inputs, ranks: Ranks) -> None:
        self.settings, self.data, self.ranks = settings, data, ranks
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.notes: list[str] = []
        self.fingerprints: dict[str, str] = {}
        self.kept = Path(settings.out) / "kept"
        self.kept.mkdir(parents=True, exist_ok=True)

    @property
    def loading(self) -> dict[str, Any]:
        """How language and reward models are loaded."""
        settings = self.settings
        return {"device": self.ranks.device, "dtype": self.dtype, "trust_remote_code": settings.trust_remote_code}

    @property
    def scoring(self) -> dict[str, Any]:
        """How scorers are loaded."""
        return {"batch_size": self.settings.batch_size, "max_length": self.settings.max_length, **self.loading}

    def reward_models(self) -> Iterator[RewardModel]:
        """Those of the settings."""
        settings = self.settings
        for title, given, template in (
            ("reward model", settings.reward_model, settings.reward_chat_template),
            ("held-out", settings.held_out_reward_model, settings.held_out_reward_chat_template),
        ):
            if given is not None:
                name = " + ".join(name_of(reward.source) for reward in reward_list(given))
                yield RewardModel(title, name, partial(scorer_of, given, chat_template=template, **self.scoring))

    def made(self, make: Callable[..., Made], *arguments: Any, **named: Any) -> Made:
        """A model, loaded in every process; when one cannot, all of them stop."""
        made: list[Made] = []
        self.ranks.everywhere(lambda: made.append(make(*arguments, **named)))
        return made[0]

    def note(self, sentence: str) -> None:
        """Something that a reader must not miss; said once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def rounding(self, title: str, make: Callable[..., Scorer], scorer: Scorer, rows: Sequence[Row]) -> Rounding | None:
        """The error of the scores of a model in half precision, which a note says; None in float32."""
        dtype = self.settings.dtype
        if dtype == "float32" or not rows or isinstance(scorer, FunctionScorer):
            return None
        with timed(f"{title}: the error of {dtype}"):
            found = self.made(partial(measured_rounding, make, scorer, rows, dtype=dtype))
        self.notes.append(found.sentence(f"{title} {scorer.name}"))
        return found

    def sample(self) -> list[Row]:
        """Rows of all that is scored, in pairs: of the pairs, or else of a benchmark."""
        pairs: list[tuple[Any, Sequence[str]]] = [
            (pair.prompt, (pair.chosen, pair.rejected)) for pair in self.data.pairs
        ]
        for benchmark, rows in self.data.rows.items():
            if not pairs and benchmark.taken_by == "scorer":
                pairs = [(row.prompt, row.responses) for row in rows]
        return [(prompt, text) for prompt, texts in spread(pairs, ROWS // 2) for text in texts[:2]]


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Log how long it took."""
    began = time.perf_counter()
    yield
    log.info("%s: %.1f s", what, time.perf_counter() - began)
