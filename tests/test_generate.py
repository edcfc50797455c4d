"""The command `generate`: responses of a policy as samples, preference pairs, or the best of n."""

from __future__ import annotations

import json

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.data import load_preferences
from rlhf_lightning.data.prompts import load_prompts

LENGTH = "tests.training.test_ppo:length"
N = 3


@pytest.fixture
def generated(tiny_qwen2, tmp_path, monkeypatch, capsys):
    """The rows that a command line writes, its exit code, and the line of its error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, out: str = "rows.jsonl"):
        given = ["--policy", str(tiny_qwen2), "--prompts", "builtin:courtesy", "--out", out, "--max_prompts", "5"]
        given += ["--num_generations", str(N), "--max_new_tokens", "6", "--require_eos", "false"]
        code = main(["generate", *given, *arguments])
        rows = [json.loads(line) for line in (tmp_path / out).read_text().splitlines()] if code == 0 else []
        return rows, code, capsys.readouterr().err.strip().splitlines()[-1:]

    return run


def test_samples_are_all_responses_and_each_has_its_score(generated):
    rows, _, _ = generated("--reward_model", LENGTH)
    prompts, _ = load_prompts("builtin:courtesy")
    assert [row["prompt"] for row in rows[::N]] == [list(each.prompt) for each in prompts[:5]]
    assert len({row["id"] for row in rows}) == len(rows) == 5 * N
    for row in rows:
        assert row["score"] == pytest.approx(len(row["response"]) / 10)
        assert row["ended"] or row["tokens"] == 6
    bare, _, _ = generated(out="bare.jsonl")
    assert bare == [{name: value for name, value in row.items() if name != "score"} for row in rows]


def test_pairs_are_best_and_worst_of_a_prompt_and_the_loader_reads_them(generated, tmp_path):
    samples, _, _ = generated("--reward_model", LENGTH)
    pairs, _, _ = generated("--reward_model", LENGTH, "--rows", "pairs", out="pairs.jsonl")
    assert len(pairs) >= 3
    for pair in pairs:
        own = [row["score"] for row in samples if row["id"].rpartition("#")[0] == pair["id"]]
        assert (pair["score_rejected"], pair["score_chosen"]) == (min(own), max(own))
        assert [len(pair["rejected"]), len(pair["chosen"])] == pytest.approx([10 * min(own), 10 * max(own)])
    examples, report = load_preferences(str(tmp_path / "pairs.jsonl"))
    assert [(each.chosen, each.rejected) for each in examples] == [(pair["chosen"], pair["rejected"]) for pair in pairs]
    assert report.bad_rows == {}
    gap = max(pair["score_chosen"] - pair["score_rejected"] for pair in pairs)
    wide, _, _ = generated(
        "--reward_model", LENGTH, "--rows", "pairs", "--min_score_gap", str(gap - 0.5), out="w.jsonl"
    )
    assert 0 < len(wide) < len(pairs)
    assert all(pair["score_chosen"] - pair["score_rejected"] > gap - 0.5 for pair in wide)


def test_the_best_of_n_has_the_largest_score(generated):
    samples, _, _ = generated("--reward_model", LENGTH)
    best, _, _ = generated("--reward_model", LENGTH, "--rows", "best", out="best.jsonl")
    expected = [max(row["score"] for row in samples[start : start + N]) for start in range(0, 5 * N, N)]
    assert [row["score"] for row in best] == expected


def test_top_p_is_another_sample_that_no_batch_size_changes(generated):
    whole, _, _ = generated()
    cut, _, _ = generated("--top_p", "0.5", out="cut.jsonl")
    assert [row["response"] for row in cut] != [row["response"] for row in whole]
    assert generated("--top_p", "0.5", "--batch_size", "1", out="alone.jsonl")[0] == cut


def test_no_batch_size_and_no_kill_changes_a_row(generated, tmp_path):
    whole, _, _ = generated("--batch_size", "16")
    alone, _, _ = generated("--batch_size", "1", out="alone.jsonl")
    assert alone == whole
    kept = tmp_path / ".alone.jsonl.kept" / "responses.jsonl"
    lines = kept.read_bytes().splitlines(keepends=True)
    kept.write_bytes(b"".join(lines[: len(lines) // 2]) + lines[-1][:10])
    (tmp_path / "alone.jsonl").unlink()
    assert generated("--batch_size", "4", out="alone.jsonl")[0] == whole


def test_responses_without_an_end_are_left_out_of_pairs(generated):
    _, code, _ = generated("--reward_model", LENGTH, "--rows", "pairs", "--require_eos", "true")
    samples, _, _ = generated("--reward_model", LENGTH, out="samples.jsonl")
    ended = {row["id"] for row in samples if row["ended"]}
    by_prompt = [sum(f"{row['id'].rpartition('#')[0]}#{k}" in ended for k in range(N)) for row in samples[::N]]
    assert (code == 0) == any(count > 1 for count in by_prompt)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--rows", "pairs"], "reward_model"),
        (["--rows", "best", "--reward_model", LENGTH, "--num_generations", "1"], "num_generations"),
        (["--temperature", "0"], "temperature"),
        (["--temperature", "0", "--num_generations", "1", "--top_p", "0.9"], "top_p"),
        (["--top_p", "0"], "top_p"),
        (["--reward_chat_template", "plain"], "reward_chat_template"),
        (["--rows", "triples"], "rows"),
        (["--nonsense", "1"], "nonsense"),
        (["--out", "."], "out"),
    ],
)
def test_settings_that_contradict_each_other_are_one_line(generated, arguments, key):
    _, code, error = generated(*arguments)
    assert code == 2
    assert error[0].startswith("rlhf-lightning: error: ")
    assert key in error[0]


def test_a_file_that_generate_has_not_written_is_left_alone(generated, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Name a colour."}\n')
    _, code, error = generated(out="prompts.jsonl")
    assert (code, "out: prompts.jsonl" in error[0]) == (2, True)
    assert (tmp_path / "prompts.jsonl").read_text() == '{"prompt": "Name a colour."}\n'
