"""Entries of the cache are whole or absent, made once, made anew when damaged, and removed when nobody reads them."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.data import token_cache, tokenized
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.examples import LoadReport, PreferenceExample, Refusal
from rlhf_lightning.data.selection import TokenizedPairs
from rlhf_lightning.data.sources import WeightedSource
from rlhf_lightning.data.token_cache import cached_directory, content_key, writable_cache
from rlhf_lightning.data.tokenized import PAIR_SCHEMA, TokenStore, tokenize_source, write_store
from rlhf_lightning.data.tokenizer import load_tokenizer
from tests.data.chat_formats import FORMATS
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]
DAY = 24 * 3600


class Maker:
    """Fills an entry with a file and counts how often."""

    def __init__(self, content="whole"):
        self.calls = 0
        self.content = content

    def __call__(self, directory):
        self.calls += 1
        (directory / "file").write_text(self.content)


def names(cache):
    """What lies in the cache, but for the locks: whether they stay is their library's business."""
    return sorted(entry.name for entry in cache.iterdir() if entry.suffix != ".lock")


def test_an_entry_is_made_once_and_then_found(tmp_path):
    make = Maker()
    first, second = (cached_directory("key", make, cache_dir=tmp_path / "new" / "cache") for _ in range(2))
    assert first == second == tmp_path / "new" / "cache" / "key"
    assert (first / "file").read_text() == "whole"
    assert make.calls == 1
    cached_directory("other", make, cache_dir=tmp_path / "new" / "cache")
    assert make.calls == 2


def test_an_entry_whose_making_fails_leaves_nothing_behind(tmp_path):
    def fail(directory):
        (directory / "file").write_text("half")
        raise KeyError("no")

    with pytest.raises(KeyError):
        cached_directory("key", fail, cache_dir=tmp_path)
    assert names(tmp_path) == []
    assert (cached_directory("key", Maker(), cache_dir=tmp_path) / "file").read_text() == "whole"


def run(code, *arguments, **options):
    """A Python process of its own that sees this repository."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **options,
    )


def test_a_process_killed_in_the_middle_leaves_no_entry_and_the_next_clears_up(tmp_path, caplog):
    code = """
import sys, time
from rlhf_lightning.data.token_cache import cached_directory
def make(directory):
    (directory / "file").write_text("half")
    print("writing", flush=True)
    time.sleep(60)
cached_directory("key", make, cache_dir=sys.argv[1])
"""
    with run(code, tmp_path) as process:
        assert process.stdout.readline() == "writing\n"
        (half_made,) = tmp_path.glob(".key.*.part")
        cached_directory("other", Maker(), cache_dir=tmp_path)
        assert half_made.is_dir(), "of a living process"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "key").exists()
    with caplog.at_level("INFO"):
        cached_directory("other", Maker(), cache_dir=tmp_path)
    assert str(half_made) in caplog.text
    assert names(tmp_path) == ["other"]
    make = Maker()
    assert (cached_directory("key", make, cache_dir=tmp_path) / "file").read_text() == "whole"
    assert make.calls == 1


def test_of_two_processes_at_once_one_makes_the_entry_and_the_other_waits_for_it(tmp_path):
    code = """
import os, sys, time
from pathlib import Path
from rlhf_lightning.data.token_cache import cached_directory
cache, here, there = Path(sys.argv[1]), *sys.argv[2:]
def make(directory):
    (directory / "file").write_text("ha")
    time.sleep(0.5)
    (directory / "file").write_text("whole")
    print("made", end=" ")
(cache / here).touch()
while not (cache / there).exists():
    time.sleep(0.01)
