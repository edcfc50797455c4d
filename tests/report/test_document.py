"""A document as a page and as Markdown: everything said in both, nothing of a text taken for markup."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from rlhf_lightning import charts
from rlhf_lightning.evaluation.blocks import (
    Bar,
    BarGroup,
    Bars,
    Beside,
    Distribution,
    Document,
    Facts,
    Histogram,
    Lines,
    Note,
    Pieces,
    Point,
    Sample,
    Samples,
    SampleText,
    Section,
    Series,
    Table,
    Verdict,
    Verdicts,
    anchors,
)
from rlhf_lightning.evaluation.estimates import Estimate
from rlhf_lightning.report import pages, wording
from rlhf_lightning.report.pages import MARKDOWN_CHARACTERS, to_html, to_markdown
from rlhf_lightning.terminal import visible
from tests.report.demonstration import BOOK, HOSTILE, LONG_WORD, SUBSETS, document

VOID = {"meta", "link"}
ELEMENTS = {
    *(
        "html",
        "head",
        "meta",
        "link",
        "title",
        "style",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "article",
    ),
    *("h1", "h2", "h3", "h4", "p", "ul", "ol", "li", "a", "figure", "figcaption", "aside", "details", "summary"),
    *("div", "span", "strong", "small", "dl", "dt", "dd", "table", "thead", "tbody", "tr", "th", "td"),
    *("svg", "g", "defs", "use", "clippath", "text", "rect", "line", "circle", "path", "pre"),
}


class Reader(HTMLParser):
    """Elements, attributes and texts of a page; unbalanced tags are a failure."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.attributes = [], Counter(), []
        self.texts, self.headings, self.ids = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements[tag] += 1
        self.attributes += [(tag, *pair) for pair in attributes]
        self.ids += [value for name, value in attributes if name == "id"]
        self.headings += [int(tag[1])] if re.fullmatch("h[1-6]", tag) else []
        self.open += [] if tag in VOID else [tag]

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] != "style":
            self.texts.append(text)


@pytest.fixture(scope="module")
def page() -> str:
    return to_html(document())


@pytest.fixture(scope="module")
def markdown() -> str:
    return to_markdown(document())


def parse(markdown: str) -> list:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown)


def with_block(block) -> Document:
    return Document("title", [Section("section", [block])])


def words(tokens) -> str:
    """What a reader of the rendered line sees."""
    return "".join(token.content for token in tokens if token.type in ("text", "text_special", "code_inline"))


def test_the_page_is_balanced_and_holds_no_element_or_attribute_that_could_act(page):
    reader = Reader(page)
    assert set(reader.elements) <= ELEMENTS
    assert not [name for _, name, _ in reader.attributes if name.startswith("on")]
    addresses = [value for _, name, value in reader.attributes if name in ("href", "src", "xlink:href")]
    assert all(value.startswith("#") or value == "data:," for value in addresses)
    style = re.search("<style>(.*?)</style>", page, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in page


def test_headings_descend_one_level_at_a_time_and_ids_are_unique(page):
    reader = Reader(page)
    assert reader.headings[0] == 1
    assert reader.headings.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(reader.headings, reader.headings[1:], strict=False))
    assert len(set(reader.ids)) == len(reader.ids)


def test_every_plot_has_a_table_of_its_numbers(page):
    blocks = [b for s in document().sections for b in s.blocks]
    blocks += [b for beside in blocks if isinstance(beside, Beside) for b in beside.blocks]
    shown = [b for b in blocks if isinstance(b, Histogram | Lines)]
    empty = sum(
        not any(s.values for s in b.series) if isinstance(b, Histogram) else not any(s.points for s in b.series)
        for b in shown
    )
    assert page.count("<summary>The numbers</summary>") == len(shown) - empty


def test_contents_appear_with_more_than_three_sections():
    sections = [Section(f"part {n}", []) for n in range(4)]
    for count, there in ((3, False), (4, True)):
        written = Document("title", sections[:count])
        assert ("<nav" in to_html(written)) == there
        assert ("](#part-0)" in to_markdown(written)) == there


