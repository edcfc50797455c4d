"""Copies, contradictions, length bias and padding of a set of pairs, against counts by hand."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.selection import TokenizedPairs
from rlhf_lightning.data.sources import WeightedSource
from rlhf_lightning.data.statistics import _padding_share, contradictions, duplicates, longer_chosen, shared_prompts
from rlhf_lightning.data.tokenized import tokenize_source
from rlhf_lightning.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def chat_format(tiny_qwen2):
    return ChatFormat(load_tokenizer(str(tiny_qwen2)))


@pytest.fixture(scope="module")
def pairs_of(chat_format, tmp_path_factory):
    """`TokenizedPairs` of (prompt, chosen, rejected) texts."""
    directory = tmp_path_factory.mktemp("statistics")

    def make(rows):
        file = directory / "rows.jsonl"
        names = ("prompt", "chosen", "rejected")
        file.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
        store = tokenize_source(WeightedSource(str(file)), chat_format, cache_dir=directory / "cache")
        return TokenizedPairs.fitting([store], [np.ones(len(store), dtype=bool)], max_length=1000)[0]

    return make


def test_a_pair_that_stood_before_is_a_duplicate_but_for_its_outer_blanks(pairs_of):
    rows = [("p", "a", "b"), ("p", "a", "c"), ("p ", " a", "b"), ("p", "b", "a"), ("q", "a", "b"), ("p", "a", "b")]
    rows += [("P", "a", "b"), ("p", "A", "b"), ("p", "a", "b  b"), ("p", "a", "b b")]  # case may be what it is about
    assert duplicates(pairs_of(rows)).tolist() == [2, 5]


def test_a_copy_in_another_unicode_form_is_a_duplicate(pairs_of):
    rows = [("caf\u00e9", "n\u00e9", "b"), ("cafe\u0301", "ne\u0301", "b"), ("caf\u00e9\u200b", "n\u00e9", "\ufeffb")]
    assert duplicates(pairs_of([*rows, ("cafe", "n\u00e9", "b")])).tolist() == [1, 2]


def test_both_sides_of_a_contradiction_are_named(pairs_of):
    rows = [("p", "a", "b"), ("q", "a", "b"), ("p", "b", "a"), ("p", "b", "c"), ("p", "b", "a "), ("p", "B", "A")]
    assert contradictions(pairs_of(rows)).tolist() == [0, 2, 4]


word = st.sampled_from("abc")
triples = st.lists(st.tuples(word, word, word).filter(lambda t: t[1] != t[2]), min_size=1, max_size=12)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(triples)
def test_copies_and_contradictions_equal_a_count_by_hand(pairs_of, rows):
    pairs = pairs_of(rows)
    assert len(duplicates(pairs)) == sum(count - 1 for count in Counter(rows).values())
    assert contradictions(pairs).tolist() == [i for i, (p, c, r) in enumerate(rows) if (p, r, c) in rows]


def test_the_longer_response_wins_with_ties_one_half(pairs_of):
    assert longer_chosen(pairs_of([("p", "aaa", "b"), ("q", "a", "bb"), ("r", "a", "b"), ("s", "aa", "b")])) == 0.625


def test_validation_pairs_with_a_trained_prompt_are_named(pairs_of):
    train, val = pairs_of([("p", "a", "b"), ("q", "a", "b")]), pairs_of([("x", "a", "b"), ("Q", "c", "d")])
    assert shared_prompts(train, val).tolist() == [1]


def test_padding_is_what_a_batch_of_right_padded_rows_holds(pairs_of):
    pairs = pairs_of([("p", "a", "b c d e f"), ("q q q", "a", "b"), ("r", "a a a a", "b")])
    prompt, chosen, rejected = pairs.segment_lengths.T.tolist()
    rows = [(p + c, p + r) for p, c, r in zip(prompt, chosen, rejected, strict=True)]
    first, last = [*rows[0], *rows[1]], [*rows[2]]
    padded = 4 * max(first) + 2 * max(last)
    share = _padding_share(pairs, [np.array([0, 1]), np.array([2])])
    assert share == pytest.approx(1 - (sum(first) + sum(last)) / padded, abs=1e-12)
    assert _padding_share(pairs_of([("p", "a", "b")]), [np.array([0])]) == 0
