"""Marks of the tests that need a CUDA device, and models of the true shapes with random weights, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

MARKS = (
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    # What CUDA, Triton and DeepSpeed's kernels warn of is known for no machine; elsewhere in the suite it is an error.
    pytest.mark.filterwarnings("default"),
    pytest.mark.timeout(3600),  # 16 GB of weights are written first, and kernels compiled
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            for mark in MARKS:
                item.add_marker(mark)


QWEN2_HALF_BILLION = {
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="session")
def qwen2_half_billion(tmp_path_factory):
    """Qwen2-0.5B's shape as a causal language model, and a tokenizer whose ids all fit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    from rlhf_lightning.tiny import resolve_model

    directory = tmp_path_factory.mktemp("qwen2")
    AutoTokenizer.from_pretrained(resolve_model("builtin:tiny")).save_pretrained(directory)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen2Config(**QWEN2_HALF_BILLION), dtype=torch.float32)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def llama_8b(tmp_path_factory):
    """Llama-3-8B's shape in bfloat16, written layer by layer: 16 GB on the disk; and a tokenizer whose ids all fit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from rlhf_lightning.tiny import resolve_model
    from tests.training.test_planning import LLAMA_3_8B

    directory = tmp_path_factory.mktemp("llama")
    AutoTokenizer.from_pretrained(resolve_model("builtin:tiny")).save_pretrained(directory)
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA_3_8B), dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size="4GB")
    del model
    torch.cuda.empty_cache()
    return directory