def test_anchors_are_unique_whatever_the_titles():
    titles = ["A b", "A b", "A b 1", "A-b-1", "Стих", "", "section 6"]
    found = anchors(Document("title", [Section(title, []) for title in titles]))
    assert found[:2] == ["a-b", "a-b-1"]
    assert len(set(found)) == len(found)
    assert all(re.fullmatch(r"[a-z0-9_-]+", name) for name in found)


def test_both_formats_say_every_number_and_name(page, markdown):
    said = "".join(Reader(page).texts)
    lines = [words(token.children) for token in parse(markdown) if token.type == "inline"]
    for text in (
        *SUBSETS,
        "81.0\u00a0%",
        "78.3\u00a0% to 83.7\u00a0%",
        "coin flip 50.0\u00a0%",
    ):
        assert text in said
        assert any(text in line for line in lines), text
    for verdict in ("met with confidence", "met", "over-optimized", "not met", "not measured"):
        assert verdict in said
        assert verdict in lines


def test_the_same_document_gives_the_same_bytes_in_another_process(page, markdown):
    script = (
        "import hashlib; from tests.report.demonstration import document;"
        "from rlhf_lightning.report.pages import to_html, to_markdown;"
        "print(*[hashlib.sha256(make(document()).encode()).hexdigest() for make in (to_html, to_markdown)])"
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(root)}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment, cwd=root
    )
    assert result.stdout.split() == [hashlib.sha256(text.encode()).hexdigest() for text in (page, markdown)]


def test_hostile_texts_arrive_on_the_page_as_text(page):
    assert Reader(page).texts.count(visible(HOSTILE)) == 3, "prompt, response and pieces"
    assert "<script" not in page
    assert "owned&#39;&lt;/script&gt;" in page
    assert not set(page) & set(map(chr, (*range(0x20), *range(0x7F, 0xA0)))) - {"\n"}
    page.encode("utf-8")


def test_long_texts_are_whole_on_the_page_and_counted_where_markdown_cuts_them(page, markdown):
    texts = [text for text in Reader(page).texts if text.strip()]
    for text in (BOOK, LONG_WORD):
        start = next(i for i, part in enumerate(texts) if len(part) > 400 and text.startswith(part))
        assert texts[start] + texts[start + 2] == text
        assert texts[start + 1] == f"{wording.number(len(texts[start + 2]))} more characters"
    assert f"{wording.number(len(BOOK) - MARKDOWN_CHARACTERS)} more characters: the page has them." in markdown


def test_hostile_texts_stay_in_their_fences(markdown):
    tokens = parse(markdown)
    fences = [token.content for token in tokens if token.type == "fence"]
    assert fences.count(visible(HOSTILE) + "\n") == 2
    inline = [child.type for token in tokens if token.type == "inline" for child in token.children]
    links = [c.attrs["href"] for t in tokens if t.type == "inline" for c in t.children if c.type == "link_open"]
    assert "html_inline" not in inline
    assert "html_block" not in [token.type for token in tokens]
    assert links == [f"#{name}" for name in anchors(document())]
    headings = [int(token.tag[1]) for token in tokens if token.type == "heading_open"]
    blocks = [b for s in document().sections for b in s.blocks]
    samples = sum(len(b.rows) if isinstance(b, Samples) else isinstance(b, Pieces) for b in blocks)
    assert Counter(headings) == {1: 1, 2: len(document().sections), 3: samples}


MARKUP = [
    *(
        "<div",
        "<!-- x",
        "<?x",
        "<b>x</b>",
        "&amp; &#65; &",
        "1. x",
        "1) x",
        "- x",
        "+ x",
        "* x",
        "# x",
        "> x",
        "===",
        "---",
    ),
    *(
        "***",
        "``x``",
        "~~x~~",
        "~~~",
        "![x](y)",
        "[x](y)",
        "[x]: y",
        "_x_ a_b",
        "__x__",
        "*x*",
        "| x |",
        "\\\\ \\*",
        "$x$",
    ),
    *("http://x.invalid", "https://x.invalid", "www.x.invalid", "<http://x.invalid>", "x\n\n    x", "x\n===", "x  \nx"),
]


