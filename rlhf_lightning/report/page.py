"""A document as one HTML page: no script, no network, no font to fetch, every text escaped.

Light and dark by the reader's setting, from 360 px up, printable. Charts are inline SVG with a title and a
description; the numbers of each plot stand below it as a table.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Sequence
from functools import singledispatch
from importlib import resources

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
    Sample,
    Samples,
    SampleText,
    Section,
    Table,
    Verdict,
    Verdicts,
    anchors,
)
from rlhf_lightning.evaluation.estimates import Quantity, value_of
from rlhf_lightning.report import charts
from rlhf_lightning.report.palette import DARK, LIGHT
from rlhf_lightning.report.tables import histogram_table, lines_table
from rlhf_lightning.report.wording import (
    NO_INTERVAL,
    NOT_MEASURED,
    count,
    counts,
    difference,
    fact,
    fold,
    interval,
    number,
    paragraphs,
    reference_text,
)
from rlhf_lightning.terminal import visible

SAMPLE_CHARACTERS, SAMPLE_LINES = 600, 12
"""What is shown of a text of a sample before it has to be unfolded."""


def to_html(document: Document) -> str:
    """The whole page; the same document gives the same characters."""
    names = anchors(document)
    parts = [f"<header><h1>{_text(document.title)}</h1>"]
    if document.subtitle:
        parts.append(f'<p class="subtitle">{_text(document.subtitle)}</p>')
    parts.append("</header>")
    if len(document.sections) > 3:
        links = "".join(
            f'<li><a href="#{name}">{_text(section.title)}</a></li>'
            for section, name in zip(document.sections, names, strict=True)
        )
        parts.append(f'<nav aria-label="Contents"><ol>{links}</ol></nav>')
    parts.append("<main>")
    parts += [_section(section, name) for section, name in zip(document.sections, names, strict=True)]
    parts.append("</main>")
    if document.footer:
        parts.append(f"<footer>{_paragraphs(document.footer)}</footer>")
    return _head(document.title) + "".join(parts) + "</body></html>\n"


def _section(section: Section, name: str) -> str:
    blocks = "".join(map(_block, section.blocks))
    return f'<section id="{name}"><h2>{_text(section.title)}</h2>{_paragraphs(section.text)}{blocks}</section>'


@singledispatch
def _block(block: Block) -> str:
    raise TypeError(f"{type(block).__name__} is no block")


@_block.register
def _(block: Verdicts) -> str:
    return f'<ul class="verdicts">{"".join(map(_verdict, block.rows))}</ul>' if block.rows else _nothing("no targets")


def _verdict(row: Verdict) -> str:
    look = row.outcome.replace(" ", "-")
    figures = f"<strong>{number(row.value, row.spec)}</strong>"
    if value_of(row.value) is not None:
        ends = interval(row.value, row.spec)
        figures += f"<small>{ends or NO_INTERVAL}</small><small>{_text(count(row.value, row.units))}</small>"
    return (
        f'<li class="{look}"><span class="badge">{_ICONS[row.outcome]}{row.outcome}</span>'
        f'<div class="target"><p>{_text(row.target)}</p><small>{_text(row.reason)}</small></div>'
        f'<div class="figures">{figures}</div></li>'
    )


def _icon(path: str) -> str:
    return f'<svg width="16" height="16" viewBox="0 0 16 16" aria-hidden="true"><path d="{path}"/></svg>'


_ICONS = {
    "met with confidence": _icon("M1 8.5 4.5 12 10 5M7.5 11.5 8 12 14.5 4.5"),
    "met": _icon("M3 8.5 6.5 12 13 4.5"),
    "not met": _icon("M4 4 12 12M12 4 4 12"),
    "not measured": _icon("M4 8H12"),
}


@_block.register
def _(block: Table) -> str:
    columns = [column if isinstance(column, Column) else Column(column) for column in block.columns]
    caption = f"<figcaption>{_text(block.caption)}</figcaption>"
    body = _table(columns, block.rows) if block.rows else _nothing("no rows")
    return f'<figure class="table">{caption}{body}</figure>'


def _table(columns: Sequence[Column], rows: Sequence[Sequence[str | Quantity]]) -> str:
    numeric = [not any(isinstance(row[index], str) for row in rows) for index in range(len(columns))]
    looks = [' class="number"' if right else "" for right in numeric]
    head = "".join(
        f'<th scope="col"{look}>{_text(column.name)}</th>' for column, look in zip(columns, looks, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{look}>{_cell(cell, column.spec)}</td>" for cell, column, look in zip(row, columns, looks, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    place = 'class="scroll" tabindex="0" role="group" aria-label="Table"'
    return f"<div {place}><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _cell(cell: str | Quantity, spec: str) -> str:
    if isinstance(cell, str):
        return _text(cell)
    if value_of(cell) is None:
        return f'<span class="missing">{NOT_MEASURED}</span>'
    ends = interval(cell, spec)
    return number(cell, spec) + (f" <small>{ends}</small>" if ends else "")


@_block.register
def _(block: Facts) -> str:
    rows = []
    for name, value in block.rows:
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        shown = "".join(f"<dd>{_missing_or(fact(item), item)}</dd>" for item in values) or "<dd>none</dd>"
        rows.append(f"<div><dt>{_text(name)}</dt>{shown}</div>")
    caption = f"<figcaption>{_text(block.caption)}</figcaption>" if block.caption else ""
    body = f"<dl>{''.join(rows)}</dl>" if rows else _nothing("no facts")
    return f'<figure class="facts">{caption}{body}</figure>'


def _missing_or(text: str, value: str | int | float | None) -> str:
    missing = not isinstance(value, str) and value_of(value) is None
    return f'<span class="missing">{text}</span>' if missing else _text(text)


@_block.register
def _(block: Note) -> str:
    return f'<aside class="note"><strong>Note</strong>{_paragraphs(block.text)}</aside>'


@_block.register
def _(block: Bars) -> str:
    scale, shown = charts.bars_axis(block), [group for group in block.groups if group.bars]
    parts = [_figure_head("rows", block.caption, _reference_legend(block.references, block.spec) if shown else [])]
    for group in shown:
        if group.name:
            parts.append(f"<h3>{_text(group.name)}</h3>")
        rows = []
        for bar in group.bars:
            figures = f"<strong>{_cell_value(bar.value, block.spec)}</strong>"
            if ends := interval(bar.value, block.spec):
                figures += f"<small>{ends}</small>"
            label = _label(bar.label, count(bar.value, block.units))
            plot = charts.bar_strip(bar, block, scale)
            rows.append(f'<li>{label}<span class="strip">{plot}</span><span class="figures">{figures}</span></li>')
        parts.append(f'<ul class="strips">{"".join(rows)}</ul>')
    parts.append(_strip_axis(scale, block.spec) if shown else _nothing("no rows"))
    return "".join([*parts, "</figure>"])


@_block.register
def _(block: Changes) -> str:
    scale = charts.changes_axis(block)
    names = [(charts.swatch(0, kind=kind), name) for kind, name in (("before", block.before), ("after", block.after))]
    entries = [*names, *_reference_legend(block.references, block.spec)] if block.rows else []
    parts = [_figure_head("rows changes", block.caption, entries)]
    rows = []
    for row in block.rows:
        sides = "".join(
            f"<span>{_text(name)} <strong>{_cell_value(side, block.spec)}</strong> "
            f"<small>{interval(side, block.spec)}</small></span>"
            for name, side in ((block.before, row.before), (block.after, row.after))
        )
        label = _label(row.label, counts(row, block))
        moved = f'<span class="moved">{difference(row, block.spec)}</span>'
        plot = charts.change_strip(row, block, scale)
        rows.append(f'<li>{label}<span class="strip">{plot}</span><span class="figures">{sides}{moved}</span></li>')
    parts.append(
        f'<ul class="strips">{"".join(rows)}</ul>' + _strip_axis(scale, block.spec) if rows else _nothing("no rows")
    )
    return "".join([*parts, "</figure>"])


def _label(label: str, n: str) -> str:
    return f'<span class="label">{_text(label)}' + (f" <small>{_text(n)}</small>" if n else "") + "</span>"


def _cell_value(quantity: Quantity, spec: str) -> str:
    return _missing_or(number(quantity, spec), quantity)


def _strip_axis(scale: charts.Axis, spec: str) -> str:
    return f'<div class="scale"><span class="strip">{charts.axis_strip(scale, spec)}</span></div>'


@_block.register
def _(block: Histogram) -> str:
    entries = [
        (charts.swatch(index, kind="box"), f"{series.name}: {charts.legend_count(series.values, block.units)}")
        for index, series in enumerate(block.series)
    ]
    entries += _reference_legend(block.references, "g")
    labels = ("share of the " + block.units, block.x_label)
    return _plotted("histogram", block, entries, labels, charts.histogram, histogram_table(block))


@_block.register
def _(block: Lines) -> str:
    entries = []
    for index, series in enumerate(block.series):
        left_out = sum(not charts.plotted(point) for point in series.points)
        missing = f" ({number(left_out)} of {number(len(series.points))} {NOT_MEASURED})" if left_out else ""
        nothing = f" ({NOT_MEASURED})" if not series.points else ""
        entries.append((charts.swatch(index, kind="line"), series.name + missing + nothing))
    if block.diagonal:
        entries.append((charts.swatch(0, kind="diagonal"), block.diagonal))
    entries += _reference_legend(block.references, block.spec, kind="level")
    return _plotted("lines", block, entries, (block.y_label, block.x_label), charts.lines, lines_table(block))


def _plotted(
    kind: str,
    block: Histogram | Lines,
    entries: Sequence[tuple[str, str]],
    labels: tuple[str, str],
    draw: Callable[[Histogram | Lines, int], str],
    table: Table,
) -> str:
    y_label, x_label = map(_text, labels)
    numbers = _table([Column(name) if isinstance(name, str) else name for name in table.columns], table.rows)
    below = f"<p>{_text(table.caption)}</p>" if table.caption else ""
    unfolded = f"<details><summary>The numbers</summary>{below}{numbers}</details>" if table.rows else ""
    return (
        f"{_figure_head(kind, block.caption, entries)}"
        f'<div class="drawing"><p class="y">{y_label}</p>{draw(block, charts.NARROW)}{draw(block, charts.WIDE)}'
        f'<p class="x">{x_label}</p></div>{unfolded}</figure>'
    )


def _reference_legend(references: Sequence[Reference], spec: str, *, kind: str = "reference") -> list[tuple[str, str]]:
    return [(charts.swatch(i, kind=kind), reference_text(line, spec)) for i, line in enumerate(references)]


def _figure_head(kind: str, caption: str, entries: Sequence[tuple[str, str]]) -> str:
    legend = "".join(f"<li>{swatch}<span>{_text(name)}</span></li>" for swatch, name in entries)
    shown = f'<ul class="legend">{legend}</ul>' if entries else ""
    return f'<figure class="{kind}"><figcaption>{_text(caption)}</figcaption>{shown}'


@_block.register
def _(block: Samples) -> str:
    rows = "".join(_sample(row, block.columns) for row in block.rows) or _nothing("no samples")
    return f'<div class="samples"><p class="caption">{_text(block.caption)}</p>{rows}</div>'


def _sample(row: Sample, columns: Sequence[str]) -> str:
    texts = "".join(_sample_text(text, name) for text, name in zip(row.texts, columns, strict=True))
    return (
        f'<article><h3>{_text(row.title)}</h3><div class="prompt"><h4>prompt</h4>{_foreign(row.prompt)}</div>'
        f'<div class="columns of{len(columns)}">{texts}</div></article>'
    )


def _sample_text(text: SampleText | None, column: str) -> str:
    if text is None:
        return f'<div><h4>{_text(column)}</h4><p class="missing">{NOT_MEASURED}</p></div>'
    facts = "".join(
        f"<div><dt>{_text(name)}</dt><dd>{_missing_or(fact(value), value)}</dd></div>" for name, value in text.facts
    )
    below = f"<dl>{facts}</dl>" if facts else ""
    return f"<div><h4>{_text(column)}</h4>{_foreign(text.text)}{below}</div>"


def _foreign(text: str) -> str:
    """A text that somebody or something else wrote: its lines kept, its direction its own, folded where it is long."""
    shown_text = visible(text)
    if not shown_text.strip():
        return _nothing("(white space only)" if text else "(empty)")
    beginning, rest = fold(shown_text, characters=SAMPLE_CHARACTERS, lines=SAMPLE_LINES)
    shown = f'<div class="foreign" dir="auto">{html.escape(beginning)}</div>'
    if rest:
        more = f"{number(len(rest))} more characters"
        shown += (
            f'<details><summary>{more}</summary><div class="foreign" dir="auto">{html.escape(rest)}</div></details>'
        )
    return shown


def _paragraphs(text: str) -> str:
    return "".join(f"<p>{html.escape(paragraph)}</p>" for paragraph in paragraphs(text))


def _nothing(words: str) -> str:
    return f'<p class="missing">{words}</p>'


def _text(text: str) -> str:
    return html.escape(visible(text))


def _style() -> str:
    text = resources.files("rlhf_lightning.evaluation").joinpath("page.css").read_text(encoding="utf-8")
    for name, colours in (("LIGHT", LIGHT), ("DARK", DARK)):
        text = text.replace(f"{name};", " ".join(f"--{key}: {colour};" for key, colour in colours.items()))
    return re.sub(r"(/\*.*?\*/|\s)+", " ", text).strip()


def _head(title: str) -> str:
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<title>{_text(title)}</title><style>{_style()}</style></head><body>"
    )
