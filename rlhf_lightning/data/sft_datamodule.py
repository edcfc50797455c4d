"""From sources to batches of conversations, for SFT."""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np

from rlhf_lightning.batches import SFTBatch
from rlhf_lightning.data.batching import MicroBatch, collate_conversations
from rlhf_lightning.data.datamodules import ResponseDataModule
from rlhf_lightning.data.roles import Role
from rlhf_lightning.data.selection import TokenizedConversations
from rlhf_lightning.data.statistics import duplicates


class SFTDataModule(ResponseDataModule[TokenizedConversations]):
    """Conversations as right-padded `SFTBatch`es: prompts with a response, messages, or the chosen side of pairs.

    What is learned is the response of a prompt, or every assistant turn of `messages`, each with its EOS.
    """

    rows_class = TokenizedConversations

    def _collate(self, role: Role) -> Callable[[MicroBatch], SFTBatch]:
        return functools.partial(collate_conversations, conversations=self.rows[role], pad_id=self._format().pad_id)

    def _statistics(self, leak: str) -> str:
        rows = self.rows["train"]
        return (
            f"conversations: {rows.lengths.min()} to {rows.lengths.max()} tokens in train, median "
            f"{int(np.median(rows.lengths))}; {len(duplicates(rows))} duplicates; {leak}; more from "
            "`rlhf-lightning doctor`"
        )
