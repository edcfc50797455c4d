"""No text of a user's files, or of anybody else's, moves the cursor or changes the title of the terminal."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.table import Table

from rlhf_lightning.commands.main import main
from rlhf_lightning.errors import reason_of
from rlhf_lightning.terminal import Terminal, VisibleLines, say

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
