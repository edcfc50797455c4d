"""A document as Markdown (CommonMark with tables): the same content as the page, with tables where it has charts.

Foreign texts stand in fences longer than any run of backticks in them, everything else is escaped, so that no text
can end its place, start a heading or become a link.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from functools import singledispatch

from rlhf_lightning.evaluation.blocks import (
    Bars,
    Block,
    Changes,
    Column,
    Document,
    Facts,
    Histogram,
    Lines,
    Note,
    Reference,
    Samples,
    Section,
    Table,
    Verdicts,
    anchors,
)
from rlhf_lightning.evaluation.estimates import Quantity
from rlhf_lightning.report.charts import legend_count
from rlhf_lightning.report.tables import histogram_table, lines_table
from rlhf_lightning.report.wording import (
    NO_INTERVAL,
    NO_N,
    count,
    counts,
    difference,
    fact,
    interval,
    number,
    paragraphs,
    reference_text,
    with_interval,
)
from rlhf_lightning.terminal import visible

SAMPLE_CHARACTERS = 4000
"""Of a text of a sample; the page holds the whole of it."""


def to_markdown(document: Document) -> str:
    """The whole report; the same document gives the same characters."""
    names = anchors(document)
    parts = [f"# {_inline(document.title)}"]
    if document.subtitle:
        parts.append(_inline(document.subtitle))
    if len(document.sections) > 3:
        links = (
            f"{index}. [{_inline(section.title)}](#{name})"
            for index, (section, name) in enumerate(zip(document.sections, names, strict=True), 1)
        )
        parts.append("\n".join(links))
    for section in document.sections:
        parts += _section(section)
    if document.footer:
        parts += ["---", *_paragraphs(document.footer)]
    return "\n\n".join(parts) + "\n"


def _section(section: Section) -> Iterator[str]:
    yield f"## {_inline(section.title)}"
    yield from _paragraphs(section.text)
    for block in section.blocks:
        yield from _block(block)


@singledispatch
def _block(block: Block) -> Iterator[str]:
    raise TypeError(f"{type(block).__name__} is no block")


@_block.register
def _(block: Verdicts) -> Iterator[str]:
    rows = [
        [
            row.target,
            f"**{row.outcome}**",
            number(row.value, row.spec),
            interval(row.value, row.spec) or NO_INTERVAL,
            count(row.value, row.units) or NO_N,
            row.reason,
        ]
        for row in block.rows
    ]
    header = ["target", "verdict", "value", "95 % interval", "n", "reason"]
    yield _table(header, rows, plain={1}) if rows else "no targets"


@_block.register
def _(block: Table) -> Iterator[str]:
    yield from _captioned(block.caption)
    yield _block_table(block)


def _block_table(block: Table) -> str:
    if not block.rows:
        return "no rows"
    columns = [column if isinstance(column, Column) else Column(column) for column in block.columns]
    right = {i for i in range(len(columns)) if not any(isinstance(row[i], str) for row in block.rows)}
    rows = [[_cell(cell, column) for cell, column in zip(row, columns, strict=True)] for row in block.rows]
    return _table([column.name for column in columns], rows, right=right)


def _cell(cell: str | Quantity, column: Column) -> str:
    return cell if isinstance(cell, str) else with_interval(cell, column.spec)


@_block.register
def _(block: Facts) -> Iterator[str]:
    yield from _captioned(block.caption)
    lines = []
    for name, value in block.rows:
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        lines.append(f"- {_inline(name)}: {', '.join(_inline(fact(item)) for item in values) or 'none'}")
    yield "\n".join(lines) or "no facts"


@_block.register
def _(block: Note) -> Iterator[str]:
    yield "\n>\n".join(f"> {paragraph}" for paragraph in ("**Note**", *_paragraphs(block.text)))


@_block.register
def _(block: Bars) -> Iterator[str]:
    yield from _captioned(block.caption)
    shown = [group for group in block.groups if group.bars]
    named = any(group.name for group in shown)
    rows = [
        [
            *([group.name] if named else []),
            bar.label,
            number(bar.value, block.spec),
            interval(bar.value, block.spec) or NO_INTERVAL,
            count(bar.value, block.units) or NO_N,
        ]
        for group in shown
        for bar in group.bars
    ]
    header = [*(["group"] if named else []), "name", "value", "95 % interval", "n"]
    yield _table(header, rows, right={len(header) - 3}) if rows else "no rows"
    yield from _references(block.references, block.spec)


@_block.register
def _(block: Changes) -> Iterator[str]:
    yield from _captioned(block.caption)
    rows = [
        [
            row.label,
            with_interval(row.before, block.spec),
            with_interval(row.after, block.spec),
            difference(row, block.spec),
            counts(row, block) or NO_N,
        ]
        for row in block.rows
    ]
    yield _table(["name", block.before, block.after, "change", "n"], rows) if rows else "no rows"
    yield from _references(block.references, block.spec)


@_block.register
def _(block: Histogram) -> Iterator[str]:
    yield from _captioned(block.caption)
    yield "\n".join(f"- {_inline(f'{row.name}: {legend_count(row.values, block.units)}')}" for row in block.series)
    table = histogram_table(block)
    if table.rows:
        yield _block_table(table)
        yield table.caption
    yield from _references(block.references, "g")


@_block.register
def _(block: Lines) -> Iterator[str]:
    yield from _captioned(block.caption)
    table = lines_table(block)
    if table.rows:
        yield _block_table(table)
    empty = [f"- {_inline(series.name)}: not measured" for series in block.series if not series.points]
    if empty:
        yield "\n".join(empty)
    yield from _paragraphs(table.caption)
    if block.diagonal:
        yield f"The line y = x: {_inline(block.diagonal)}."
    yield from _references(block.references, block.spec)


@_block.register
def _(block: Samples) -> Iterator[str]:
    yield from _captioned(block.caption)
    if not block.rows:
        yield "no samples"
    for row in block.rows:
        yield f"### {_inline(row.title)}"
        yield "prompt"
        yield _fenced(row.prompt)
        for column, text in zip(block.columns, row.texts, strict=True):
            if text is None:
                yield f"{_inline(column)}: not measured"
                continue
            facts = ", ".join(f"{name} {fact(value)}" for name, value in text.facts)
            yield _inline(f"{column} ({facts})" if facts else column)
            yield _fenced(text.text)


def _fenced(text: str) -> str:
    shown = visible(text)
    if not shown.strip():
        return "*(white space only)*" if shown else "*(empty)*"
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    cut = shown[:SAMPLE_CHARACTERS]
    more = f"\n\n{number(len(shown) - len(cut))} more characters: the page has them." if len(cut) < len(shown) else ""
    return f"{fence}text\n{cut}\n{fence}{more}"


def _captioned(caption: str) -> Iterator[str]:
    if caption:
        yield f"**{_inline(caption)}**"


def _references(references: Sequence[Reference], spec: str) -> Iterator[str]:
    if references:
        yield "Lines: " + ", ".join(_inline(reference_text(line, spec)) for line in references) + "."


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Collection[int] = (),
    plain: Collection[int] = (),
) -> str:
    marks = ["---:" if index in right else "---" for index in range(len(header))]
    lines = [[_inline(name) for name in header], marks]
    lines += [[cell if i in plain else _inline(cell) for i, cell in enumerate(row)] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _paragraphs(text: str) -> Iterator[str]:
    return map(_inline, paragraphs(text))


def _inline(text: str) -> str:
    """One line of Markdown that reads as the text: whatever could be markup is escaped."""
    line = re.sub(r"\s*\n\s*", " ", visible(text)).strip().replace("\t", " ")
    line = re.sub(r"([\\`*\[\]<>|~$])", r"\\\1", line)
    line = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", line)
    line = re.sub(r"&(?=#?\w+;)", r"\\&", line)
    line = re.sub(r"(?i)(?<=http)(s?):(?=//)|(?<=ftp)():(?=//)", r"\1\2\\:", line)
    line = re.sub(r"(?i)\b(www)\.", r"\1\\.", line)
    line = re.sub(r"^([#+=-])", r"\\\1", line)
    return re.sub(r"^(\d{1,9})([.)])(?=\s|$)", r"\1\\\2", line)
