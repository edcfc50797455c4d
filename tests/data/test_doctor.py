"""The doctor says what is in the data, and what it says is what a run would do."""

from __future__ import annotations

import io
import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser

import pytest
from rich.console import Console
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_lightning.data import DataError
from rlhf_lightning.data.chat_export import save_tokenizer
from rlhf_lightning.data.chat_format import ChatFormat
from rlhf_lightning.data.datamodules import PreferenceDataModule
from rlhf_lightning.data.doctor import LIMITS, diagnose
from rlhf_lightning.data.tokenizer import load_tokenizer
from rlhf_lightning.report.doctor import findings, html_page, judgements, print_diagnosis, row_numbers, verdict, visible
from tests.test_readme import example

ROWS = [
    {"prompt": "one", "chosen": "yes sir", "rejected": "no"},
    {"prompt": "two", "chosen": "", "rejected": "no"},
    {"prompt": "one", "chosen": "yes sir", "rejected": "no"},
    {"prompt": "three", "chosen": "a", "rejected": "b"},
    {"prompt": "three", "chosen": "b", "rejected": "a"},
    {"prompt": "four", "chosen": "ends </s> here", "rejected": "no"},
    {"prompt": "five <|im_end|>", "chosen": "yes", "rejected": "no"},
    {"prompt": "word " * 100, "chosen": "yes", "rejected": "no"},
    {"prompt": "six", "chosen": "yes", "rejected": "long " * 100},
]


