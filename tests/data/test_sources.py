"""Files, directories and hub data sets as rows, and one clear line for each that cannot be read."""

from __future__ import annotations

import csv
import gzip
import json
import tracemalloc
import zlib

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from rlhf_lightning.data import DataError, file_rows, load_preferences
from rlhf_lightning.data.sources import WeightedSource, described, fingerprint, has_split, read_rows, source_list

ROWS = [
    {"prompt": "Hi", "chosen": 'One, "two"\nthree; four', "rejected": "Nö\t5\r\n6"},
    {"prompt": "Ho", "chosen": "NaN", "rejected": "23"},
]


def jsonl(rows=ROWS, end="\n"):
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(path, delimiter, rows=ROWS):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def parquet(path, kind):
    schema = pyarrow.schema([(name, kind) for name in ROWS[0]])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS, schema=schema), path)


WRITERS = {
    "pairs.jsonl": lambda path: path.write_bytes(jsonl()),
    "pairs.JSONL": lambda path: path.write_bytes(jsonl()),
    "blank_lines.jsonl": lambda path: path.write_bytes(b"\n" + jsonl(end="\n \n")),
    "windows.jsonl": lambda path: path.write_bytes(jsonl(end="\r\n")),
    "no_last_line_end.jsonl": lambda path: path.write_bytes(jsonl().rstrip(b"\n")),
    "bom.jsonl": lambda path: path.write_bytes(b"\xef\xbb\xbf" + jsonl()),
    "pairs.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl())),
    "pairs.json": lambda path: path.write_text(json.dumps(ROWS), encoding="utf-8-sig"),
    "pairs.csv": lambda path: table(path, ","),
    "pairs.tsv": lambda path: table(path, "\t"),
    "bom.csv": lambda path: (table(path, ","), path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())),
    "string.parquet": lambda path: parquet(path, pyarrow.string()),
    "large_string.parquet": lambda path: parquet(path, pyarrow.large_string()),
    "dictionary.parquet": lambda path: parquet(path, pyarrow.dictionary(pyarrow.int32(), pyarrow.string())),
}


def says(text):
    return [{"role": "assistant", "content": text}]


MIXED = [
    {"prompt": 'Say "hi"\nplease', "chosen": 'He said "yes".\nThen left.', "rejected": says('"No"')},
    {"prompt": [{"role": "user", "content": "Q?"}], "chosen": says("A\n"), "rejected": "B"},
    {"prompt": "z", "chosen": "a", "rejected": None},
]
INSIDE = [
    {"prompt": "Q", "chosen": [{"role": "assistant", "content": 'say "x"'}], "rejected": "no"},
    {"prompt": "R", "chosen": [{"role": "assistant", "content": ["a", "part"]}], "rejected": "no"},
]


@pytest.mark.parametrize("rows", [MIXED, INSIDE], ids=["columns", "inside turns"])
def test_columns_of_mixed_types_that_datasets_writes_hold_the_values_of_the_jsonl(tmp_path, rows):
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.parquet"
    lines.write_bytes(jsonl(rows))
    loaded = datasets.load_dataset("json", data_files=str(lines), split="train", cache_dir=str(tmp_path / "cache"))
    loaded.to_parquet(str(table))
    assert "arrow.json" in str(pyarrow.parquet.read_schema(table))  # or this is no such file
    assert [row.values for row in read_rows(table)] == [row.values for row in read_rows(lines)] == rows
    (of_lines, report), (of_table, other) = (load_preferences(file, on_bad_rows="drop") for file in (lines, table))
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in of_table] == [
        (pair.prompt, pair.chosen, pair.rejected) for pair in of_lines
    ]
    assert report.rows_kept == other.rows_kept > 0
    assert {reason: len(found) for reason, found in report.bad_rows.items()} == {
        reason: len(found) for reason, found in other.bad_rows.items()
    }


