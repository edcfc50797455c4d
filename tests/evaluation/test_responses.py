"""Replies to prompts: the same for any batch, and after a kill; and the exact KL along them."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import PromptExample
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.errors import ConfigurationError, DataError
from rlhf_lightning.evaluation import kl as module
from rlhf_lightning.evaluation.generate import generate_responses
from rlhf_lightning.evaluation.kl import kl_of_responses
from rlhf_lightning.models.causal_lm import CausalLM
from rlhf_lightning.models.generation import TransformersEngine
from rlhf_lightning.tiny import builtin_texts, make_tiny_model
from tests.evaluation.kept import kept_entries

TEXTS = [
    "Hello?",
    "Where is the station, please? I have been looking for it all the morning.",
    "How do I polish shoes?",
    "Good evening",
    "Which of the two pans shall I take for the pancakes?",
]
PROMPTS = [
    PromptExample([{"role": "user", "content": text}], example_id=f"p{i}", origin=f"prompts, row {i}")
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def policy(tiny_qwen2):
    return CausalLM.from_pretrained(str(tiny_qwen2))


@pytest.fixture(scope="module")
def chat_format(tiny_qwen2):
    return ChatFormat(load_tokenizer(str(tiny_qwen2)))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A model like `policy` with other weights."""
    directory = tmp_path_factory.mktemp("models") / "other"
    return CausalLM.from_pretrained(str(make_tiny_model(directory, builtin_texts(), initializer_range=0.2, seed=1)))


@pytest.fixture
def draw(policy, chat_format):
    """`generate_responses` with settings that a test may change."""

    def draw(prompts=PROMPTS, *, batch_size=64, engine=None, **changed):
        settings = {"samples": 2, "temperature": 1.0, "max_new_tokens": 12, "seed": 3, "model": "tiny", **changed}
        engine = engine or StoppingEngine(batch_size=batch_size)
        return generate_responses(policy, chat_format, prompts, engine=engine, **settings)

    return draw


class Killed(Exception):
    pass


class StoppingEngine(TransformersEngine):
    """Draws so many times, and counts the replies."""

    def __init__(self, times=10**9, *, batch_size=64):
        super().__init__(batch_size)
        self.times, self.drawn = times, 0

    def draw(self, policy, prompts, seeds, **options):
        if self.times == 0:
            raise Killed
        self.times -= 1
        self.drawn += len(prompts)
        return super().draw(policy, prompts, seeds, **options)


def test_replies_stand_in_the_order_of_prompts_and_samples_and_say_how_they_ended(draw, chat_format):
    replies = draw(max_new_tokens=40, samples=3)
    assert [(reply.prompt_id, reply.sample) for reply in replies] == [(f"p{i}", k) for i in range(5) for k in range(3)]
    for reply in replies:
        assert reply.tokens == len(reply.ids) <= 40
        assert reply.ended == (reply.ids[-1] == chat_format.eos_id)
        assert reply.ended or reply.tokens == 40
        assert "<|im_end|>" not in reply.text
    assert len({reply.text for reply in replies}) == 15


def test_replies_depend_neither_on_the_batch_nor_on_the_other_prompts(draw):
    whole = draw()
    assert draw(batch_size=1) == draw(batch_size=3) == whole
    assert draw(PROMPTS[2:3]) == whole[4:6]
    assert draw(samples=1) == whole[::2]
    assert draw(seed=4) != whole


def test_temperature_zero_takes_the_most_likely_token_of_a_plain_forward_pass(draw, policy, chat_format, tiny_qwen2):
    (reply,) = draw(PROMPTS[1:2], samples=1, temperature=0.0, max_new_tokens=6)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2).eval()
    ids = chat_format.encode_prompts([chat_format.prompt_text(PROMPTS[1].prompt)])[0]
    expected = []
    for _ in range(6):
        expected.append(model(torch.tensor([[*ids, *expected]])).logits[0, -1].argmax().item())
    assert list(reply.ids) == expected[: reply.tokens]
    assert reply.text == chat_format.tokenizer.decode(expected[: reply.tokens])