@pytest.fixture
def source(tmp_path):
    """Makes a file of rows."""

    def write(rows, name="train.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def examine(source, tiny_qwen2, tmp_path):
    def run(rows, *, val=None, roles=("train", "val"), accumulate=1, **options):
        train = source(rows)
        options = {"tokenizer": str(tiny_qwen2), "cache_dir": str(tmp_path / "cache"), "max_length": 64} | options
        held_out = train if val is None else source(val, "val.jsonl")
        data = PreferenceDataModule(train, val=held_out, **options)
        return diagnose(data, roles=roles, accumulate=accumulate)

    return run


def rows_of(origins):
    return [int(origin.rpartition(" ")[2]) for origin in origins]


def test_every_row_that_would_be_left_out_is_named_with_its_reason(examine):
    train, val = examine(ROWS, val=[{"prompt": "THREE ", "chosen": "x", "rejected": "y"}]).roles
    assert {reason: rows_of(origins) for reason, origins in train.bad_rows.items()} == {
        "empty_response": [1],
        "special_tokens": [6],
        "too_long": [8],
    }
    assert (train.rows_read, train.pairs, train.dropped, len(train.messages)) == (9, 6, 3, 3)
    assert rows_of(train.rows_cut) == [7]
    assert (val.rows_read, val.pairs, val.dropped) == (1, 1, 0)


def test_copies_contradictions_leaks_and_length_bias_are_found(examine):
    diagnosis = examine(ROWS, val=[{"prompt": "THREE ", "chosen": "x", "rejected": "y"}])
    train, val = diagnosis.roles
    assert rows_of(train.duplicates) == [2]
    assert rows_of(train.contradictions) == [3, 4]
    assert rows_of(train.foreign_tokens) == [5]
    assert (train.shared_prompts, rows_of(val.shared_prompts)) == (None, [0])
    # Longer chosen: rows 0, 2, 5, 7; ties: 3, 4. Rows 1, 6 and 8 cannot be used.
    assert train.longer_chosen == pytest.approx((4 + 2 * 0.5) / 6)
    assert val.longer_chosen == 0.5


def test_what_is_left_out_is_not_counted_among_the_used_pairs(examine):
    rows = [{"prompt": "x", "chosen": "long " * 100, "rejected": "no"}] * 2 + [ROWS[0]]
    rows += [{"prompt": "x", "chosen": "no", "rejected": "long " * 100}]
    (role,) = examine(rows, roles=("train",)).roles
    assert (role.pairs, role.duplicates, role.contradictions, role.longer_chosen) == (1, [], [], 1.0)
    (role,) = examine(rows, roles=("train",), max_length=500).roles
    assert (rows_of(role.duplicates), rows_of(role.contradictions), role.longer_chosen) == ([1], [0, 1, 3], 0.75)
    _, val = examine(rows, val=[{"prompt": "x", "chosen": "a", "rejected": "b"}]).roles
    assert val.shared_prompts == []  # the only training pairs of that prompt are left out


@pytest.mark.parametrize("truncation", ["left", "drop", "error"])
def test_what_it_says_of_a_max_length_is_what_a_run_with_it_does(examine, source, tiny_qwen2, truncation):
    rows = [{"prompt": "word " * n, "chosen": "yes " * (n % 7 + 1), "rejected": "no"} for n in range(1, 90)]
    (role,) = examine(rows, roles=("train",), max_length=64, truncation=truncation).roles
    assert [limit.max_length for limit in role.limits] == sorted({*LIMITS, 64})
    policy = "drop" if truncation == "error" else truncation
    for limit in role.limits[:2]:
        file = source(rows)
        run = PreferenceDataModule(
            file, val=file, tokenizer=str(tiny_qwen2), max_length=limit.max_length, truncation=policy
        )
        run.setup("fit")
        report = run.reports["train"]
        assert (len(report.rows_cut), report.rows_dropped) == (limit.cut, limit.too_long)
    assert role.limits[0].cut + role.limits[0].too_long > 0
    assert (len(role.rows_cut), role.dropped) == (role.limits[0].cut, role.limits[0].too_long)


def test_lengths_are_those_of_the_uncut_rows(examine):
    words = examine([{"prompt": "a b c", "chosen": "d", "rejected": "e f"}], tokenizer=None).roles[0]
    assert {name: set(values.values()) for name, values in words.quantiles.items()} == {
        "prompt": {3},
        "chosen": {1},
        "rejected": {2},
        "row": {5},
    }
    (tokens,) = examine(ROWS, roles=("train",)).roles
    assert tokens.quantiles["row"][100] > 64


def test_layouts_count_the_tokens_of_the_trainers_batches(examine):
    rows = [{"prompt": "p", "chosen": "a " * n, "rejected": "b"} for n in range(1, 25)]
    (role,) = examine(rows, roles=("train",), batch_size=2, accumulate=6).roles
    random, grouped, packed, shared = role.layouts
    assert random.padding > grouped.padding > packed.padding == shared.padding == 0
    for layout in (random, grouped):
        assert layout.tokens_per_pair * (1 - layout.padding) == pytest.approx(packed.tokens_per_pair)
    assert packed.tokens_per_pair > shared.tokens_per_pair


def test_samples_show_the_whole_row_and_mark_the_response_with_its_terminator(examine):
    sample = examine(ROWS).roles[0].samples[0]
    text = "".join(piece.text for piece in sample.sides["chosen"])
    assert text == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\nyes sir<|im_end|>"
    assert "".join(piece.text for piece in sample.sides["chosen"] if piece.in_response) == "yes sir<|im_end|>"
    assert [piece.text for piece in sample.sides["rejected"] if piece.kind == "control"] == [
        *("<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"),
    ]
    (words,) = examine(ROWS, roles=("train",), tokenizer=None).roles
    assert "".join(piece.text for piece in words.samples[0].sides["chosen"]) == "[user] one\n\n[assistant] yes sir"


def test_without_a_tokenizer_what_needs_one_is_not_measured(examine):
    diagnosis = examine(ROWS, roles=("train",), tokenizer=None)
    (role,) = diagnosis.roles
    assert (diagnosis.unit, role.limits, role.layouts) == ("words", None, None)
    assert rows_of(role.bad_rows["empty_response"]) == [1]
    assert role.dropped == 1
    assert printed(diagnosis).count("Not measured: it needs a tokenizer.") == 1
    assert "padding" not in printed(diagnosis)


@pytest.fixture
def uncased(tmp_path) -> str:
    """A tokenizer like BERT's: pieces of small words, without blanks."""
    words = sorted({word for row in ROWS for text in row.values() for word in text.split()} | {"a", "b"})
    vocabulary = {token: index for index, token in enumerate(["[PAD]", "[unused1]", "[UNK]", "[CLS]", "[SEP]", *words])}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=core, **special).save_pretrained(tmp_path / "uncased")
    return str(tmp_path / "uncased")