def test_json_inside_lists_and_structs_of_a_table_is_decoded_and_broken_json_named(tmp_path):
    kind = pyarrow.list_(pyarrow.struct([("a", pyarrow.json_()), ("b", pyarrow.large_list(pyarrow.json_()))]))
    values = [[{"a": '"x"', "b": ["1", None]}, {"a": None, "b": None}, None], None]
    path = tmp_path / "nested.parquet"
    storage = pyarrow.list_(pyarrow.struct([("a", pyarrow.string()), ("b", pyarrow.large_list(pyarrow.string()))]))
    pyarrow.parquet.write_table(pyarrow.table({"c": pyarrow.array(values, storage).cast(kind), "d": [1, 2]}), path)
    assert [row.values for row in read_rows(path)] == [
        {"c": [{"a": "x", "b": [1, None]}, {"a": None, "b": None}, None], "d": 1},
        {"c": None, "d": 2},
    ]
    broken = pyarrow.array(['{"a":'], pyarrow.string()).cast(pyarrow.json_())
    pyarrow.parquet.write_table(pyarrow.table({"prompt": broken}), path)
    with pytest.raises(DataError, match=r"nested.parquet, column prompt: not valid JSON"):
        list(read_rows(path))


@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "chosen": "first", "rejected": "b", "chosen": "last"}',
        '{"prompt": "a", "chosen": {"role": "assistant", "content": "x", "content": "y"}, "rejected": "b"}',
    ],
)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_key_that_stands_twice_is_refused(tmp_path, line, name):
    path = tmp_path / name
    path.write_bytes(jsonl() + line.encode() if name.endswith("l") else f"[{line}]".encode())
    with pytest.raises(DataError, match=r"rows.json.*: duplicate key '(chosen|content)' in one object"):
        list(read_rows(path))


KINDS = {
    "parquet as jsonl": ("a.jsonl", "parquet", r"by its first bytes it is a parquet file; name it .parquet"),
    "parquet as csv": ("a.csv", "parquet", r"is a parquet file; name it .parquet"),
    "parquet as gz": ("a.jsonl.gz", "parquet", r"is a parquet file; name it .parquet"),
    "jsonl as parquet": ("a.parquet", jsonl(), r"is called .parquet, but begins as JSON does; name it .jsonl"),
    "json as parquet": ("a.parquet", b" \n" + json.dumps(ROWS).encode(), r"begins as JSON does"),
    "gzip as jsonl": ("a.jsonl", gzip.compress(jsonl()), r"it is gzip data; name it .jsonl.gz"),
    "gzip as json": ("a.json", gzip.compress(jsonl()), r"it is gzip data"),
    "gzip as parquet": ("a.parquet", gzip.compress(jsonl()), r"it is gzip data"),
    "a spreadsheet": ("a.csv", b"PK\x03\x04rest", r"a zip archive or a spreadsheet; save it as one of .jsonl"),
    "text as gz": ("a.jsonl.gz", jsonl(), r"no gzip data; name it without .gz"),
    "junk after gzip": ("a.jsonl.gz", gzip.compress(jsonl()) + b"junk", r"after valid gzip data come bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message"), KINDS.values(), ids=KINDS)
def test_a_file_of_another_kind_than_its_name_says_is_told_what_it_is(tmp_path, name, content, message):
    path = tmp_path / name
    if content == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    else:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_rows(path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name):
    path = tmp_path / name
    WRITERS[name](path)
    rows = list(read_rows(path))
    assert [row.values for row in rows] == ROWS
    assert [row.example_id for row in rows] == [f"{name}:0", f"{name}:1"]
    assert [row.origin for row in rows] == [f"{path}, row 0", f"{path}, row 1"]
    assert [row.values for row in read_rows(str(path))] == ROWS


def test_a_cell_may_be_longer_than_the_limit_of_the_csv_module(tmp_path):
    csv.field_size_limit(131_072)
    table(tmp_path / "long.csv", ",", [{"prompt": "x" * 200_000, "chosen": "a", "rejected": "b"}])
    assert len(next(iter(read_rows(tmp_path / "long.csv"))).values["prompt"]) == 200_000
    list(read_rows(tmp_path / "long.csv"))
    assert csv.field_size_limit() == 131_072