print((cached_directory("key", make, cache_dir=cache) / "file").read_text())
"""
    processes = [run(code, tmp_path, *names) for names in (("a", "b"), ("b", "a"))]
    outputs = sorted(process.communicate(timeout=PATIENCE)[0] for process in processes)
    assert outputs == ["made whole\n", "whole\n"]


@pytest.mark.parametrize("damage", ["cut", "emptied", "zeroed", "one byte", "removed", "one more file", "no contents"])
def test_a_damaged_entry_is_recognized_and_made_anew(tmp_path, damage, caplog):
    make = Maker("whole" * 1000)
    file = cached_directory("key", make, cache_dir=tmp_path) / "file"
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    if damage == "cut":
        os.truncate(file, middle)
    elif damage == "emptied":
        os.truncate(file, 0)
    elif damage == "zeroed":
        file.write_bytes(bytes(len(content)))
    elif damage == "one byte":
        content[middle] ^= 1
        file.write_bytes(content)
    elif damage == "removed":
        file.unlink()
    elif damage == "one more file":
        (file.parent / "more").touch()
    else:
        (file.parent / "contents.json").write_text("{")
    with caplog.at_level(logging.WARNING, "rlhf_lightning"):
        again = cached_directory("key", make, cache_dir=tmp_path)
    assert caplog.messages == [f"{again}: this cache entry is damaged, so it is made again"]
    assert make.calls == 2
    assert names(again) == ["contents.json", "file"]
    assert file.read_text() == make.content
    cached_directory("key", make, cache_dir=tmp_path)
    assert make.calls == 2


def aged(path, days):
    os.utime(path, (time.time() - days * DAY,) * 2)


def test_what_nobody_has_read_for_thirty_days_is_removed_when_something_is_made(tmp_path):
    for key in ("old", "young", "used"):
        cached_directory(key, Maker(), cache_dir=tmp_path)
    for name, days in (("old", 30.1), ("young", 29.9), ("used", 99)):
        aged(tmp_path / name, days)
        (tmp_path / f"{name}.lock").touch()
        aged(tmp_path / f"{name}.lock", days)
    cached_directory("used", Maker(), cache_dir=tmp_path)
    assert (tmp_path / "old").exists()
    cached_directory("new", Maker(), cache_dir=tmp_path)
    assert names(tmp_path) == ["new", "used", "young"]
    assert not (tmp_path / "old.lock").exists()


def test_the_lock_of_an_entry_stays_while_it_is_made(tmp_path):
    """Without it a third process would take a new lock of the same name and make the entry too."""
    lock = tmp_path / "key.lock"
    lock.touch()
    aged(lock, 31)

    def make(directory):
        cached_directory("other", Maker(), cache_dir=tmp_path)
        assert lock.exists()

    cached_directory("key", make, cache_dir=tmp_path)


def test_an_old_entry_that_vanishes_meanwhile_stops_nobody(tmp_path, monkeypatch):
    cached_directory("old", Maker(), cache_dir=tmp_path)
    aged(tmp_path / "old", 31)

    def gone(path):
        raise FileNotFoundError(path)

    with monkeypatch.context() as patch:
        patch.setattr(token_cache.shutil, "rmtree", lambda path, ignore_errors=False: ignore_errors or gone(path))
        cached_directory("new", Maker(), cache_dir=tmp_path)
    assert (tmp_path / "new" / "file").exists()


def test_where_the_cache_cannot_be_written_a_temporary_directory_takes_its_place(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.touch()
    elsewhere = writable_cache(file / "cache")  # a directory below a file can never be made
    assert elsewhere.is_dir()
    assert elsewhere == writable_cache(file / "another")  # one for the process
    make = Maker()
    for _ in range(2):
        assert cached_directory("only here", make, cache_dir=file / "cache").parent == elsewhere
    assert make.calls == 1
    monkeypatch.setattr(token_cache.os, "access", lambda *_: False)  # a cache that others own; root may write anywhere
    assert writable_cache(tmp_path) == elsewhere


def test_the_cache_lies_where_the_system_keeps_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert writable_cache() == tmp_path / "xdg" / "rlhf_lightning" / "tokens"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert writable_cache() == tmp_path / "home" / ".cache" / "rlhf_lightning" / "tokens"
    assert writable_cache("~/mine") == tmp_path / "home" / "mine"


def test_a_key_changes_with_every_part_and_with_the_code(monkeypatch):
    keys = {content_key(*parts) for parts in (("a", "b"), ("ab",), ("a", ("b",)), ("a", "c"), ("b", "a"))}
    assert len(keys) == 5
    assert content_key("a", [1]) == content_key("a", [1])
    before = content_key("a")
    token_cache._code.cache_clear()
    version = token_cache.importlib.metadata.version
    for library in ("tokenizers", "transformers", "jinja2", "pyarrow"):
        with monkeypatch.context() as patch:
            patch.setattr(token_cache.importlib.metadata, "version", lambda n, o=library: version(n) + "x" * (n == o))
            assert content_key("a") != before
        token_cache._code.cache_clear()
    assert content_key("a") == before
    with monkeypatch.context() as patch:
        read = Path.read_bytes
        patch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "chat_format.py"))
        token_cache._code.cache_clear()
        assert content_key("a") != before
    token_cache._code.cache_clear()


QWEN = FORMATS["qwen"].chat_format


def pair(prompt="Hi", chosen="Well.", rejected="No!", row=0, margin=None):
    return PreferenceExample([{"role": "user", "content": prompt}], chosen, rejected, margin, f"id-{row}", f"row {row}")


def stored(directory, rows, *, chunk_rows=2048, chat_format=QWEN):
    """A store of rows, in record batches of so many."""
    directory.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenized, "_CHUNK_ROWS", chunk_rows)
        write_store(directory, rows, LoadReport("rows", len(rows)), chat_format)
    return TokenStore(directory)


@pytest.mark.parametrize("file", ["rows.arrow", "report.json"])
def test_token_ids_damaged_on_disk_are_made_anew(tmp_path, file):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"p {n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(50)))
    source = WeightedSource(str(rows))
    before = tokenize_source(source, QWEN, cache_dir=tmp_path / "cache")
    damaged = before.directory / file
    content = damaged.read_bytes()
    for harm in (content[: len(content) // 2], b"", bytes(len(content))):
        damaged.unlink()  # `before` keeps its own map
        damaged.write_bytes(harm)
        again = tokenize_source(source, QWEN, cache_dir=tmp_path / "cache")
        assert again.directory == before.directory
        assert damaged.read_bytes() == content
        assert [ids.tolist() for ids in again.segments(49)] == [ids.tolist() for ids in before.segments(49)]


def test_rows_lie_in_record_batches_and_are_found_across_their_borders(tmp_path):
    rows = [pair(f"prompt {n}", "a" * (n + 1), "b", row=n) for n in range(11)]
    store, whole = stored(tmp_path / "many", rows, chunk_rows=3), stored(tmp_path / "one", rows)
    assert [len(chunk) for chunk in store._table.column("prompt").chunks] == [3, 3, 3, 2]
    assert [len(chunk) for chunk in whole._table.column("prompt").chunks] == [11]
    assert len(store) == 11
    assert store.lengths.tolist() == whole.lengths.tolist()
    for name in set(PAIR_SCHEMA.names) - {"prompt", "chosen", "rejected", "origin", "example_id"}:
        np.testing.assert_array_equal(store.numbers(name), whole.numbers(name))
    assert store.texts("origin", np.array([10, 3, 2])) == ["row 10", "row 3", "row 2"]
    for row in range(11):
        for a, b in zip(store.segments(row), whole.segments(row), strict=True):
            assert a.tolist() == b.tolist()


def test_a_few_giant_rows_end_a_record_batch_early(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenized, "_CHUNK_CHARACTERS", 100)
    rows = [pair("p" * 60, "a" * 30, "b" * 30), pair(row=1), pair("p" * 101, row=2), pair(row=3), pair(row=4)]
    store = stored(tmp_path / "store", rows)
    assert [len(chunk) for chunk in store._table.column("prompt").chunks] == [1, 2, 2]


def test_batches_without_a_usable_row_change_nothing(tmp_path):
    bad = [Refusal("empty_prompt", f"row {n}: no", f"row {n}") for n in range(4)]
    store = stored(tmp_path / "store", [*bad[:2], pair(row=7), *bad[2:], pair("Ho", row=8)], chunk_rows=2)
    assert len(store) == 2
    assert [store.texts("origin", np.array([row])) for row in (0, 1)] == [["row 7"], ["row 8"]]
    assert [QWEN.tokenizer.decode(store.segments(row)[0]) for row in (0, 1)] == [
        QWEN.prompt_text([{"role": "user", "content": text}]) for text in ("Hi", "Ho")
    ]
    assert store.report.bad_rows == {"empty_prompt": ["row 0", "row 1", "row 2", "row 3"]}


@pytest.mark.parametrize("rows", [[], [Refusal("empty_prompt", "row 0: no", "row 0")]])
def test_a_store_may_be_empty(tmp_path, rows):
    store = stored(tmp_path / "store", rows)
    assert len(store) == 0
    assert store.lengths.shape == (0, 3)
    assert store.numbers("margin").shape == (0,)
    assert store.texts("origin", np.array([], dtype=np.int64)) == []
    pairs = TokenizedPairs(
        [store, stored(tmp_path / "other", [pair()])], [np.array([], int), np.array([0])], max_length=9
    )
    assert pairs.segments(0)[1].tolist() == QWEN.token_ids(["Well."])[0] + [QWEN.eos_id]


def test_a_store_travels_to_a_worker_process_as_the_name_of_its_directory(tmp_path):
    store = stored(tmp_path / "store", [pair(f"prompt {n}", row=n, margin=n / 4) for n in range(500)])
    pairs = TokenizedPairs([store], [np.arange(0, 500, 100)], max_length=1000)
    assert len(pickle.dumps(store)) < 200 + len(str(tmp_path))
    copy = pickle.loads(pickle.dumps(pairs))
    assert len(copy) == 5
    assert copy.example_ids == [f"id-{n}" for n in range(0, 500, 100)]
    assert copy.margin.tolist() == pairs.margin.tolist() == [0, 25, 50, 75, 100]
    for index in range(5):
        for a, b in zip(copy.segments(index), pairs.segments(index), strict=True):
            assert a.tolist() == b.tolist()
    assert copy.stores[0].report == store.report


def test_token_ids_stay_in_the_mapped_file(tmp_path):
    """Every array of ids that a store hands out, and holds, is a view into the map; none is a copy in memory."""
    import pyarrow as pa

    before = pa.total_allocated_bytes()
    store = stored(tmp_path / "store", [pair(f"prompt {n} " * 50, row=n) for n in range(300)], chunk_rows=100)
    assert sum(store._table.column(name).nbytes for name in PAIR_SCHEMA.names) > 300_000
    assert pa.total_allocated_bytes() - before < 20_000
    for name, lists in store._columns.items():
        for chunk, (offsets, ids) in zip(store._table.column(name).chunks, lists, strict=True):
            assert not ids.flags.owndata
            assert not offsets.flags.owndata
            assert np.shares_memory(ids, np.frombuffer(chunk.buffers()[3], dtype=np.int32))
    for ids in store.segments(150):
        assert not ids.flags.owndata
        assert not ids.flags.writeable


def test_a_margin_that_is_not_said_is_nan_in_the_store_and_zero_in_the_pairs(tmp_path):
    rows = [pair(row=n, margin=margin) for n, margin in enumerate([None, -1.5, 0.0, None])]
    store = stored(tmp_path / "store", rows, chunk_rows=3)
    np.testing.assert_array_equal(store.numbers("margin"), np.array([np.nan, -1.5, 0, np.nan], dtype=np.float32))
    pairs = TokenizedPairs([store], [np.arange(4)], max_length=1000)
    assert pairs.margin.tolist() == [0, -1.5, 0, 0]
    assert pairs.margin.dtype == np.float32


@pytest.fixture(scope="module")
def subwords(tiny_qwen2):
    """A chat format whose tokens are longer than a byte."""
    return ChatFormat(load_tokenizer(str(tiny_qwen2)))


text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
example_texts = st.tuples(text, text, text).filter(lambda texts: texts[1] != texts[2])


@settings(max_examples=40)
@given(st.lists(example_texts, min_size=1, max_size=7), st.integers(1, 4), st.data())
def test_segments_are_the_encoded_texts_of_their_row(subwords, tmp_path_factory, rows, chunk_rows, data):
    directory = tmp_path_factory.mktemp("store")
    store = stored(
        directory, [pair(*t, row=n) for n, t in enumerate(rows)], chunk_rows=chunk_rows, chat_format=subwords
    )
    tokenizer, end = subwords.tokenizer, subwords.eos_id
    assert len(store) == len(rows)
    for row in data.draw(st.permutations(range(len(rows)))):
        prompt, chosen, rejected = rows[row]
        expected = [f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n", chosen, rejected]
        ids = [tokenizer(one, add_special_tokens=False)["input_ids"] for one in expected]
        assert [segment.tolist() for segment in store.segments(row)] == [ids[0], [*ids[1], end], [*ids[2], end]]


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o775), (0o022, 0o755), (0o077, 0o700)])
def test_an_entry_can_be_read_by_those_whom_the_umask_lets(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        entry = cached_directory("key", Maker(), cache_dir=tmp_path / "cache")
    finally:
        os.umask(before)
    assert stat.S_IMODE(entry.stat().st_mode) == mode
    assert {stat.S_IMODE(file.stat().st_mode) for file in entry.iterdir()} == {mode & 0o666}


def test_a_whole_entry_is_read_where_nothing_can_be_written(tmp_path, monkeypatch):
    """Of another user."""
    entry = cached_directory("key", Maker(), cache_dir=tmp_path)

    def refused(*_, **__):
        raise PermissionError

    monkeypatch.setattr(token_cache.FileLock, "acquire", refused)
    monkeypatch.setattr(token_cache.os, "access", lambda *_: False)
    monkeypatch.setattr(token_cache.os, "utime", refused)
    make = Maker()
    assert cached_directory("key", make, cache_dir=tmp_path) == entry
    assert make.calls == 0


@pytest.mark.parametrize("foreign", ["lock", "damaged entry"])
def test_what_another_user_has_in_the_way_is_named_and_a_temporary_directory_taken(
    tmp_path, monkeypatch, caplog, foreign
):
    entry = cached_directory("key", Maker(), cache_dir=tmp_path)
    (entry / "file").write_text("damaged")
    acquire, remove = token_cache.FileLock.acquire, token_cache.shutil.rmtree

    def acquired(lock, *arguments, **named):
        if foreign == "lock" and str(tmp_path) in str(lock.lock_file):
            raise PermissionError
        return acquire(lock, *arguments, **named)

    def removed(path, **named):
        if tmp_path not in Path(path).parents:
            remove(path, **named)

    monkeypatch.setattr(token_cache.FileLock, "acquire", acquired)
    monkeypatch.setattr(token_cache.shutil, "rmtree", removed)
    found = cached_directory("key", Maker(), cache_dir=tmp_path)
    assert found.parent == token_cache.temporary_directory()
    assert (found / "file").read_text() == "whole"
    assert f"{tmp_path / 'key'}" in caplog.text
    assert "belongs to another user" in caplog.text