def test_a_killed_run_goes_on_and_ends_like_an_unbroken_one(draw, tmp_path):
    file = tmp_path / "deep" / "replies.jsonl"
    engine = StoppingEngine(2)
    with pytest.raises(Killed):
        draw(engine=engine, file=file, keep_every=3)
    kept = file.read_bytes()
    assert (len(kept_entries(file)), engine.drawn) == (6, 6)
    file.write_bytes(kept + b'{"crc32": "1234')
    engine = StoppingEngine()
    replies = draw(engine=engine, file=file, keep_every=3)
    assert engine.drawn == 4
    assert replies == draw()
    assert file.read_bytes().startswith(kept)
    rows = [(entry["prompt_id"], entry["sample"]) for _, entry in kept_entries(file)]
    assert sorted(rows) == [(f"p{i}", k) for i in range(5) for k in (0, 1)]
    assert draw(engine=StoppingEngine(0), file=file) == replies


def test_a_line_that_stands_twice_counts_once(draw, tmp_path):
    file = tmp_path / "replies.jsonl"
    replies = draw(file=file)
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join([*lines, *lines]), encoding="utf-8")
    assert draw(engine=StoppingEngine(0), file=file) == replies


def test_more_samples_and_more_prompts_are_added_to_the_file(draw, tmp_path):
    file = tmp_path / "replies.jsonl"
    draw(PROMPTS[:3], samples=1, file=file)
    engine = StoppingEngine()
    assert draw(engine=engine, file=file, keep_every=3) == draw()
    assert engine.drawn == 10 - 3


@pytest.mark.parametrize(
    "changed", [{"model": "other"}, {"temperature": 0.7}, {"max_new_tokens": 11}, {"seed": 4}], ids=str
)
def test_other_settings_draw_others_and_keep_both(draw, tmp_path, changed):
    file = tmp_path / "replies.jsonl"
    before = draw(file=file)
    engine = StoppingEngine()
    draw(engine=engine, file=file, **changed)
    assert engine.drawn == 10
    assert draw(engine=StoppingEngine(0), file=file, **changed) == draw(**changed)
    assert draw(engine=StoppingEngine(0), file=file) == before


def test_a_response_to_other_words_under_the_same_id_is_drawn_again(draw, tmp_path):
    file = tmp_path / "replies.jsonl"
    draw(file=file)
    changed = [PromptExample([{"role": "user", "content": "Good morning"}], "p0", "here"), *PROMPTS[1:]]
    engine = StoppingEngine()
    assert draw(changed, engine=engine, file=file) == draw(changed)
    assert engine.drawn == 2
    assert draw(changed, engine=StoppingEngine(0), file=file) == draw(changed)


@pytest.mark.parametrize("content", ["a letter to my aunt\n", "no line end", '{"prompt": "Hello?"}\n'])
def test_a_file_of_something_else_is_not_replaced(draw, tmp_path, content):
    file = tmp_path / "letter.txt"
    file.write_text(content)
    with pytest.raises(DataError, match=r"letter\.txt: not written by an evaluation"):
        draw(file=file)
    assert file.read_text() == content


def test_a_file_killed_within_its_first_line_begins_anew(draw, tmp_path):
    file = tmp_path / "replies.jsonl"
    draw(PROMPTS[:1], file=file)
    whole = file.read_bytes()
    for length in (3, 30):
        file.write_bytes(whole[:length])
        assert draw(PROMPTS[:1], file=file) == draw(PROMPTS[:1])
        assert file.read_bytes() == whole


def test_impossible_settings_and_prompts_are_refused_in_one_line(draw):
    with pytest.raises(ConfigurationError, match=r"prompts, row 1: duplicate id 'p1'"):
        draw([*PROMPTS, PROMPTS[1]])
    with pytest.raises(ConfigurationError, match=r"prompts, row 0: .* more than the 2048 positions"):
        draw(max_new_tokens=2047)
    control = PromptExample([{"role": "user", "content": "Say <|im_end|>"}], "c", "prompts, row 9")
    with pytest.raises(DataError, match=r"prompts, row 9: the prompt holds the control token '<\|im_end\|>'"):
        draw([control])