def test_separators_of_unicode_do_not_end_a_line(tmp_path):
    rows = [{"prompt": "a\u2028b\u2029c\u0085d\x0b", "chosen": "a", "rejected": "b"}]
    (tmp_path / "pairs.jsonl").write_bytes(jsonl(rows))
    assert [row.values for row in read_rows(tmp_path / "pairs.jsonl")] == rows


cut_gzip = gzip.compress(jsonl(ROWS * 200))
broken_gzip = bytearray(cut_gzip)
broken_gzip[20:40] = b"\xff" * 20
BAD_FILES = {
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n \n", "is empty"),
    "empty.json": (b"[]", "is empty"),
    "header_only.csv": (b"prompt,chosen,rejected\n", "is empty"),
    "empty.csv": (b"", "is empty"),
    "latin1.jsonl": (b"\n" + jsonl()[:-1] + b"\xff\n", r"line 3: not UTF-8 text \(byte 0xff\); save the file as UTF-8"),
    "late.jsonl": (jsonl(ROWS * 500) + b"\xe9\n", r"line 1001: not UTF-8 text \(byte 0xe9\)"),
    "latin1.json": (b'["\xe9"]', r"not UTF-8 text \(byte 0xe9\)"),
    "latin1.csv": (b"prompt,chosen\n\xe9,x\n", r"not UTF-8 text \(byte 0xe9\)"),
    "cut_line.jsonl": (jsonl()[:-9], "line 2: not valid JSON"),
    "list_line.jsonl": (b"[1]\n", "line 1: holds a list, not an object with columns"),
    "null_line.jsonl": (b"null\n", "line 1: holds null, not an object"),
    "long_number.jsonl": (b'{"margin": ' + b"1" * 5000 + b"}\n", "line 1: not valid JSON"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 200_000 + b"\n", "line 1: not valid JSON"),
    "not_gzip.jsonl.gz": (jsonl(), "no gzip data; name it without .gz"),
    "cut.jsonl.gz": (cut_gzip[:-20], "cannot be read .*may be cut short"),
    "broken.jsonl.gz": (bytes(broken_gzip), "cannot be read .*check the file"),
    "unclosed.json": (json.dumps(ROWS)[:-1].encode(), "not valid JSON"),
    "object.json": (b'{"data": []}', "holds a dict, not a list of rows; write .* or use .jsonl"),
    "strings.json": (b'["a"]', "row 0: holds a str, not an object"),
    "semicolons.csv": (
        *(b"prompt;chosen;rejected\na;b;c\n",),
        "the delimiter is not ',': the only column found is 'prompt;chosen;rejected'",
    ),
    "commas.tsv": (b"prompt,chosen,rejected\na,b,c\n", r"the delimiter is not '\\t': the only column"),
    "unquoted.csv": (b"prompt,chosen\na,b\na,b,c\n", "row 1: more cells than the header has columns; quote the text"),
    "unclosed_quote.csv": (b'prompt,chosen\n"a,b\n', "not well-formed ','-separated text"),
    "twice.csv": (b"prompt,chosen,chosen\na,b,c\n", "two columns are called 'chosen'; rename one"),
    "no_parquet.parquet": (b"PAR1 and so on", "not a readable parquet file"),
}


LISTS = [
    json.dumps(ROWS),
    json.dumps(ROWS, indent=4, ensure_ascii=False) + "\n \n",
    ' \r\n[ {"a": [1, [], {}], "b": "],{\\"[\\\\"}\t, {"a": -1.5e3, "b": null} ]',
    "[]",
    "[\n ]",
]
NO_LISTS = [
    '[{"a": 1},]',
    '[{"a": 1}] x',
    '[{"a": 1}, {"a": 2, "a": 3}]',
    '[{"a": 1} {"a": 2}]',
    '[{"a": 1}',
    '{"a": 1}',
    "",
]


