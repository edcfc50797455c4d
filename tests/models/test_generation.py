"""Drawn replies: from the right distribution, the same in any company, and by nobody else's settings."""

from __future__ import annotations

import pytest
import torch

from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.generation import TransformersEngine, nucleus, seed_of
from rlhf_lightning.models.slot_engine import greedy_responses

END, PAD = 2, 0
PROMPTS = [torch.tensor(ids) for ids in ([5, 9, 11], [7], [8, 8, 6, 20, 31], [12, 13])]


@pytest.fixture(scope="module")
def policy(tiny_qwen2):
    return CausalLM.from_pretrained(str(tiny_qwen2))


def drawn(policy, prompts, seeds, *, batch_size=64, temperature=1.0, top_p=1.0, new=6, eos=END):
    engine = TransformersEngine(batch_size)
    options = {"top_p": top_p, "max_new_tokens": new, "temperature": temperature, "eos_id": eos, "pad_id": PAD}
    return [reply.ids.tolist() for reply in engine.draw(policy, prompts, seeds, **options)]


@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.6}, {"top_p": 0.8}], ids=str)
def test_a_reply_does_not_depend_on_its_batch(policy, how):
    seeds = [seed_of("a", i) for i in range(4)]
    together = drawn(policy, PROMPTS, seeds, **how)
    alone = [drawn(policy, [p], [s], **how)[0] for p, s in zip(PROMPTS, seeds, strict=True)]
    assert together == alone == drawn(policy, PROMPTS, seeds, batch_size=3, **how)
    assert drawn(policy, PROMPTS, seeds[::-1], **how) != together


@torch.no_grad()
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_first_tokens_are_drawn_from_the_softmax_at_the_temperature(policy, temperature):
    count = 4000
    replies = drawn(policy, [PROMPTS[0]] * count, list(range(count)), batch_size=500, temperature=temperature, new=1)
    logits = policy.model(input_ids=PROMPTS[0][None]).logits[0, -1]
    expected = torch.softmax(logits / temperature, dim=-1)
    seen = torch.bincount(torch.tensor(replies).flatten(), minlength=len(expected)) / count
    error = (expected * (1 - expected) / count).sqrt()
    likely = expected > 0.005
    assert likely.sum() >= 5
    assert ((seen - expected)[likely].abs() < 4.5 * error[likely]).all()


@torch.no_grad()
@pytest.mark.parametrize("top_p", [0.3, 0.9])
def test_with_top_p_first_tokens_are_drawn_from_the_most_likely_ones_alone(policy, top_p):
    count = 4000
    replies = drawn(policy, [PROMPTS[0]] * count, list(range(count)), batch_size=500, top_p=top_p, new=1)
    shares = torch.softmax(policy.model(input_ids=PROMPTS[0][None]).logits[0, -1].double(), dim=-1).tolist()
    kept, mass = [], 0.0
    for token in sorted(range(len(shares)), key=lambda token: -shares[token]):
        if mass >= top_p:
            break
        kept.append(token)
        mass += shares[token]
    seen = torch.bincount(torch.tensor(replies).flatten(), minlength=len(shares)) / count
    assert 1 < len(kept) < len(shares)
    assert seen[kept].sum() == pytest.approx(1)
    expected = torch.tensor(shares)[kept] / mass
    assert ((seen[kept] - expected).abs() < 4.5 * (expected * (1 - expected) / count).sqrt() + 1e-3).all()


def test_the_nucleus_is_the_fewest_tokens_that_reach_the_share():
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]]).log()
    left = [[place for place, score in enumerate(row) if score > -torch.inf] for row in nucleus(scores, 0.7).tolist()]
    assert left == [[0, 1], [0, 2]], "of equal ones the first"
    assert (nucleus(scores, 1e-9) > -torch.inf).sum(dim=1).tolist() == [1, 1]


def test_a_reply_ends_with_the_first_terminator_or_is_as_long_as_it_may_be(policy):
    first = drawn(policy, PROMPTS, [3] * 4, new=8)
    eos = first[0][2]
    again = drawn(policy, PROMPTS, [3] * 4, new=8, eos=eos)
    assert again[0] == first[0][: first[0].index(eos) + 1]
    assert all(eos not in reply[:-1] for reply in again)
    assert all(len(reply) == 8 or reply[-1] == eos for reply in again)


def test_settings_of_the_model_s_own_do_not_reach_the_drawing_and_stay_as_they_were(policy):
    seeds = [1, 2, 3, 4]
    before = drawn(policy, PROMPTS, seeds), [r.tolist() for r in greedy(policy)]
    own = policy.model.generation_config
    own.repetition_penalty, own.top_k, own.no_repeat_ngram_size = 30.0, 1, 1
    try:
        assert (drawn(policy, PROMPTS, seeds), [r.tolist() for r in greedy(policy)]) == before
        assert policy.model.generation_config is own
    finally:
        own.repetition_penalty, own.top_k, own.no_repeat_ngram_size = 1.0, 50, 0
    assert policy.training, "the mode is as it was"


def greedy(policy):
    return greedy_responses(policy, PROMPTS, max_new_tokens=6, eos_id=END, pad_id=PAD)


def test_temperature_0_takes_the_most_likely_token(policy):
    assert drawn(policy, PROMPTS, [1, 2, 3, 4], temperature=0.0) == [reply.tolist() for reply in greedy(policy)]
