"""Rows -> validated examples -> tokens -> batches."""

from rlhf_lightning.data.examples import (
    BAD_ROW_REASONS,
    LabelledExample,
    LoadReport,
    PreferenceExample,
    PromptExample,
    SFTExample,
)
from rlhf_lightning.data.preferences import load_preferences
from rlhf_lightning.data.prompts import load_prompts
from rlhf_lightning.data.sft import load_sft
from rlhf_lightning.data.unpaired import load_unpaired
from rlhf_lightning.errors import DataError

__all__ = [
    "BAD_ROW_REASONS",
    "DataError",
    "LabelledExample",
    "LoadReport",
    "PreferenceExample",
    "PromptExample",
    "SFTExample",
    "load_preferences",
    "load_prompts",
    "load_sft",
    "load_unpaired",
]
