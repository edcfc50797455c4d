"""No text of a user's files, or of anybody else's, moves the cursor or changes the title of the terminal."""

from __future__ import annotations

import io
import json
import logging
import math
import re

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar
from rich.table import Table

from rlhf_lightning import terminal
from rlhf_lightning.commands.fit import Program, run
from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import reason_of
from rlhf_lightning.terminal import Terminal, VisibleLines, say
from rlhf_lightning.training.progress_bar import ShortProgressBar
from tests.test_configs import ROOT

NAME = "x\x1b]0;owned\x07\x1b[2J\u202e"
SHOWN = "x⟨U+001B⟩]0;owned⟨U+0007⟩⟨U+001B⟩[2J⟨U+202E⟩"


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Pairs with a column of that name, a file of that name, and a model of that type."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pairs = [{"prompt": f"p{i}", "chosen": "good " * (i + 1), "rejected": f"bad {i}", NAME: 1} for i in range(4)]
    for name in ("pairs.jsonl", f"{NAME}.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps({"model_type": NAME}))


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["doctor", "pairs.jsonl"], 0),
        (["doctor", f"{NAME}.jsonl"], 0),
        (["doctor", f"{NAME}.csv"], 2),
        (["evaluate", "--policy", "model", "--prompts", "pairs.jsonl"], 2),
        (["evaluate", "--reward_model", "model", "--pairs", "pairs.jsonl"], 2),
        (["export", "--ckpt_path", NAME, "--out", "out"], 2),
        (["fit", "--model", NAME], 2),
        ([NAME], 2),
    ],
    ids=str,
)
def test_every_command_writes_it_out(files, capsys, command, code):
    assert main(command) == code
    shown = "".join(capsys.readouterr())
    assert "⟨U+001B⟩" in shown or "\\x1b" in shown
    assert not {"\x1b", "\x07", "\u202e"} & set(shown)


def test_a_table_a_line_and_a_log_show_names_and_rich_keeps_its_colours():
    out = io.StringIO()
    table = Table(title=NAME)
    table.add_column(NAME)
    table.add_row(NAME.replace("[", r"\["), style="bold")
    Terminal(file=out, width=120, force_terminal=True, color_system="standard").print(table)
    lines = out.getvalue()
    assert lines.count(SHOWN) == 3
    assert "\x1b[1m" in lines
    assert not {"\x07", "\u202e"} & set(lines)
    assert "\x1b]" not in lines
    assert "\x1b[2J" not in lines
    out = io.StringIO()
    say(NAME, file=out)
    assert out.getvalue() == SHOWN + "\n"
    record = logging.LogRecord("n", logging.INFO, "f", 1, "model %s\nand more", (NAME,), None)
    assert VisibleLines("%(message)s").format(record) == f"model {SHOWN}\nand more"


def test_an_error_that_says_nothing_is_named():
    assert reason_of(MemoryError()) == "not enough memory"
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(ValueError("first\nsecond")) == "first"


def test_progress_is_a_line_now_and_then_with_the_time_that_is_left(caplog, monkeypatch):
    now = 0.0
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now)
    caplog.set_level("INFO")
    with terminal.progress("responses", 100) as advance:
        for now, parts in ((4.0, 10), (12.0, 20), (20.0, 10), (30.0, 30), (40.0, 30)):  # noqa: B007
            advance(parts)
    assert [record.getMessage() for record in caplog.records] == [
        "responses: 30 of 100, about 28 s left",
        "responses: 70 of 100, about 13 s left",
    ]
    now = 0.0
    pace = terminal.Pace(10)  # of a run that was resumed at part 10
    now = 90.0
    assert [pace.left(done, 100) for done in (10, 40, 100)] == ["", "about 3 min left", ""]
    assert (pace.left(70, 100), pace.left(70, math.inf)) == ("about 45 s left", "")
    with terminal.progress("responses", 100, shown=False) as advance:
        advance(50)
    assert len(caplog.records) == 2


def test_the_bar_is_short_and_one_of_the_users_own_stays(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainers: list[Trainer] = []
    monkeypatch.setattr(Program, "_run_subcommand", lambda self, _: trainers.append(self.trainer))
    quickstart = ["fit", "--config", str(ROOT / "configs" / "quickstart" / "reward_model.yaml")]
    for extra in ([], ["--trainer.callbacks+=RichProgressBar"], ["--trainer.enable_progress_bar=false"]):
        run([*quickstart, *extra])
    kinds = [type(trainer.progress_bar_callback) for trainer in trainers]
    assert kinds == [ShortProgressBar, RichProgressBar, type(None)]
    bar = trainers[0].progress_bar_callback
    trainers[0].progress_bar_metrics.update({"train/loss": 0.5, "val/loss": 0.25})
    assert bar.get_metrics(trainers[0], trainers[0].lightning_module) == {"loss": 0.5, "val/loss": 0.25}


@pytest.mark.parametrize(("every", "lines"), [(1, [2, 4, 6, 8]), (3, [3, 6])])
def test_a_log_has_few_lines_of_a_training(tmp_path, monkeypatch, caplog, every, lines):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_lightning.training.module._LINES", 4)
    quickstart = ["fit", "--config", str(ROOT / "configs" / "quickstart" / "reward_model.yaml")]
    few = ["--trainer.max_steps=8", "--trainer.limit_val_batches=1", f"--trainer.log_every_n_steps={every}"]
    caplog.set_level("INFO")
    run([*quickstart, *few])
    found = [re.match(r"step (\d+)/8: loss", record.getMessage()) for record in caplog.records]
    assert [int(match[1]) for match in found if match] == lines
