"""Pictures for TensorBoard."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_lightning.training.pictures import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Point, reward_against_kl, ticks

LINE = (31, 98, 172)


def blue(image):
    """Rows and columns of the pixels of the line."""
    return np.nonzero((image == LINE).all(axis=-1))


def test_the_line_goes_from_the_first_point_to_the_last():
    image = reward_against_kl([Point(4, 0.0, -1.0), Point(8, 2.0, 3.0)])
    assert image.shape == (HEIGHT, WIDTH, 3)
    rows, columns = blue(image)
    # The axes run from 0 to 2 and from -1 to 3.
    assert (columns.min(), columns.max()) == pytest.approx((LEFT - 3, WIDTH - RIGHT + 3), abs=1)
    assert (rows.min(), rows.max()) == pytest.approx((TOP - 3, HEIGHT - BOTTOM + 3), abs=1)
    assert rows[columns.argmin()] > rows[columns.argmax()], "more reward is higher up"


@pytest.mark.parametrize("points", [[Point(1, 0.0, 0.0)], [Point(1, 0.0, 5.0), Point(2, 0.0, 5.0)]])
def test_a_run_that_has_not_moved_can_be_drawn(points):
    rows, _ = blue(reward_against_kl(points))
    assert len(rows) > 20


def test_a_picture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no rollouts"):
        reward_against_kl([])


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_enclose_what_is_drawn_and_are_few(low, span):
    found = ticks(low, low + span)
    margin = 1e-9 * (abs(low) + span)
    assert found[0] <= low + margin
    assert found[-1] >= low + span - margin
    assert 3 <= len(found) <= 9