@pytest.mark.parametrize("text", MARKUP)
def test_markup_reads_as_itself_in_markdown(text):
    tokens = parse(
        to_markdown(Document("t", [Section("s", [Table(["name"], [[text]], ""), Facts([("n", text)])], text)]))
    )
    lines = [words(token.children) for token in tokens if token.type == "inline"]
    expected = [re.sub(r"\s+", " ", part) for part in wording.paragraphs(text)]
    assert lines == ["t", "s", *expected, "name", " ".join(expected), "n: " + " ".join(expected)]
    assert not {"html_block", "hr", "code_block", "link_open", "image"} & {token.type for token in tokens}


hostile = st.text(st.characters() | st.sampled_from("\\`*_{}[]()<>#+-.!|~$&:;=\"'/\n\t 0123aAhtpw&"), max_size=40)


@settings(max_examples=300)
@given(hostile)
def test_any_text_reads_the_same_in_markdown(text):
    tokens = parse(to_markdown(Document("title", [Section("section", [Table(["name"], [[text]], "")], text)])))
    expected = re.sub(r"\s*\n\s*", " ", visible(text)).strip().replace("\t", " ")
    cells = [words(token.children) for token in tokens if token.type == "inline" and token.level == 4]
    assert cells == ["name", expected]
    headings = [token.type for token in tokens].count("heading_open")
    assert headings == 2
    paragraphs = [words(token.children) for token in tokens if token.type == "inline" and token.level == 1]
    assert re.sub(r"\s+", "", "".join(paragraphs[2:])) == re.sub(r"\s+", "", visible(text))


@settings(max_examples=200)
@given(hostile)
def test_any_text_reads_the_same_on_the_page(text):
    reader = Reader(
        to_html(with_block(Samples([text], [Sample(text, text, [SampleText(text, [(text, text)])])], text)))
    )
    shown = visible(text)
    assert shown.strip() == "" or "".join(reader.texts).count(shown) >= 6
    assert set(reader.elements) <= ELEMENTS


@settings(max_examples=200)
@given(st.text(st.sampled_from("`a\n~"), max_size=30))
def test_no_run_of_backticks_ends_its_fence(text):
    tokens = parse(to_markdown(with_block(Samples(["c"], [Sample("t", text, [None])], "caption"))))
    fences = [token.content for token in tokens if token.type == "fence"]
    assert fences == ([text + "\n"] if text.strip() else [])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\tb\nc\r\nd", "a\tb\nc\nd"),
        ("\x1b[31m", "⟨U+001B⟩[31m"),
        ("a\u202eb\u2066c", "a⟨U+202E⟩b⟨U+2066⟩c"),
        ("a\u200bb\ufeff\u00ad", "a⟨U+200B⟩b⟨U+FEFF⟩⟨U+00AD⟩"),
        ("\ud800", "\ufffd"),
        ("\U000e0041", "⟨U+E0041⟩"),
        ("می\u200cخواهم", "می\u200cخواهم"),
        ("👩\u200d🚀", "👩\u200d🚀"),
        ("é ü 漢字 ½", "é ü 漢字 ½"),
        ("\u2028\x85\x7f\r", "⟨U+2028⟩⟨U+0085⟩⟨U+007F⟩⟨U+000D⟩"),
    ],
)
def test_what_hides_is_written_out_and_what_is_spelling_is_kept(text, shown):
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("value", "spec", "written"),
    [
        (0.7125, ".3f", "0.713"),
        (0.5, ".1%", "50.0\u00a0%"),
        (-0.25, ".2f", "−0.25"),
        (-0.0001, ".2f", "0.00"),
        (0.0, "+.1%", "0.0\u00a0%"),
        (2000, ".3f", "2\u202f000"),
        (1.5e22, ".3f", "1.500e+22"),
        (None, ".3f", "not measured"),
        (math.nan, ".3f", "not measured"),
        (math.inf, ".3f", "not measured"),
        (Estimate(math.nan, 0, 1, 3, ""), ".3f", "not measured"),
    ],
)
def test_numbers_are_written_for_people(value, spec, written):
    assert wording.number(value, spec) == written


