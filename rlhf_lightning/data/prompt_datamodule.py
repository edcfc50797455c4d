"""From sources to batches of prompts, for PPO and its relatives."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jsonargparse.typing import PositiveInt

from rlhf_lightning.data.batching import MicroBatch, collate_prompts
from rlhf_lightning.data.datamodules import DataModule
from rlhf_lightning.data.examples import LoadReport, Message
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.selection import TokenizedPrompts, Truncation
from rlhf_lightning.data.sources import Source
from rlhf_lightning.data.tokenizer import TokenizerSource


class PromptDataModule(DataModule[TokenizedPrompts]):
    """Prompts as `PromptBatch`es of ragged ids; preference data serves as well, by its prompts.

    Args:
        max_prompt_length: Longest prompt in tokens, up to where the assistant's response begins.
        truncation: For prompts over max_prompt_length. `drop` leaves them out and counts them; `left` truncates them
            from the left, after the template's head, for policy and reward model alike; `error` refuses the source.
        unique: Take each prompt once, however often it occurs in a role's sources; prompts that differ only in case,
            blanks or Unicode forms are the same.
    """

    rows_class = TokenizedPrompts

    def __init__(
        self,
        train: Source,
        val: Source | None = None,
        test: Source | None = None,
        tokenizer: TokenizerSource | None = None,
        max_prompt_length: PositiveInt = 512,
        truncation: Truncation = "drop",
        unique: bool = True,
        **kwargs: Any,
    ) -> None:
        # Nothing is grouped by length: nothing is padded, and a process with all the long prompts would see other
        # rewards than the rest.
        super().__init__(train, val, test, tokenizer, **kwargs)
        self.max_prompt_length = max_prompt_length
        self.truncation = truncation
        self.unique = unique

    @property
    def prompts(self) -> dict[Role, TokenizedPrompts]:
        """Tokenized prompts by role, once `setup` has run."""
        return self.rows

    def messages(self, role: Role, index: int) -> list[Message]:
        """The conversation of a prompt, by its position in the role; where its ids were cut, what is left of it.

        A reward model with another tokenizer renders it, and the response after it, in its own way: it reads what the
        policy read.
        """
        return self.rows[role].messages_as_cut(index, self._format())

    def example_ids(self, role: Role) -> list[str]:
        """The id of each prompt of a role: the row's own, or `file:row`."""
        return self.rows[role].example_ids

    def _select(self, role: Role) -> tuple[TokenizedPrompts, LoadReport]:
        prompts, report = self._fitting(role, max_length=self.max_prompt_length, truncation=self.truncation)
        if self.unique:
            prompts, report.rows_repeated = prompts.once()
        return prompts, report

    def _collate(self, role: Role) -> Callable[[MicroBatch], NamedTuple]:
        return functools.partial(collate_prompts, prompts=self.rows[role])

    def _statistics(self, leak: str) -> str:
        lengths = self.rows["train"].lengths
        return f"prompts: {lengths.min()} to {lengths.max()} tokens in train, median {int(np.median(lengths))}; {leak}"