@pytest.mark.parametrize("characters", [1, 2, 7, 64, 1 << 20])
def test_a_list_read_in_parts_holds_what_its_whole_text_holds(tmp_path, monkeypatch, characters):
    monkeypatch.setattr(file_rows, "_JSON_CHARACTERS", characters)
    file = tmp_path / "rows.json"
    for text in LISTS:
        file.write_text(text, encoding="utf-8-sig")
        assert list(file_rows._list_items(file)) == json.loads(text)
    for text in NO_LISTS:
        file.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match=r"rows\.json: (not valid JSON|duplicate key 'a'|holds a dict)"):
            list(file_rows._list_items(file))


def test_the_memory_to_read_a_list_does_not_grow_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(file_rows, "_JSON_CHARACTERS", 1000)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS * 5000), encoding="utf-8")
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_rows(tmp_path / "rows.json")) == 10_000
        assert tracemalloc.get_traced_memory()[1] < 100_000 < (tmp_path / "rows.json").stat().st_size / 5
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("policy", ["error", "drop"])
def test_a_file_that_cannot_be_read_is_refused_in_one_line_that_names_it(tmp_path, name, policy):
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}.*{message}") as caught:
        load_preferences(tmp_path / name, on_bad_rows=policy)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_damaged_gzip_is_one_that_zlib_itself_refuses():
    with pytest.raises(zlib.error):
        gzip.decompress(bytes(broken_gzip))


def test_a_short_row_of_a_table_lacks_a_value(tmp_path):
    (tmp_path / "short.csv").write_text("prompt,chosen,rejected\na,b,c\na,b\n", encoding="utf-8")
    with pytest.raises(DataError, match="row 1: rejected absent or null"):
        load_preferences(tmp_path / "short.csv")


