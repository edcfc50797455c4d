"""What must hold of every training row, said as statements: masks, padding, start and end tokens, cuts, splits.

They are asked of every tokenizer in `chat_formats`: with pad equal to EOS, without pad, without BOS, with a BOS that
template and tokenizer both write, encoders, plain text.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
import string
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data import DataError, load_preferences
from rlhf_lightning.data.batching import MicroBatch, collate_pairs
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.datamodules import PreferenceDataModule
from rlhf_lightning.data.examples import LoadReport, PreferenceExample
from rlhf_lightning.data.selection import TokenizedPairs
from rlhf_lightning.data.tokenized import TokenStore, write_store
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.models.reward_network import RewardNetwork
from tests.data.chat_formats import CHATML, FORMATS, byte_tokenizer
from tests.data.test_loader import tokenized

TALK = [
    {"role": "user", "content": "Is it far?"},
    {"role": "assistant", "content": "Two hours on foot."},
    {"role": "user", "content": "And by boat?"},
]


def pair(prompt="Is it far?", chosen="Not far at all.", rejected="Far!", row=0):
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return PreferenceExample(messages, chosen, rejected, None, f"id-{row}", f"row {row}")


def stored(chat_format, examples):
    with tempfile.TemporaryDirectory() as directory:  # the mapped file outlives its name
        write_store(Path(directory), examples, LoadReport("rows", len(examples)), chat_format)
        return TokenStore(directory)


def selected(chat_format, examples, *, max_length=1000, **options):
    store = stored(chat_format, examples)
    return TokenizedPairs.fitting([store], [np.ones(len(store), dtype=bool)], max_length=max_length, **options)


def batch_of(pairs, pad_id):
    return collate_pairs(MicroBatch(np.arange(len(pairs)), 1.0), pairs, pad_id=pad_id)


@pytest.fixture(params=FORMATS.values(), ids=FORMATS.keys())
def chat_format(request):
    return request.param.chat_format


# C1
def test_the_terminator_of_every_response_is_in_both_masks_also_where_it_is_the_padding(chat_format):
    pairs, _ = selected(chat_format, [pair(), pair("Why?", "Because it rains.", "So.", row=1)])
    for pad_id in (chat_format.pad_id, chat_format.eos_id):
        batch = batch_of(pairs, pad_id)
        last = batch.attention_mask.sum(1) - 1
        rows = torch.arange(len(last))
        assert (batch.input_ids[rows, last] == chat_format.eos_id).all()
        assert batch.response_mask[rows, last].all()


# C2
segment = st.lists(st.integers(0, 3), min_size=1, max_size=6)


@settings(max_examples=100)
@given(st.lists(st.tuples(segment, segment, segment), min_size=1, max_size=4), st.data())
def test_padding_ids_inside_a_text_change_no_mask(rows, data):
    def masks(change):
        batch = batch_of(tokenized([tuple([change(i) for i in ids] for ids in row) for row in rows]), pad_id=0)
        return batch.attention_mask, batch.response_mask

    replaced = data.draw(st.sets(st.integers(0, 3)))
    for ours, theirs in zip(masks(lambda i: 0 if i in replaced else i), masks(lambda i: 9), strict=True):
        assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def networks(tiny_qwen2, tiny_llama, tiny_bert):
    """Reward networks with loud weights, and how each writes a conversation."""
    made = {}
    for name, directory in (("qwen2", tiny_qwen2), ("llama", tiny_llama), ("bert", tiny_bert)):
        torch.manual_seed(0)
        network = RewardNetwork.from_backbone(str(directory)).eval()
        made[name] = network, ChatFormat(load_tokenizer(str(directory)))
    return made


@pytest.fixture(params=["qwen2", "llama", "bert"])
def network_and_format(request, networks):
    return networks[request.param]


@torch.no_grad()
def score(network, ids, *, left=0, right=0, pad=0):
    """The score of one row with so much padding at its sides."""
    mask = torch.tensor([[False] * left + [True] * len(ids) + [False] * right])
    return network(torch.tensor([[pad] * left + list(ids) + [pad] * right]), mask).item()


def row_of(chat_format, **changes):
    prompt, chosen, _ = selected(chat_format, [pair(**changes)])[0].segments(0)
    return [*prompt.tolist(), *chosen.tolist()]


close = functools.partial(pytest.approx, abs=1e-5)


# C3
@pytest.mark.parametrize("pad", ["its own", "the eos", "another token"])
@pytest.mark.parametrize(("left", "right"), [(0, 1), (0, 17), (1, 0), (17, 0), (5, 3)])
def test_a_score_is_the_same_for_any_padding_on_either_side(network_and_format, left, right, pad):
    network, chat_format = network_and_format
    ids = row_of(chat_format)
    pad_id = {"its own": chat_format.pad_id, "the eos": chat_format.eos_id, "another token": 42}[pad]
    assert score(network, ids, left=left, right=right, pad=pad_id) == close(score(network, ids))


def test_a_score_is_the_same_alone_and_among_longer_rows(network_and_format):
    network, chat_format = network_and_format
    examples = [pair(), pair("Why? " * 9, "It rains. " * 9, "So."), pair(TALK, "Yes", "Perhaps it is, in spring.")]
    pairs, _ = selected(chat_format, examples)
    batch = batch_of(pairs, chat_format.pad_id)
    with torch.no_grad():
        together = network(batch.input_ids, batch.attention_mask).view(2, 3).T.tolist()
    for index, scores in enumerate(together):
        prompt, *sides = pairs.segments(index)
        assert scores == [close(score(network, [*prompt.tolist(), *side.tolist()])) for side in sides]
    assert len({round(number, 3) for scores in together for number in scores}) == 6  # loud weights tell rows apart


# C4
def test_a_terminator_more_or_less_changes_the_score_and_padding_does_not(network_and_format):
    network, chat_format = network_and_format
    ids, end = row_of(chat_format), chat_format.eos_id
    whole = score(network, ids)
    assert abs(score(network, ids[:-1]) - whole) > 1e-3
    assert abs(score(network, [*ids, end]) - whole) > 1e-3
    for more in (1, 2, 30):
        assert score(network, ids, right=more, pad=end) == close(whole)
        assert score(network, ids[:-1], right=more, pad=end) == close(score(network, ids[:-1]))


# C5
def test_the_score_is_read_off_the_last_token_whatever_ids_the_prompt_holds(network_and_format):
    network, chat_format = network_and_format
    prompt, chosen, _ = (ids.tolist() for ids in selected(chat_format, [pair()])[0].segments(0))
    for special in (chat_format.eos_id, chat_format.pad_id):
        for place in (1, len(prompt) // 2, len(prompt)):
            ids = [*prompt[:place], special, special, *prompt[place:], *chosen]
            with torch.no_grad():
                mask = torch.ones(1, len(ids), dtype=torch.bool)
                hidden = network.backbone(torch.tensor([ids]), attention_mask=mask.long()).last_hidden_state
                expected = network.score(hidden[:, -1]).item()
            assert score(network, ids) == close(expected)
            assert score(network, ids, left=2, right=3, pad=special) == close(expected)
            batch = batch_of(tokenized([([*prompt[:place], special, *prompt[place:]], chosen, [5] * 40)]), special)
            assert batch.attention_mask.sum(1).tolist() == [len(prompt) + 1 + len(chosen), len(prompt) + 1 + 40]


# C6
def test_the_ids_of_a_prompt_are_the_same_whatever_response_follows(chat_format):
    responses = ["Yes.", " yes", "\n\nNo", "A much longer answer, of more words.", "é", "…", "'s"]
    for prompt in ("Is it far?", TALK):
        examples = [pair(prompt, response, f"Not {response}", row) for row, response in enumerate(responses)]
        pairs, report = selected(chat_format, examples)
        assert report.rows_dropped == 0
        assert len({tuple(pairs.segments(index)[0].tolist()) for index in range(len(pairs))}) == 1
        for index in range(len(pairs)):
            begin, *sides = pairs.segments(index)
            text = chat_format.prompt_text(pair(prompt).prompt)
            for side, response in zip(sides, (responses[index], f"Not {responses[index]}"), strict=True):
                joined = chat_format.encode_prompts([text + chat_format.response_text(response)])[0]
                assert [*begin.tolist(), *side.tolist()] == [*joined, chat_format.eos_id]


# C7
WRITES_BOS = "{{ bos_token }}" + CHATML
TOKENS = "<s> </s> <|im_start|> <|im_end|>"
STARTS = {
    "neither writes one": (byte_tokenizer(TOKENS, CHATML, bos_token="<s>"), 0),
    "the tokenizer alone": (byte_tokenizer(TOKENS, CHATML, adds="<s> $A", bos_token="<s>"), 1),
    "the template alone": (byte_tokenizer(TOKENS, WRITES_BOS, bos_token="<s>"), 1),
    "both": (byte_tokenizer(TOKENS, WRITES_BOS, adds="<s> $A </s>", bos_token="<s>"), 1),
    "plain text, neither": (byte_tokenizer(TOKENS, bos_token="<s>", eos_token="</s>"), 0),
    "plain text, the tokenizer": (byte_tokenizer(TOKENS, adds="<s> $A", bos_token="<s>", eos_token="</s>"), 1),
    "there is none": (byte_tokenizer("</s>", eos_token="</s>"), 0),
    "an encoder": (byte_tokenizer("<s> </s>", adds="<s> $A </s>", cls_token="<s>", sep_token="</s>"), 1),
}


@pytest.mark.parametrize(("tokenizer", "count"), STARTS.values(), ids=STARTS.keys())
def test_a_row_has_one_start_token_or_none_where_the_tokenizer_has_none(tokenizer, count):
    chat_format = ChatFormat(tokenizer)
    start = tokenizer.get_vocab().get("<s>")
    for prompt in ("Is it far?", TALK):
        for max_length in (1000, 90):
            pairs, _ = selected(chat_format, [pair(prompt)], max_length=max_length)
            begin, *sides = (ids.tolist() for ids in pairs.segments(0))
            assert begin.count(start) == count
            assert count == 0 or begin[0] == start
            assert not any(start in side for side in sides)


@pytest.mark.parametrize("text", ["<s>Is it far?", "Far </s>", "<|im_start|>user\nHi<|im_end|>"])
def test_text_that_was_rendered_before_is_refused_and_gets_no_second_start_token(text):
    chat_format = ChatFormat(STARTS["both"][0])
    store = stored(chat_format, [pair(text), pair("x", text, row=1), pair("x", "y", text, row=2), pair(row=3)])
    assert store.report.bad_rows == {"special_tokens": ["row 0", "row 1", "row 2"]}
    assert len(store) == 1


# C8
def test_both_sides_of_a_pair_end_with_one_terminator(chat_format):
    end = chat_format.eos_id
    examples = [pair(), pair("x", "a\n", " b ", row=1), pair(TALK, "Yes", "No", row=2)]
    for max_length in (1000, 120):
        pairs, _ = selected(chat_format, examples, max_length=max_length)
        assert len(pairs) > 0
        for index in range(len(pairs)):
            for side in pairs.segments(index)[1:]:
                assert (side == end).nonzero()[0].tolist() == [len(side) - 1]


# C9
def test_rows_and_their_place_in_the_cache_are_the_same_on_any_day(monkeypatch):
    import transformers.utils.chat_template_utils as library

    template = (
        "{% set date_string = date_string | default(strftime_now('%d %b %Y')) %}{{ 'It is ' ~ date_string ~ '\n' }}"
    )
    seen = set()
    for year in (1999, 2040):
        day = datetime.datetime(year, 12, 31)
        monkeypatch.setattr(library, "datetime", SimpleNamespace(now=lambda day=day: day))
        tokenizer = byte_tokenizer(TOKENS, template + CHATML, eos_token="<|im_end|>")
        chat_format = ChatFormat(tokenizer, chat_template_kwargs={"date_string": "5 May 2005"})
        ids = [part.tolist() for part in selected(chat_format, [pair(TALK)])[0].segments(0)]
        seen.add((chat_format.fingerprint(), repr(ids)))
    assert len(seen) == 1


# C10
GOOD = {"prompt": "Is it far?", "chosen": "Not far.", "rejected": "Far!"}
UNUSABLE = {
    "an empty response": ("empty_response", {"chosen": ""}),
    "an empty other response": ("empty_response", {"rejected": " \n"}),
    "an identical pair": ("identical_pair", {"rejected": GOOD["chosen"]}),
    "an empty prompt": ("empty_prompt", {"prompt": ""}),
    "None": ("missing_key", {"chosen": None}),
    "a number": ("wrong_type", {"rejected": 3.5}),
    "a missing key": ("missing_key", {"prompt": ...}),
}


@pytest.mark.parametrize(("reason", "changes"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_row_that_states_no_preference_is_refused_with_its_number_and_reason(tmp_path, reason, changes):
    bad = {key: value for key, value in (GOOD | changes).items() if value is not ...}
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, GOOD, bad, GOOD)))
    with pytest.raises(DataError, match=r"pairs.jsonl: 1 of 4 rows cannot be used: .*row 2: "):
        load_preferences(file)
    examples, report = load_preferences(file, on_bad_rows="drop")
    assert len(examples) == 3
    assert report.bad_rows == {reason: [f"{file}, row 2"]}


# C11, C12
texts = st.text(string.ascii_lowercase + " ", min_size=1, max_size=30).filter(str.strip)


@pytest.mark.parametrize("truncation", ["left", "drop"])
@settings(max_examples=15)
@given(
    st.lists(st.tuples(texts, texts, texts).filter(lambda t: t[1].strip() != t[2].strip()), min_size=1, max_size=5),
    st.integers(5, 140),
)
@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_takes_of_the_messages_alone_and_what_does_not_fit_is_counted(name, truncation, rows, max_length):
    chat_format = FORMATS[name].chat_format
    examples = [pair(*row, row=number) for number, row in enumerate(rows)]
    whole, _ = selected(chat_format, examples)
    room = max_length - whole.segment_lengths[:, 1:].max(axis=1) - len(chat_format.head_ids) - chat_format.tail_length
    fits = (whole.lengths <= max_length) | ((room > 0) & (truncation == "left"))
    if not fits.any():
        with pytest.raises(
            DataError, match=rf"{len(rows)} of {len(rows)} pairs do not fit: row 0: .*; raise max_length"
        ):
            selected(chat_format, examples, max_length=max_length, truncation=truncation)
        return
    pairs, report = selected(chat_format, examples, max_length=max_length, truncation=truncation)
    assert report.bad_rows.get("too_long", []) == [f"row {row}" for row in np.flatnonzero(~fits)]
    assert report.rows_kept == len(pairs) == fits.sum()
    head, tail = list(chat_format.head_ids), chat_format.tail_length
    cut = []
    for index, row in enumerate(int(example_id.removeprefix("id-")) for example_id in pairs.example_ids):
        (prompt, *sides), (uncut, *whole_sides) = pairs.segments(index), whole.segments(row)
        for side, whole_side in zip(sides, whole_sides, strict=True):
            assert side.tolist() == whole_side.tolist()  # so none is empty, none lacks its eos, none is the other
            assert len(prompt) + len(side) <= max_length
        assert prompt[: len(head)].tolist() == head
        assert prompt[len(prompt) - tail :].tolist() == uncut[len(uncut) - tail :].tolist()
        kept = len(prompt) - len(head)
        assert prompt[len(head) :].tolist() == uncut[len(uncut) - kept :].tolist()
        assert kept > tail
        if len(prompt) < len(uncut):
            cut.append(f"row {row}")
            assert pairs.lengths[index] == max_length
    assert report.rows_cut == cut
    assert truncation == "left" or not cut


# C13
def divided(chat_format, file, **options):
    """Numbers of the places that the training and the validation pairs ask about, each as often as it stands there."""
    data = PreferenceDataModule(str(file), max_length=1000, **options)
    data.chat_format = chat_format
    data.setup("fit")
    decode = chat_format.tokenizer.decode
    for role in ("train", "val"):
        prompts = (decode(data.pairs[role].segments(index)[0]) for index in range(len(data.pairs[role])))
        yield sorted(int(re.search(r"\d+", prompt).group()) for prompt in prompts)


def test_no_prompt_is_trained_on_and_held_out_whatever_the_order_of_the_rows(tmp_path):
    chat_format = FORMATS["qwen"].chat_format
    spellings = ("Place {}?", "place  {}?", " PLACE {}?\n")
    rows = [GOOD | {"prompt": s.format(n), "rejected": s} for n in range(40) for s in spellings]
    results = []
    for seed in (None, 0, 1):
        order = np.arange(len(rows)) if seed is None else np.random.default_rng(seed).permutation(len(rows))
        file = tmp_path / "pairs.jsonl"
        file.write_text("".join(json.dumps(rows[i]) + "\n" for i in order))
        results.append(list(divided(chat_format, file, val_fraction=0.3)))
    train, val = results[0]
    assert set(train).isdisjoint(val)
    assert len(train) + len(val) == 120
    assert len(set(train)) * 3 == len(train) > len(val) > 0  # every spelling of a prompt is on the prompt's side
    assert results[0] == results[1] == results[2]
