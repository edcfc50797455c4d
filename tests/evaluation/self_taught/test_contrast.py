"""`contrast`: pairs that are built, why some are not, and the same file whatever the batch and after a kill."""

from __future__ import annotations

import json

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.data import load_preferences
from rlhf_lightning.evaluation.self_taught.contrast import parse_contrast, parse_instruction

WORLD = "tests.evaluation.self_taught.world"
GOOD = "### Modified instruction\nName a fruit.\n\n### Answer\nA pear."


@pytest.fixture
def built(tmp_path, monkeypatch, capsys):
    """The rows that a command line writes, what was counted, and the exit code with the line of its error."""
    monkeypatch.chdir(tmp_path)
    prompts = [{"prompt": f"Tell me about topic {i}.", "id": f"t{i}"} for i in range(40)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(each) + "\n" for each in prompts))

    def run(*arguments: str, out: str = "pairs.jsonl", maker: str = f"{WORLD}:maker"):
        code = main(["contrast", "--maker", maker, "--prompts", "prompts.jsonl", "--out", out, *arguments])
        error = capsys.readouterr().err.strip().splitlines()[-1:]
        if code:
            return [], {}, (code, error[0])
        numbers = json.loads((tmp_path / f".{out}.kept" / "numbers.json").read_text())
        return [json.loads(line) for line in (tmp_path / out).read_text().splitlines()], numbers, (code, "")

    return run


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        (GOOD, ("Name a fruit.", "A pear.")),
        ("Sure!\n" + GOOD.replace("### ", "**").replace("instruction", "Instruction:**"), ("Name a fruit.", "A pear.")),
        ("<think>### Answer\nno</think>\n" + GOOD, ("Name a fruit.", "A pear.")),
        (GOOD.replace("### Answer\n", ""), None),
        (GOOD.replace("A pear.", ""), None),
        (GOOD.replace("Name a fruit.", ""), None),
        (GOOD + "\n\n### Answer\nAn apple.", None),
        ("### Answer\nA pear.\n### Modified instruction\nName a fruit.", None),
        ("My answer is a pear.", None),
        ("", None),
    ],
)
def test_a_reply_has_both_headings_once_with_text_below_or_is_malformed(reply, found):
    assert parse_contrast(reply) == found


def test_an_instruction_alone_needs_its_heading():
    assert parse_instruction("### Modified instruction\nName a fruit.\n") == "Name a fruit."
    assert parse_instruction("Name a fruit.") is parse_instruction("### Modified instruction\n") is None


def test_every_prompt_is_a_pair_or_counted_with_its_reason(built, tmp_path):
    rows, numbers, _ = built()
    assert {row["id"] for row in rows} == {f"t{i}" for i in range(40) if i % 10 not in (3, 4, 5, 6)}
    for row in rows:
        topic = int(row["id"][1:])
        assert row["chosen"].startswith(f"All of topic {topic}, ")
        assert (row["rejected"], row["source"]) == (f"All of topic {topic + 1000}.", "contrast")
        assert row["modified_prompt"] == f"Tell me about topic {topic + 1000}."
    expected = {"malformed": 4, "same_instruction": 4, "refused": 4, "length_ratio": 4, "cut": 0, "not_asked": 0}
    assert expected.items() <= numbers.items()
    assert (numbers["prompts"], numbers["pairs"], numbers["rows"]) == (40, 24, 24)
    examples, report = load_preferences(str(tmp_path / "pairs.jsonl"))
    assert (len(examples), report.bad_rows) == (24, {})


def test_a_modifier_of_its_own_leaves_the_answer_to_the_maker(built):
    rows, numbers, _ = built("--modifier", f"{WORLD}:instruction_alone", "--two_replies", "true")
    assert (len(rows), numbers["malformed"]) == (40, 0)
    assert all(row["rejected"].startswith(f"All of topic {int(row['id'][1:]) + 1000}, ") for row in rows)


def test_prompts_of_an_evaluation_are_left_out_and_counted(built, tmp_path):
    long = "Once upon a time there was a topic which nobody had ever heard of: topic 12345."
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": f"Please go on. {long}", "id": "long"}) + "\n")
    held = [{"prompt": f"TELL me  about topic {i}.", "chosen": "x", "rejected": "y"} for i in (0, 7, 77)]
    held += [{"prompt": f"{long} What now?", "chosen": "x", "rejected": "y"}]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(each) + "\n" for each in held))
    rows, numbers, _ = built("--exclude", "held_out.jsonl")
    assert (numbers["excluded"], numbers["prompts"]) == (3, 38)
    assert not {"t0", "t7", "long"} & {row["id"] for row in rows}
    (tmp_path / "prompts.jsonl").write_text(json.dumps(held[0]) + "\n")
    assert built("--exclude", "held_out.jsonl", out="none.jsonl")[2][0] == 2


def test_the_file_is_the_same_for_any_batch_and_order_and_after_a_kill(built, tmp_path):
    two = ["--modifier", f"{WORLD}:instruction_alone", "--two_replies", "true"]
    prompts = (tmp_path / "prompts.jsonl").read_text().splitlines(keepends=True)
    whole = built(*two)[0]
    (tmp_path / "prompts.jsonl").write_text("".join(prompts[::-1]))
    kept = tmp_path / ".alone.jsonl.kept" / "replies.jsonl"
    for stop in range(4):
        alone = built(*two, "--batch_size", "1", out="alone.jsonl")[0]
        assert sorted(alone, key=lambda row: int(row["id"][1:])) == whole
        lines = kept.read_bytes().splitlines(keepends=True)
        kept.write_bytes(b"".join(lines[: stop * len(lines) // 3]) + lines[-1][:10])
        (tmp_path / "alone.jsonl").unlink()


def test_what_a_model_does_not_end_makes_no_pair(built, tiny_qwen2):
    code, error = built("--max_new_tokens", "6", "--max_prompts", "3", maker=str(tiny_qwen2))[2]
    assert (code, "max_new_tokens" in error) == (2, True)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--template", "absent.txt"], "absent.txt"),
        (["--template", "prompts.jsonl"], "{conversation}"),
        (["--out", "prompts.jsonl"], "out"),
        (["--modifier", f"{WORLD}:nobody"], "nobody"),
        (["--top_p", "1.5"], "top_p"),
    ],
)
def test_settings_that_cannot_be_used_are_one_line(built, arguments, key):
    code, error = built(*arguments)[2]
    assert (code, key in error) == (2, True), error


def test_a_template_of_the_user_s_replaces_the_request(built, tmp_path):
    text = "{conversation} and {answer}, in this form: ### Modified instruction ... {other}"
    (tmp_path / "request.txt").write_text(text)
    assert len(built("--template", "request.txt")[0]) == 24
    (tmp_path / "request.txt").write_text(text.replace("### Modified", ""))
    code, error = built("--template", "request.txt", out="other.jsonl")[2]
    assert (code, "heading" in error) == (2, True)