def test_an_unknown_kind_of_file_is_refused_with_those_we_know(tmp_path):
    (tmp_path / "pairs.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"pairs.txt: unknown kind of file; use one of .jsonl, .jsonl.gz, .json, .csv"):
        list(read_rows(tmp_path / "pairs.txt"))


@pytest.mark.parametrize("name", ["./pairs", "/no/where", "~/no-such-file", "a/b/c", "pairs.jsonl", "x/y.csv", "a b"])
def test_a_path_that_does_not_exist_is_refused_as_a_path(name):
    with pytest.raises(DataError, match=f"{name}: no such file or directory; check the path"):
        list(read_rows(name))


def prompts(source, split="train"):
    return [row.values["prompt"] for row in read_rows(source, split=split)]


@pytest.fixture
def directory(tmp_path):
    """Makes a directory of files, each with one row whose prompt is the file's name."""

    def make(*names):
        for name in names:
            (tmp_path / name).write_bytes(jsonl([{"prompt": name, "chosen": "a", "rejected": "b"}]))
        return tmp_path

    return make


def test_a_directory_gives_the_files_of_the_split_by_name(directory):
    source = directory(
        *("train-00001-of-2.jsonl", "train-00000-of-2.jsonl", "train_more.jsonl", "Validation.jsonl", "dev.jsonl"),
        *("test.jsonl", "notes.jsonl", "training_log.jsonl", "readme.md", ".train.jsonl"),
    )
    assert prompts(source) == ["train-00000-of-2.jsonl", "train-00001-of-2.jsonl", "train_more.jsonl"]
    assert prompts(source, "val") == ["Validation.jsonl", "dev.jsonl"]
    assert prompts(source, "test") == ["test.jsonl"]
    assert [has_split(source, split) for split in ("train", "val", "test")] == [True, True, True]


def test_without_a_training_file_the_files_of_no_split_are_for_training(directory):
    source = directory("a.jsonl", "b.jsonl", "val.jsonl", "test.jsonl", ".hidden.jsonl", "readme.md")
    assert prompts(source) == ["a.jsonl", "b.jsonl"]
    assert prompts(source, "val") == ["val.jsonl"]
    assert not has_split(source, "train")


def test_files_named_after_no_split_serve_any_role(directory):
    source = directory("a.jsonl", "b.jsonl")
    assert prompts(source, "val") == prompts(source, "train") == ["a.jsonl", "b.jsonl"]
    assert not has_split(source, "val")


@pytest.mark.parametrize(
    ("names", "split"), [([], "train"), (["readme.md"], "train"), (["val.jsonl"], "train"), (["train.jsonl"], "val")]
)
def test_a_directory_without_files_of_the_split_is_refused_with_advice(directory, names, split):
    with pytest.raises(DataError, match=rf"the directory holds no {split} file; name one {split}.jsonl .*file itself"):
        list(read_rows(directory(*names), split=split))


def test_an_empty_file_of_a_directory_is_refused_by_name(directory, tmp_path):
    directory("train-0.jsonl")
    (tmp_path / "train-1.jsonl").write_bytes(b"")
    with pytest.raises(DataError, match=r"train-1.jsonl: the file is empty"):
        list(read_rows(tmp_path))


class Hub:
    """Stands in for the hub: data sets of one row per split, whose prompt names the split."""

    def __init__(self, *splits):
        self.splits = list(splits)

    def get_dataset_split_names(self, name):
        if name != "owner/pairs":
            raise FileNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")
        return self.splits

    def load_dataset(self, name, split):
        if split not in self.get_dataset_split_names(name):
            raise ValueError(f'Unknown split "{split}".')
        if split == "hollow":
            return datasets.Dataset.from_list([])
        return datasets.Dataset.from_list([{"prompt": split, "chosen": "a", "rejected": "b"}] * 2)


@pytest.fixture
def hub(monkeypatch):
    def make(*splits):
        stand_in = Hub(*splits)
        for function in ("load_dataset", "get_dataset_split_names"):
            monkeypatch.setattr(datasets, function, getattr(stand_in, function))

    return make


@pytest.mark.parametrize(
    ("splits", "split", "used"),
    [
        (("train", "test"), "train", "train"),
        (("train", "test"), "test", "test"),
        (("train", "test"), "val", "test"),
        (("test", "train", "validation"), "val", "validation"),
        (("dev", "train"), "val", "dev"),
    ],
)
def test_a_hub_name_gives_the_split_of_the_role(hub, splits, split, used):
    hub(*splits)
    rows = list(read_rows("owner/pairs", split=split))
    assert [row.values["prompt"] for row in rows] == [used, used]
    assert [row.origin for row in rows] == [f"owner/pairs:{used}, row 0", f"owner/pairs:{used}, row 1"]
    assert [row.example_id for row in rows] == [f"owner/pairs:{used}:0", f"owner/pairs:{used}:1"]


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_a_split_named_in_the_source_is_taken_for_any_role(hub, split):
    hub("train_prefs", "train")
    assert prompts("owner/pairs:train_prefs", split) == ["train_prefs"] * 2
    assert not has_split("owner/pairs", "val")


def test_a_hub_set_without_the_split_is_refused_with_those_it_has(hub):
    hub("train_prefs", "train_sft")
    message = "owner/pairs: has no train split, only train_prefs, train_sft; name one: owner/pairs:SPLIT"
    with pytest.raises(DataError, match=message):
        list(read_rows("owner/pairs"))


def test_what_is_neither_here_nor_on_the_hub_is_refused_in_one_line(hub):
    hub("train")
    for name in ("owner/other", "pairs", "owner/pairs:nowhere"):
        with pytest.raises(DataError, match=f"{name.split(':')[0]}: no file or directory here, and no hub") as caught:
            list(read_rows(name))
        assert "\n" not in str(caught.value)


def test_an_empty_hub_split_is_refused(hub):
    hub("hollow")
    with pytest.raises(DataError, match="owner/pairs:hollow: the split is empty"):
        list(read_rows("owner/pairs:hollow"))


@pytest.mark.parametrize("ask", [lambda name: list(read_rows(name)), lambda name: has_split(name, "val"), fingerprint])
def test_a_name_that_no_path_can_have_is_refused_in_one_line(ask):
    for name, reason in (("x" * 300, "File name too long"), ("~nobody-lives-here/pairs.jsonl", "home directory")):
        with pytest.raises(DataError, match=rf"{name[:50]}.*no file or directory can be called so .*{reason}"):
            ask(name)


def test_a_file_that_cannot_be_opened_is_refused_by_name(tmp_path, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_bytes(jsonl())

    def denied(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr("pathlib.Path.open", denied)
    with pytest.raises(DataError, match=r"pairs.jsonl: cannot be read .*Permission denied.*check the file"):
        fingerprint(str(file))


def test_the_fingerprint_of_a_source_changes_with_rows_names_and_split_alone(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for directory in (first, second):
        directory.mkdir()
        (directory / "x.jsonl").write_bytes(jsonl())
    before = fingerprint(str(first))
    assert before == fingerprint(str(first))
    assert len({before, fingerprint(str(second)), fingerprint(str(first), split="val")}) == 3
    (first / "x.jsonl").rename(first / "y.jsonl")  # ids and origins name the file
    assert fingerprint(str(first)) != before
    (first / "y.jsonl").rename(first / "x.jsonl")
    (first / "notes.md").write_text("not read")
    assert fingerprint(str(first)) == before
    (first / "x.jsonl").write_bytes(jsonl(ROWS[:1]))
    assert fingerprint(str(first)) != before


def test_a_table_of_two_columns_of_one_name_is_refused_in_parquet_too(tmp_path):
    one = pyarrow.array(["a"])
    table = pyarrow.Table.from_arrays([one] * 4, names=["prompt", "chosen", "rejected", "chosen"])
    pyarrow.parquet.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match=r"twice.parquet: two columns are called 'chosen'; rename one"):
        list(read_rows(tmp_path / "twice.parquet"))


def test_a_date_that_python_cannot_hold_is_refused_by_file(tmp_path):
    columns = {name: ["a"] for name in ROWS[0]} | {"day": pyarrow.array([10**8], pyarrow.date32())}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "far.parquet")
    with pytest.raises(DataError, match=r"far.parquet: a column holds a value beyond Python's types"):
        list(read_rows(tmp_path / "far.parquet"))


def test_the_fingerprint_of_a_hub_set_is_that_of_its_rows(monkeypatch):
    def fingerprint_of(*texts):
        rows = datasets.Dataset.from_list([{"prompt": text, "chosen": "a", "rejected": "b"} for text in texts])
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name: ["train"])
        monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
        return fingerprint("owner/pairs")

    assert fingerprint_of("x", "y") == fingerprint_of("x", "y")
    assert fingerprint_of("x", "y") != fingerprint_of("x", "z")


@pytest.mark.parametrize(
    ("names", "split", "read"),
    [
        ("alpaca_train.csv alpaca_val.csv", "train", "alpaca_train.csv"),
        ("alpaca_train.csv alpaca_val.csv", "val", "alpaca_val.csv"),
        ("train-00000-of-00001.csv my.dev.csv", "val", "my.dev.csv"),
        ("a.csv b.csv", "train", "a.csv, b.csv"),
    ],
)
def test_a_file_s_split_is_the_first_or_the_last_word_of_its_name(tmp_path, names, split, read):
    for name in names.split():
        (tmp_path / name).write_text("prompt,chosen,rejected\na,b,c\n")
    assert described(str(tmp_path), split=split) == f"{tmp_path} ({read})"
    assert {row.example_id.partition(":")[0] for row in read_rows(tmp_path, split=split)} == set(read.split(", "))


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf"), "2"])
def test_a_weight_that_is_no_positive_number_is_refused_from_python_as_well(weight):
    for one in (
        lambda: WeightedSource("a.jsonl", weight),
        lambda: source_list([{"source": "a.jsonl", "weight": weight}]),
    ):
        with pytest.raises(DataError, match=r"a.jsonl: the weight .* is no positive number"):
            one()
