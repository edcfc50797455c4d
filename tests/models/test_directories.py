"""Where `generate` ends a reply of an exported language model."""

from __future__ import annotations

import json

import pytest

from rlhf_lightning.models.directories import end_at


@pytest.mark.parametrize(("before", "after"), [(None, 7), (5, [7, 5]), ([5, 6], [7, 5, 6]), (7, 7), ([6, 7], [6, 7])])
def test_replies_end_where_training_ended_them_and_where_they_did_before(tmp_path, before, after):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": before, "top_p": 0.9}))
    end_at(tmp_path, 7)
    assert json.loads(path.read_text()) == {"eos_token_id": after, "top_p": 0.9}


def test_what_is_no_language_model_stays_as_it_is(tmp_path):
    end_at(tmp_path, 7)
    assert not list(tmp_path.iterdir())