def test_what_the_tokenizer_does_not_see_is_said_and_the_readme_gives_it_line_breaks(
    examine, uncased, tmp_path, monkeypatch
):
    assert examine(ROWS).unseen == []
    assert "the tokenizer does not see" not in printed(examine(ROWS))
    diagnosis = examine(ROWS, tokenizer=uncased)
    assert diagnosis.unseen == ["line breaks", "capitals"]
    assert "lists and paragraphs look like running text" in printed(diagnosis)
    assert "lists and paragraphs look like running text" in html_page(diagnosis)
    monkeypatch.chdir(tmp_path)
    exec(example("minilm_with_lines").replace("sentence-transformers/all-MiniLM-L6-v2", uncased))
    assert examine(ROWS, tokenizer="minilm_with_lines").unseen == ["capitals"]
    save_tokenizer(ChatFormat(load_tokenizer("minilm_with_lines")), "exported")
    kept = load_tokenizer("exported")
    assert kept.convert_ids_to_tokens(ChatFormat(kept).token_ids(["yes\n\nno"])[0]) == [
        *("yes", "[unused1]", "[unused1]", "no"),
    ]


def test_pairs_divided_by_prompt_are_counted_once(examine, source, tiny_qwen2, tmp_path):
    rows = [{"prompt": f"prompt {n}", "chosen": "yes", "rejected": "no" * (n != 3) or "yes"} for n in range(60)]
    data = PreferenceDataModule(source(rows), tokenizer=str(tiny_qwen2), cache_dir=str(tmp_path), val_fraction=0.3)
    train, val = diagnose(data).roles
    assert train.rows_read + val.rows_read == 60
    assert (train.dropped, val.dropped) == (1, 0)
    assert (train.rows_read - 1, val.rows_read) == (train.pairs, val.pairs)
    assert val.shared_prompts == []


def test_the_exit_code_says_whether_rows_would_be_left_out(examine):
    assert examine(ROWS[:1]).exit_code == 0
    assert examine(ROWS[7:8]).exit_code == 0  # cut, but used
    assert examine(ROWS).exit_code == 1
    nothing = examine(ROWS[8:], roles=("train",))
    assert (nothing.exit_code, nothing.roles[0].longer_chosen) == (2, None)
    assert verdict(nothing).startswith("No row of train can be used")
    assert "not measured" in printed(nothing)
    with pytest.raises(DataError, match="none of its 1 rows can be used"):
        examine(ROWS[1:2])


def test_findings_survive_json(examine):
    found = json.loads(json.dumps(asdict(examine(ROWS))))["roles"][0]
    assert found["bad_rows"]["too_long"][0].endswith("row 8")
    assert set(found["limits"][0]) == {"max_length", "cut", "too_long"}
    assert set(found["layouts"][0]) == {"name", "layout", "tokens_per_pair", "padding"}
    assert found["samples"][0]["sides"]["chosen"][0] == {
        "text": "<|im_start|>",
        "kind": "control",
        "in_response": False,
    }


def printed(diagnosis) -> str:
    stream = io.StringIO()
    print_diagnosis(diagnosis, Console(file=stream, width=200))
    return stream.getvalue()


def test_the_terminal_shows_every_number_that_the_findings_hold(examine):
    diagnosis = examine(ROWS)
    text = printed(diagnosis)
    named = ("empty_response", "special_tokens", "too_long", "copies of an earlier pair", "contradicted", "5 %")
    for words in (*named, "prompt is cut to fit max_length"):
        assert words in text
    assert "row 1: chosen has no text" in text
    assert verdict(diagnosis) in text
    assert "3 of 9 rows" in verdict(examine(ROWS, roles=("train",)))


def pairs_of(count, chosen, rejected):
    numbers = range(count)
    return [{"prompt": f"{n} {chosen[:1]}", "chosen": f"{chosen} {n}", "rejected": f"{rejected} {n}"} for n in numbers]


def test_what_it_judges_stands_above_the_tables_and_names_the_keys(examine):
    rows = [*pairs_of(39, "a long answer", "no"), *pairs_of(1, "no", "a long answer")]
    diagnosis = examine(rows, val=[{"prompt": "other", "chosen": "no", "rejected": "no sir"}] * 30)
    found = list(judgements(diagnosis))
    assert [line for line in found if "longer response is chosen in 97.5 %" in line] == found[:1]
    assert any("shorter response is chosen in 100.0 %" in line for line in found)
    assert any("29 of the pairs of val" in line for line in found)  # copies
    text = printed(diagnosis)
    assert text.index("97.5 %") < text.index("rows read")
    rows = [*pairs_of(20, "a long answer", "no"), *pairs_of(20, "no", "a long answer")]
    assert list(judgements(examine(rows, roles=("train",)))) == []
    few = examine(pairs_of(3, "a long answer", "no"), roles=("train",))
    assert "longer response is chosen" not in " ".join(judgements(few))


