"""Splits by prompt: no prompt on both sides, whatever the order of the rows."""

from __future__ import annotations

import random

import pytest

from rlhf_lightning.data.examples import PreferenceExample
from rlhf_lightning.data.splitting import prompt_key, shared_prompts, split_by_prompt
from rlhf_lightning.errors import DataError


def example(prompt, row=0):
    return PreferenceExample([{"role": "user", "content": prompt}], "a", "b", None, str(row), f"row {row}")


EXAMPLES = [example(f"prompt {row % 200}", row) for row in range(600)]


def test_every_pair_is_on_one_side_and_no_prompt_on_both():
    train, val = split_by_prompt(EXAMPLES, val_fraction=0.2)
    assert sorted(int(e.example_id) for e in [*train, *val]) == list(range(600))
    assert {prompt_key(e.prompt) for e in train}.isdisjoint(prompt_key(e.prompt) for e in val)
    assert shared_prompts(train, val) == 0


def test_about_the_asked_share_of_prompts_is_held_out():
    sizes = [len(split_by_prompt(EXAMPLES, val_fraction=share)[1]) / 600 for share in (0.1, 0.5)]
    # Standard deviation of the share of 200 prompts: 0.021 and 0.035.
    assert sizes == pytest.approx([0.1, 0.5], abs=0.08)


def test_the_split_does_not_depend_on_the_order_or_the_other_rows():
    _, val = split_by_prompt(EXAMPLES, val_fraction=0.2)
    shuffled = random.Random(0).sample(EXAMPLES, len(EXAMPLES))
    assert sorted(e.example_id for e in split_by_prompt(shuffled, val_fraction=0.2)[1]) == sorted(
        e.example_id for e in val
    )
    half = EXAMPLES[::2]
    assert split_by_prompt(half, val_fraction=0.2)[1] == [e for e in val if e in half]


def test_a_larger_share_holds_out_the_same_prompts_and_more():
    small, large = (split_by_prompt(EXAMPLES, val_fraction=share)[1] for share in (0.1, 0.3))
    assert {e.example_id for e in small} < {e.example_id for e in large}


def test_both_sides_keep_the_order_of_the_rows():
    for side in split_by_prompt(EXAMPLES, val_fraction=0.2):
        numbers = [int(e.example_id) for e in side]
        assert numbers == sorted(numbers)


@pytest.mark.parametrize(("a", "b"), [("Hello  there", "hello there"), (" Hello\nthere ", "HELLO THERE")])
def test_prompts_that_differ_in_case_and_white_space_alone_are_one(a, b):
    assert prompt_key(example(a).prompt) == prompt_key(example(b).prompt)
    assert shared_prompts([example(a)], [example(b), example("other")]) == 1


def test_prompts_that_differ_in_words_roles_or_turns_are_two():
    one = [{"role": "user", "content": "a b"}]
    others = (
        [{"role": "user", "content": "ab"}],
        [{"role": "system", "content": "a b"}],
        [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}],
    )
    assert len({prompt_key(prompt) for prompt in (one, *others)}) == 4


@pytest.mark.parametrize(("fraction", "side"), [(1e-9, "validation"), (1 - 1e-9, "training")])
def test_an_empty_side_is_refused_with_advice(fraction, side):
    with pytest.raises(DataError, match=f"splitting 600 pairs .*leaves no {side} pair; .*val: FILE"):
        split_by_prompt(EXAMPLES, val_fraction=fraction)
