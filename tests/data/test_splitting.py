"""Splits by prompt: no prompt on both sides, whatever the order of the rows."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_lightning.data.splits import held_out, prompt_hash


def user(prompt):
    return [{"role": "user", "content": prompt}]


PROMPTS = [f"prompt {row % 200}" for row in range(600)]
HASHES = np.array([prompt_hash(user(prompt)) for prompt in PROMPTS], dtype=np.uint64)


def test_no_prompt_is_on_both_sides():
    held = held_out(HASHES, val_fraction=0.2)
    sides = [{prompt for prompt, there in zip(PROMPTS, held == side, strict=True) if there} for side in (0, 1)]
    assert sides[0].isdisjoint(sides[1])
    assert len(sides[0]) + len(sides[1]) == 200


def test_about_the_asked_share_of_prompts_is_held_out():
    # Standard deviation of the share of 200 prompts: 0.021 and 0.035.
    assert [held_out(HASHES, val_fraction=share).mean() for share in (0.1, 0.5)] == pytest.approx([0.1, 0.5], abs=0.08)


def test_the_split_does_not_depend_on_the_order_or_the_other_rows():
    held = held_out(HASHES, val_fraction=0.2)
    order = np.random.default_rng(0).permutation(600)[:300]
    assert (held_out(HASHES[order], val_fraction=0.2) == held[order]).all()


def test_the_split_is_the_same_in_every_version():
    # Fixed numbers: another hash would move pairs of an old run from one side to the other.
    assert prompt_hash(user("Hello")) == 0x890602187FB7D3FB
    assert held_out(HASHES[:12], val_fraction=0.2).tolist() == [row in (1, 9) for row in range(12)]


def test_a_larger_share_holds_out_the_same_prompts_and_more():
    small, large = (held_out(HASHES, val_fraction=share) for share in (0.1, 0.3))
    assert (large | ~small).all()
    assert large.sum() > small.sum()


@pytest.mark.parametrize(("a", "b"), [("Hello  there", "hello there"), (" Hello\nthere ", "HELLO THERE")])
def test_prompts_that_differ_in_case_and_white_space_alone_are_one(a, b):
    assert prompt_hash(user(a)) == prompt_hash(user(b))


def test_prompts_that_differ_in_words_roles_or_turns_are_two():
    others = (user("ab"), [{"role": "system", "content": "a b"}], [*user("a"), *user("b")])
    assert len({prompt_hash(prompt) for prompt in (user("a b"), *others)}) == 4


FORMS = [
    ("Où est le café ?", "Où est le cafe\u0301 ?"),
    ("Où est le café ?", "Ou\u0300 est\u200b le caf\u00e9\ufeff ?"),
    ("한국어", "\u1112\u1161\u11ab\u1100\u116e\u11a8\u110b\u1165"),
    ("ABC 123", "\uff21\uff22\uff23\u3000\uff11\uff12\uff13"),
    ("fine", "\ufb01ne"),
    ("plain", "pl\u00adain\u2060"),
    ("STRASSE", "straße"),
    ("\u0390", "\u1fd3"),
]


@pytest.mark.parametrize(("one", "other"), FORMS)
def test_forms_of_one_prompt_are_one_prompt(one, other):
    assert prompt_hash(user(one)) == prompt_hash(user(other))


def test_other_letters_are_another_prompt():
    texts = ["cafe", "café", "cafè", "c a f e", "漢", "字", "é", "e"]
    assert len({prompt_hash(user(text)) for text in texts}) == len(texts)