def test_tables_without_contents_are_left_out(examine):
    diagnosis = examine(ROWS[:1], roles=("train",))
    titles = [finding.title for finding in findings(diagnosis)]
    assert not {"Rows left out", "Columns not used", "Rows to look at"} & set(titles)
    (limits,) = [finding for finding in findings(diagnosis) if "max_length would do" in finding.title]
    assert [row[1] for row in limits.rows] == ["64 *"]  # of those above it none would change a row


HOSTILE = "<script>alert('&')</script>\x1b[31mred\x07 [bold]x[/bold] ‮txet"


def test_no_text_of_the_data_reaches_the_page_or_the_terminal_unescaped(examine):
    diagnosis = examine([{"prompt": HOSTILE, "chosen": HOSTILE + "1", "rejected": HOSTILE + "2", HOSTILE: "unused"}])
    diagnosis = replace(diagnosis, tokenizer=HOSTILE)
    page, text = html_page(diagnosis), printed(diagnosis)
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert "[bold]x[/bold]" in text
    for output in (page, text):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e]", output)


class Tags(HTMLParser):
    """Checks that tags are closed in order, and collects what refers elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attributes) -> None:
        if tag not in ("meta", "link"):
            self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href")]

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag


def test_the_page_is_well_formed_and_needs_nothing_from_elsewhere(examine):
    tags = Tags()
    page = html_page(examine(ROWS))
    tags.feed(page)
    assert tags.open == []
    assert all(link.startswith("#") or link == "data:," for link in tags.links)
    assert "http" not in page.replace("http-equiv", "")
    assert '<span class="response masked">yes sir</span>' in page


def test_rows_are_named_by_number_and_by_file_where_there_are_several():
    assert row_numbers(["d/a.jsonl, row 4", "d/a.jsonl, row 7"], files=1) == "4, 7"
    assert row_numbers(["d/a.jsonl, row 4", "d/b.jsonl, row 7"], files=2) == "a.jsonl 4, b.jsonl 7"
    assert row_numbers(["d/a.jsonl, row 4"], files=2) == "a.jsonl 4"
    assert row_numbers([f"a, row {n}" for n in range(12)], files=1) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert row_numbers([], files=1) == ""


def test_line_ends_are_marked_and_control_characters_written_out():
    assert visible("a\nb\r\n\x1b\t") == "a⏎\nb␍⏎\n\\x1b\\x09"


def test_columns_that_are_not_used_are_on_every_page(examine):
    row = {"prompt": "one", "output": "x", "response_0": "yes", "response_1": "no", "better_response_id": 0}
    rows = [row, row | {"prompt": "two", "better_response_id": 1, "safer_response_id": 0}]
    diagnosis = examine(rows, val=[{"prompt": [{"role": "user", "content": "x", "name": "A"}]} | rows[1]])
    train, val = diagnosis.roles
    assert (train.label, train.columns_unused) == ("better_response_id", ["output", "safer_response_id"])
    assert val.columns_unused == ["output", "safer_response_id"]
    assert asdict(diagnosis)["roles"][0]["columns_unused"] == ["output", "safer_response_id"]
    console = Console(file=io.StringIO(), width=200)
    print_diagnosis(diagnosis, console)
    for page in (html_page(diagnosis), console.file.getvalue()):
        assert "Columns not used" in page
        assert "output, safer_response_id" in page
        assert "better_response_id says which response is chosen" in page


def test_ties_are_left_out_and_named(examine):
    row = {"context": "one", "response1": "yes", "response2": "no", "overall_preference": 1}
    diagnosis = examine([row, row | {"overall_preference": 0}, row | {"context": "two"}], roles=("train",))
    (train,) = diagnosis.roles
    assert {reason: rows_of(origins) for reason, origins in train.bad_rows.items()} == {"tie": [1]}
    assert (train.pairs, diagnosis.exit_code, train.label) == (2, 1, "overall_preference")
