"""Processes that share the rows of an evaluation: each row once, all results everywhere, failures without a hang."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch.distributed as dist

from rlhf_lightning.errors import ConfigurationError, DataError
from rlhf_lightning.evaluation import judge
from rlhf_lightning.evaluation.benchmarks import base
from rlhf_lightning.evaluation.benchmarks.base import BenchmarkRow, score_rows
from rlhf_lightning.evaluation.benchmarks.judged import judge_rewardbench
from rlhf_lightning.evaluation.ranks import ALONE, Ranks, check_devices, launch
from rlhf_lightning.evaluation.store import Ledger
from rlhf_lightning.rewards.scorers import Scored
from tests.evaluation.kept import kept_entries
from tests.evaluation.test_ledger import Entry
from tests.patience import PATIENCE


class Counting:
    """A scorer that tells the length of a response, and writes down what it was asked."""

    name = fingerprint = "lengths"
    kind = "Custom Classifier"

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, responses):
        self.asked += responses
        return [Scored(float(len(response)), len(response), False) for response in responses]


def rows(count: int) -> list[BenchmarkRow]:
    prompt = [{"role": "user", "content": "Hello?"}]
    return [
        BenchmarkRow(f"row-{i}", "hep-rust", prompt, (f"good {i}", f"bad {i}"), 1, f"row {i}") for i in range(count)
    ]


def worker(rank: int, size: int, directory: Path, work) -> None:
    store = f"file://{directory}/store"
    dist.init_process_group("gloo", rank=rank, world_size=size, init_method=store)
    try:
        outcome = work(Ranks(rank, size), directory)
    except Exception as error:
        notes = getattr(error, "__notes__", [])
        outcome = [type(error).__name__, str(error), *notes]
    (directory / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


@pytest.fixture
def together(tmp_path):
    """`work(ranks, directory)` in so many processes; what each returned, or the name and text of its error."""

    def run(size: int, work) -> list:
        context = multiprocessing.get_context("fork")
        (tmp_path / "store").unlink(missing_ok=True)
        processes = [context.Process(target=worker, args=(rank, size, tmp_path, work)) for rank in range(size)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
        assert [process.exitcode for process in processes] == [0] * size
        return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]

    return run


def score(own: Ranks, directory: Path, count: int) -> list:
    scorer = Counting()
    found = score_rows(scorer, rows(count), directory / "scores.jsonl", ranks=own)
    return [[[row.id, row.scores] for row in found], scorer.asked]


@pytest.mark.parametrize(("size", "count"), [(2, 7), (3, 7), (3, 2), (3, 1), (2, 0)])
def test_each_row_is_scored_once_and_all_have_all_scores(together, tmp_path, monkeypatch, size, count):
    """C45: odd numbers, and fewer rows than processes."""
    monkeypatch.setattr(base, "_ROWS_AT_A_TIME", 2)
    outcomes = together(size, lambda own, directory: score(own, directory, count))
    alone = score_rows(Counting(), rows(count))
    assert [outcome[0] for outcome in outcomes] == [[[row.id, row.scores] for row in alone]] * size
    asked = Counter(text for outcome in outcomes for text in outcome[1])
    assert asked == Counter(text for row in rows(count) for text in row.responses)
    if count >= size:
        assert all(outcome[1] for outcome in outcomes), "none of them was idle"
    path = tmp_path / "scores.jsonl"
    assert len(kept_entries(path) if path.exists() else []) == count


def test_what_was_scored_by_other_numbers_of_processes_is_not_scored_again(together):
    together(3, lambda own, directory: score(own, directory, 4))
    outcomes = together(2, lambda own, directory: score(own, directory, 7))
    asked = Counter(text for outcome in outcomes for text in outcome[1])
    assert asked == Counter(text for row in rows(7)[4:] for text in row.responses)


def test_a_judge_is_asked_each_question_once(together, monkeypatch):
    monkeypatch.setattr(judge, "_QUESTIONS_AT_A_TIME", 2)

    def ask(own, directory):
        asked = []

        def verdicts(questions):
            asked.extend(questions)
            return ["[[A]]" if "good 1" in question else "nonsense" for question in questions]

        verdicts.name = verdicts.fingerprint = "judge"
        result = judge_rewardbench(verdicts, rows(5), directory / "kept.jsonl", ranks=own)
        return [result.n_unparsed, [row.chosen_first for row in result.rows], asked]

    first, second = together(2, ask)
    assert first[:2] == second[:2] == [8, [None, "chosen", None, None, None]]
    assert max(Counter(first[2] + second[2]).values()) == 1
    assert len(first[2]) == len(second[2]) == 5


@pytest.mark.parametrize("failing", [0, 2])
def test_a_failure_stops_all_and_is_said_by_process_0(together, failing):
    def fail(own, _):
        def compute(items):
            if own.rank == failing:
                raise DataError("row 5: bad")
            return items

        return own.each(range(9), compute)

    outcomes = together(3, fail)
    assert outcomes[0] == ["DataError", "row 5: bad"]
    assert outcomes[1:] == [["FailedElsewhere", f"process {failing}: row 5: bad"]] * 2


def test_a_process_that_was_killed_is_told_of_in_one_line(tmp_path):
    def work(own, _):
        return own.everywhere(lambda: os.kill(os.getpid(), signal.SIGKILL) if own.rank == 1 else own.rank)

    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=worker, args=(rank, 3, tmp_path, work)) for rank in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(PATIENCE)
    assert processes[1].exitcode == -signal.SIGKILL
    first, third = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 2))
    assert first == [
        "ConfigurationError",
        "evaluate: one of the processes was killed, or hangs; run the same command again to resume",
    ]
    assert third[0] == "FailedElsewhere"


def test_as_many_processes_as_torchrun_has_started(monkeypatch):
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match="devices: 3, but torchrun has started 2 processes"):
        launch("cpu", 3)


def test_a_mistake_of_ours_is_shown_where_it_was_made(together):
    class Odd(Exception):
        def __init__(self, one, two):
            super().__init__(f"{one}{two}")

    def fail(own, _):
        return own.everywhere(lambda: 1 / 0 if own.rank == 1 else 1)

    first, second = together(2, fail)
    assert first[:2] == second[:2] == ["ZeroDivisionError", "division by zero"]
    assert "in fail" in first[2] or "lambda" in first[2]
    assert len(second) == 2, "it has its traceback"

    def fail_oddly(own, _):  # what cannot be sent
        def compute():
            raise Odd("4", "2")

        return own.everywhere(compute if own.rank == 1 else lambda: 1)

    assert together(2, fail_oddly)[0][:2] == ["RuntimeError", "Odd: 42"]


def test_one_process_does_what_is_to_be_done_once(together):
    def work(own, _):
        done = []
        found = own.once(lambda: done.append(own.rank) or own.rank + 5)
        return [found, done]

    assert together(3, work) == [[5, [0]], [5, []], [5, []]]


def test_a_file_is_read_and_written_by_process_0_alone(together, tmp_path):
    def keep(own, directory):
        ledger = Ledger(directory / "kept.jsonl", "maker", Entry, own)
        if own.rank:
            ledger.file = directory / "nobody" / "kept.jsonl"
        ledger.add({"a": Entry(1)})
        return {key: entry.value for key, entry in ledger.known.items()}

    assert together(2, keep) == [{"a": 1}] * 2
    (tmp_path / "kept.jsonl").write_text("something else\n")
    assert [outcome[0] for outcome in together(2, keep)] == ["DataError", "FailedElsewhere"]


def test_one_process_alone_computes_all_and_raises_what_it_raises():
    assert ALONE.each([1, 2], lambda items: [2 * item for item in items]) == [2, 4]
    assert ALONE.each([], lambda items: 1 / 0) == []
    with pytest.raises(ZeroDivisionError):
        ALONE.each([1], lambda items: 1 / 0)
    with pytest.raises(ValueError, match="zip"):
        ALONE.each([1, 2], lambda items: [1, 2, 3])


def test_devices_that_are_not_there_are_refused(monkeypatch):
    check_devices("cpu", 8)
    for device, reason in (("tpv", "not a device"), ("cpu:1", "not a device"), ("cuda", "no CUDA device")):
        with pytest.raises(ConfigurationError, match=reason):
            check_devices(device, 1)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    check_devices("cuda", 2)
    check_devices("cuda:1", 1)
    for device, devices, reason in (
        ("cuda:1", 2, "2 processes cannot share one device"),
        ("cuda", 3, "devices: 3, but there are 2"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            check_devices(device, devices)
