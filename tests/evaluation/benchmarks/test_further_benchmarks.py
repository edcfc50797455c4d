"""RM-Bench, JudgeBench and M-RewardBench: results of their own functions, refusals, and what a report shows.

`foreign_results.json` was made outside of the project: random scores and verdicts, with ties, and what the benchmarks'
own functions (RM-Bench's `compute_accuracy` by domain, JudgeBench's `compute_final_metrics`) make of them.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from rlhf_lightning.errors import DataError
from rlhf_lightning.evaluation.benchmarks.judgebench import JudgeBench, JudgedJudgeBench
from rlhf_lightning.evaluation.benchmarks.m_rewardbench import MRewardBench
from rlhf_lightning.evaluation.benchmarks.rewardbench import SUBSETS, load_rewardbench, run_rewardbench
from rlhf_lightning.evaluation.benchmarks.rm_bench import RMBench, by_difficulty, wins
from rlhf_lightning.evaluation.settings import EvaluationSettings
from rlhf_lightning.rewards.questions import comparison_question
from rlhf_lightning.rewards.scorers import Scored
from tests.evaluation.benchmarks.test_judges import Scripted
from tests.evaluation.benchmarks.test_runs import LengthScorer, make_rows
from tests.evaluation.conftest import write
from tests.test_evaluate import evaluated  # noqa: F401 (a fixture)

FOREIGN = json.loads(Path(__file__).with_name("foreign_results.json").read_text(encoding="utf-8"))
STYLES = ("concise", "detailed", "markdown")


class Told:
    """Gives to a text the score that the foreign file has for it."""

    name = fingerprint = kind = "told"

    def __init__(self, scores):
        self.scores = scores

    def __call__(self, prompts, responses):
        return [Scored(self.scores[text], 1, False) for text in responses]


def settings(**sources):
    return EvaluationSettings(out="out", benchmarks={name: str(source) for name, source in sources.items()})


def rm_bench_rows():
    """Rows, and the score of each of their responses."""
    rows, scores = [], {}
    for row in FOREIGN["rm_bench"]["rows"]:
        made = {"id": row["id"], "domain": row["domain"], "prompt": f"{row['domain']} {row['id']}?"}
        for side in ("chosen", "rejected"):
            made[side] = [f"{made['prompt']} {side} {style}" for style in STYLES]
            scores |= dict(zip(made[side], row[f"score_{side}"], strict=True))
        rows.append(made)
    return rows, scores


def judgebench_rows():
    """Rows, and the replies of a judge to both orders of each."""
    rows, replies = [], {}
    for number, pair in enumerate(FOREIGN["judgebench"]["pairs"]):
        shown = [f"answer {number} {letter}" for letter in "AB"]
        question = f"question {number}?"
        rows.append(
            {"pair_id": f"p{number}", "source": pair["source"], "question": question, "label": pair["label"]}
            | {"response_A": shown[0], "response_B": shown[1]}
        )
        for responses, decision in zip((shown, shown[::-1]), pair["decisions"], strict=True):
            reply = "I cannot tell." if decision is None else f"[[{decision[0]}]]"
            replies[comparison_question([{"role": "user", "content": question}], responses)] = reply
    return rows, replies


def values(estimates):
    return {name: estimate.value for name, estimate in estimates.items()}


def test_rm_bench_is_what_its_own_function_makes_of_the_scores(tmp_path):
    rows, scores = rm_bench_rows()
    given = settings(rm_bench=write(tmp_path / "rows.jsonl", rows))
    loaded = RMBench().load(given)
    result = RMBench().run(Told(scores), loaded, given)
    found = values(result.domains) | values(result.difficulties) | {"score": result.total.value}
    assert found == pytest.approx(FOREIGN["rm_bench"]["expected"], abs=1e-12)
    assert result.short_domains == {"chat": "5 of 129", "math": "7 of 529", "code": "4 of 228", "safety": "9 of 441"}
    assert "chat: 5 of 129" in RMBench().notes(loaded)[0]
    assert not result.official_files("us/told")


def test_a_tie_is_no_win_and_a_plainer_right_response_is_the_hard_case():
    won = wins([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])
    np.testing.assert_array_equal(won, [[False] * 3, [True, False, False], [True, True, False]])
    assert by_difficulty(won) == {"easy": 1.0, "normal": 0.0, "hard": 0.0}
    assert by_difficulty(won.T) == {"easy": 0.0, "normal": 0.0, "hard": 1.0}


def test_longer_wins_what_is_easy_and_loses_what_is_hard(tmp_path):
    lengths = (3, 9, 27)
    row = {"prompt": "?", "chosen": ["a" * n for n in lengths], "rejected": ["b" * n for n in lengths]}
    rows = [row | {"domain": name, "prompt": f"{name}?"} for name in ("chat", "math", "code", "safety-refuse")]
    given = settings(rm_bench=write(tmp_path / "rows.jsonl", rows))
    result = RMBench().run(LengthScorer(), RMBench().load(given), given)
    assert values(result.difficulties) == {"easy": 1.0, "normal": 0.0, "hard": 0.0}
    assert result.longer == values(result.domains) | values(result.difficulties)
    assert result.total.value == pytest.approx(1 / 3)


def test_rm_bench_without_a_domain_has_no_score(tmp_path):
    rows, scores = rm_bench_rows()
    given = settings(rm_bench=write(tmp_path / "rows.jsonl", [row for row in rows if row["domain"] != "math"]))
    result = RMBench().run(Told(scores), RMBench().load(given), given)
    assert (result.total, result.absent_domains) == (None, ["math"])
    assert result.metrics()["rm_bench/score"] is None


def test_judgebench_is_what_its_own_function_makes_of_the_verdicts(tmp_path):
    rows, replies = judgebench_rows()
    given = settings(judgebench=write(tmp_path / "rows.jsonl", rows))
    result = JudgedJudgeBench().run(Scripted(replies.__getitem__), JudgedJudgeBench().load(given), given)
    found = values(result.categories) | {"score": result.total.value}
    assert found == pytest.approx(FOREIGN["judgebench"]["expected"], abs=1e-12)
    assert result.n_unparsed == sum(pair["decisions"].count(None) for pair in FOREIGN["judgebench"]["pairs"])
    assert result.metrics()["judgebench/score"] == result.total


def test_a_scorer_of_judgebench_is_right_where_the_labelled_response_scores_higher(tmp_path):
    rows, _ = judgebench_rows()
    given = settings(judgebench=write(tmp_path / "rows.jsonl", rows))
    labels = [row["label"] for row in rows]
    scores = {row[f"response_{letter}"]: float(letter == "A") for row in rows for letter in "AB"}
    result = JudgeBench().run(Told(scores), JudgeBench().load(given), given)
    assert result.total.value == pytest.approx(labels.count("A>B") / len(labels))
    equal = JudgeBench().run(Told(dict.fromkeys(scores, 0.0)), JudgeBench().load(given), given)
    assert (equal.total.value, equal.n_ties) == (0.0, len(rows))


def test_m_rewardbench_is_rewardbench_in_each_language(tmp_path):
    """Read from one directory per language, as the data set has them; that of translations is left out."""
    for language in ("ces_Latn", "arb_Arab"):
        (tmp_path / language).mkdir()
        rows = make_rows(2 if language == "ces_Latn" else 3)
        write(tmp_path / language / "test.jsonl", [row | {"language": language} for row in rows])
    (tmp_path / "translation").mkdir()
    given = settings(m_rewardbench=tmp_path)
    result = MRewardBench().run(LengthScorer(), MRewardBench().load(given), given)
    assert list(result.languages) == ["arb_Arab", "ces_Latn"]
    for language, table in result.languages.items():
        alone = run_rewardbench(LengthScorer(), load_rewardbench(tmp_path / language / "test.jsonl"))
        assert table == alone.table
    totals = [table.total.value for table in result.languages.values()]
    assert result.total.value == pytest.approx(sum(totals) / 2)


def test_a_language_without_a_section_leaves_no_mean_over_languages(tmp_path):
    rows = [row | {"language": "fra_Latn"} for row in make_rows(2)]
    rows += [row | {"language": "deu_Latn"} for row in make_rows(2) if SUBSETS[row["subset"]].section != "Safety"]
    given = settings(m_rewardbench=write(tmp_path / "rows.jsonl", rows))
    result = MRewardBench().run(LengthScorer(), MRewardBench().load(given), given)
    assert result.total is None
    assert list(result.subset_scores()) == ["fra_Latn"]


@pytest.mark.parametrize(
    ("benchmark", "change", "says"),
    [
        (RMBench(), {"chosen": ["a", "b"]}, "2 chosen and 3 rejected"),
        (RMBench(), {"domain": "poetry"}, "unknown subset 'poetry'"),
        (JudgeBench(), {"label": "A=B"}, "label is 'A=B'"),
        (JudgeBench(), {"source": "gsm8k"}, "unknown subset 'gsm8k'"),
        (MRewardBench(), {"subset": "ted"}, "unknown subset 'ted'"),
        (MRewardBench(), {"language": None}, "language is null"),
    ],
)
def test_what_is_no_row_of_a_benchmark_is_refused(tmp_path, benchmark, change, says):
    row = {
        "rm_bench": rm_bench_rows()[0][0],
        "judgebench": judgebench_rows()[0][0],
        "m_rewardbench": make_rows(1)[0] | {"language": "fra_Latn"},
    }[benchmark.name]
    with pytest.raises(DataError, match=says):
        benchmark.load(settings(**{benchmark.name: write(tmp_path / "rows.jsonl", [row | change])}))


def test_their_numbers_and_tables_are_in_a_report(here, evaluated, capsys):  # noqa: F811
    sources = {
        "rm_bench": write(here / "rm.jsonl", rm_bench_rows()[0]).name,
        "judgebench": write(here / "judge.jsonl", judgebench_rows()[0]).name,
        "m_rewardbench": write(here / "m.jsonl", [row | {"language": "fra_Latn"} for row in make_rows(1)]).name,
    }
    out, metrics = evaluated("--reward_model", "models/reward", "--benchmarks", json.dumps(sources))
    assert {f"rm/{name}/score" for name in sources} <= set(metrics)
    assert metrics["rm/judgebench/score"]["n"] == 36
    page = (out / "report.md").read_text()
    for caption in ("won comparisons by style", "right responses above wrong ones", "M-RewardBench"):
        assert caption in page
    printed = capsys.readouterr().out
    for title in ("RM-Bench", "JudgeBench (36 pairs)", "M-RewardBench (1 languages)"):
        assert title in printed