@given(st.text(max_size=400), st.integers(1, 80), st.integers(1, 9))
def test_a_folded_text_is_the_text(text, characters, lines):
    folded = wording.fold(text, characters=characters, lines=lines)
    assert folded.beginning + folded.rest == text
    assert folded.beginning or not text


def test_folding_is_at_a_space_and_never_before_a_combining_mark():
    assert wording.fold("one two three four " * 9, characters=20, lines=9).beginning == "one two three four "
    assert wording.fold("a" * 9 + "e\u0301" + "b" * 9, characters=10, lines=9).beginning == "a" * 9 + "e\u0301"
    assert wording.fold("a\n" * 20, characters=400, lines=3).beginning == "a\n" * 3


def test_missing_numbers_are_written_out_in_every_block():
    blocks = [
        Verdicts([Verdict("t", "not measured", None, "pairs", "why")]),
        Table(["a"], [[None]], ""),
        Facts([("a", None)]),
        Bars([BarGroup("", [Bar("a", None)])], "pairs", ""),
        Histogram([Distribution("a", [])], "x", "pairs", ""),
        Lines([Series("a", [])], "x", "y", ""),
        Lines([Series("a", [Point(0, None)])], "x", "y", ""),
        Samples(["a"], [Sample("t", "p", [None])], ""),
        Samples(["a"], [Sample("t", "p", [SampleText("x", [("reward", None)])])], ""),
    ]
    for block in blocks:
        assert "not measured" in "".join(Reader(to_html(with_block(block))).texts), block
        assert "not measured" in to_markdown(with_block(block)), block


def test_a_table_whose_rows_do_not_fit_its_columns_is_refused():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        Table(["a", "b"], [["x"]], "caption")


def test_notes_and_paragraphs_stay_apart():
    tokens = parse(to_markdown(with_block(Note("first\n\n- second"))))
    assert [t.type for t in tokens].count("blockquote_open") == 1
    assert "bullet_list_open" not in [t.type for t in tokens]
    assert to_html(with_block(Note("first\n\nsecond"))).count("<p>") == 2


def test_a_document_is_plain_data():
    assert dataclasses.asdict(document())["sections"][0]["blocks"][0]["rows"][0]["outcome"] == "met with confidence"


def luminance(colour: str) -> float:
    """WCAG 2.2, relative luminance."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_and_white_is_21():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)


CSS = (Path(pages.__file__).parent / "page.css").read_text(encoding="utf-8")
LIGHT, DARK = (
    dict(re.findall(r"--(\w+): (#\w{6});", block)) for block in re.findall(r":root {([^}]*--page[^}]*)}", CSS)
)


def test_the_charts_colours_are_those_of_the_page():
    assert charts.COLOURS.items() <= LIGHT.items()
    assert LIGHT.keys() == DARK.keys()


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_and_marks_have_the_contrast_of_aa(colours):
    for name in ("ink", "muted", "link", "good", "bad", "s0", "s1", "s2", "s3"):
        assert contrast(colours[name], colours["page"]) >= 4.5, name
    for name in ("ink", "muted", "link"):
        assert contrast(colours[name], colours["panel"]) >= 4.5, name
    for name in ("bar", "axis", "warn"):
        assert contrast(colours[name], colours["page"]) >= 3, name
    assert contrast(colours["ink"], colours["bar"]) >= 3, "a whisker on its bar"
    assert contrast("#18212b", colours["amber"]) >= 4.5, "the badge of an over-optimized policy"