def slow_kl(policy, other, chat_format, reply):
    """Exact KL and k1 of one reply, token by token, from the models' own logits."""
    prompt = next(p for p in PROMPTS if p.example_id == reply.prompt_id)
    ids = chat_format.encode_prompts([chat_format.prompt_text(prompt.prompt)])[0]
    exact = k1 = 0.0
    for place, token in enumerate(reply.ids):
        row = torch.tensor([[*ids, *reply.ids[:place]]])
        p, q = (m.model(input_ids=row).logits[0, -1].softmax(-1).tolist() for m in (policy, other))
        exact += sum(one * (math.log(one) - math.log(its)) for one, its in zip(p, q, strict=True))
        k1 += math.log(p[token]) - math.log(q[token])
    return exact, k1


@pytest.fixture
def float64(policy, other):
    """Both models in float64, for a test."""
    policy.double(), other.double()
    yield policy.eval(), other.eval()
    policy.float(), other.float()


def test_exact_kl_and_k1_are_those_of_a_loop_over_tokens_and_vocabulary(draw, float64, chat_format):
    policy, other = float64
    replies = draw(PROMPTS[:2], max_new_tokens=3)
    for found, reply in zip(kl_of_responses(policy, other, chat_format, PROMPTS, replies), replies, strict=True):
        assert found.tokens == reply.tokens
        with torch.no_grad():
            assert (found.exact, found.k1) == pytest.approx(slow_kl(policy, other, chat_format, reply), abs=1e-12)
        assert found.exact > 1


def test_any_batch_size_and_chunk_give_the_same_kl(draw, float64, chat_format, monkeypatch):
    policy, other = float64
    replies = [
        dataclasses.replace(reply, ids=reply.ids[: 1 + 7 * i % 20]) for i, reply in enumerate(draw(max_new_tokens=20))
    ]
    assert len({len(reply.ids) for reply in replies}) > 5

    def numbers(batch_size):
        found = kl_of_responses(policy, other, chat_format, PROMPTS, replies, batch_size=batch_size)
        return [number for each in found for number in (each.exact, each.k1)]

    whole = numbers(10)
    assert numbers(1) == pytest.approx(whole, abs=1e-10)
    assert numbers(3) == pytest.approx(whole, abs=1e-10)
    monkeypatch.setattr(module, "_CHUNK", 7)
    assert numbers(4) == pytest.approx(whole, abs=1e-10)


def test_in_float32_the_kl_is_that_of_float64_to_a_thousandth(draw, policy, other, chat_format):
    replies = draw()
    low = [each.exact for each in kl_of_responses(policy, other, chat_format, PROMPTS, replies)]
    policy.double(), other.double()
    high = [each.exact for each in kl_of_responses(policy, other, chat_format, PROMPTS, replies)]
    policy.float(), other.float().requires_grad_(True)
    assert low == pytest.approx(high, rel=1e-3)


def test_the_kl_of_a_policy_from_itself_is_zero(draw, policy, chat_format):
    replies = draw()
    for each in kl_of_responses(policy, policy, chat_format, PROMPTS, replies):
        assert (each.exact, each.k1) == (0, 0)


def test_the_mean_of_k1_over_many_replies_is_that_of_the_exact_kl(draw, policy, other, chat_format):
    replies = draw(PROMPTS[:1], samples=400, max_new_tokens=2)
    found = kl_of_responses(policy, other, chat_format, PROMPTS, replies, batch_size=100)
    exact, k1 = (torch.tensor([getattr(each, name) for each in found]) for name in ("exact", "k1"))
    error = (k1 - exact).std() / len(found) ** 0.5
    assert abs((k1 - exact).mean()) < 3 * error
    assert k1.std() > exact.std()
