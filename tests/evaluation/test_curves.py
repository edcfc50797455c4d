"""Learning curves out of TensorBoard's logs: what stands behind damage is left out, and the file is named."""

from __future__ import annotations

import pytest
from torch.utils.tensorboard import SummaryWriter

from rlhf_lightning.evaluation.curves import read_run


@pytest.fixture
def log_file(tmp_path):
    """Of ten steps, whose values are their squares."""
    with SummaryWriter(tmp_path) as writer:
        for step in range(10):
            writer.add_scalar("loss", step**2, step)
    (file,) = tmp_path.iterdir()
    return file


def points(file):
    return [(point.step, point.value) for point in read_run(file.parent).values.get("loss", [])]


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "zeros", "none"])
def test_a_damaged_log_gives_the_points_before_it_and_is_named(log_file, damage, caplog):
    content, middle = log_file.read_bytes(), log_file.stat().st_size // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    damaged = {"flipped": flipped, "cut": content[:middle], "empty": b"", "zeros": bytes(len(content))}
    log_file.write_bytes(damaged.get(damage, content))
    found = points(log_file)
    assert found == [(step, float(step**2)) for step in range(len(found))]
    counts = {"empty": {0}, "zeros": {0}, "none": {10}}
    assert len(found) in counts.get(damage, {3, 4, 5, 6})
    assert (f"{log_file}: damaged or incomplete" in caplog.text) == (damage != "none")
