"""A document as one HTML page, and as Markdown (CommonMark with tables), by the templates beside this file.

The page holds no script, asks nobody for anything, and follows the reader's choice of light and dark. In both forms
every string that a template prints is made visible (`terminal.visible`) and escaped, unless it is `Markup`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup

from rlhf_lightning.evaluation.blocks import Bars, Column, Document, Table, Verdicts, anchors
from rlhf_lightning.evaluation.estimates import Quantity, value_of
from rlhf_lightning.report import drawing, wording
from rlhf_lightning.report.wording import NO_INTERVAL, NO_N, count, interval, number, with_interval
from rlhf_lightning.terminal import visible

if TYPE_CHECKING:
    from jinja2 import Environment

SAMPLE_CHARACTERS, SAMPLE_LINES = 600, 12
"""What the page shows of a text of a sample before it has to be unfolded."""
MARKDOWN_CHARACTERS = 4000
"""Of a text of a sample in Markdown; the page holds the whole of it."""


def to_html(document: Document) -> str:
    """The whole page; the same document gives the same characters."""
    salts = map(str, itertools.count())
    return _environment("page.html.jinja", _html).render(
        document=document, chart=lambda block: Markup(drawing.chart(block, next(salts))), anchors=anchors(document)
    )


def to_markdown(document: Document) -> str:
    """The same content as text, with tables where the page has charts."""
    return _environment("page.md.jinja", _markdown).render(document=document, anchors=anchors(document)).strip() + "\n"


@cache
def _environment(name: str, write: Callable[[object], object]):
    """The template, in which `write` is done to all that is printed before jinja's own escape."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment: Environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=write,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        **{"columns": _columns, "kind": lambda block: type(block).__name__, "missing": _is_missing, "values": _values},
        **{"foreign": _foreign, "markdown_table": _markdown_table, "fenced": _fenced, "drawing": drawing},
        **{"as_table": _as_table, "value_of": value_of},
        "wording": wording,
    }
    return environment.get_template(name)


def _html(value: object) -> object:
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _markdown(value: object) -> object:
    return Markup(_inline(value)) if isinstance(value, str) and not isinstance(value, Markup) else value


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


def _columns(table: Table) -> list[tuple[str, str, bool]]:
    """Name, format and whether it belongs to the right, of each column."""
    columns = [Column(column) if isinstance(column, str) else column for column in table.columns]
    right = [all(wording.is_numeric(row[i]) for row in table.rows) for i in range(len(columns))]
    return [(column.name, column.spec, aside) for column, aside in zip(columns, right, strict=True)]


def _is_missing(value: str | Quantity) -> bool:
    return not isinstance(value, str) and value_of(value) is None


def _values(value: str | int | float | Sequence[str] | None) -> Sequence[str | int | float | None]:
    """Of a fact: several, or the one."""
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _foreign(text: str) -> tuple[str, str]:
    """What is shown of a text of somebody else, and the rest, that can be unfolded."""
    return wording.fold(visible(text), characters=SAMPLE_CHARACTERS, lines=SAMPLE_LINES)


# Markdown ----------------------------------------------------------------------------------------------------------


def _markdown_table(table: Table, bold: int | None = None) -> Markup:
    """The rows, those of the column `bold` in bold; `no rows` without any."""
    if not table.rows:
        return Markup("no rows")
    columns = _columns(table)
    lines = [[_inline(name) for name, _, _ in columns], ["---:" if right else "---" for _, _, right in columns]]
    for row in table.rows:
        cells = [_inline(_cell(cell, spec)) for cell, (_, spec, _) in zip(row, columns, strict=True)]
        lines.append([f"**{cell}**" if i == bold else cell for i, cell in enumerate(cells)])
    return Markup("\n".join(f"| {' | '.join(line)} |" for line in lines))


def _cell(cell: str | Quantity, spec: str) -> str:
    return cell if isinstance(cell, str) else with_interval(cell, spec)


def _as_table(block: Verdicts | Bars) -> Table:
    """Verdicts and bars as a table of their numbers in words."""
    if isinstance(block, Verdicts):
        rows = [[row.target, row.outcome, *_figures(row.value, row.spec, row.units), row.reason] for row in block.rows]
        return Table(["target", "verdict", "value", "95 % interval", "n", "reason"], rows, "")
    rows = [
        [name, bar.label, *_figures(bar.value, block.spec, block.units)]
        for name, bars in drawing.shown_groups(block)
        for bar in bars
    ]
    named = any(row[0] for row in rows)
    header = ["group", "name", "value", "95 % interval", "n"]
    return Table(header if named else header[1:], rows if named else [row[1:] for row in rows], block.caption)


def _figures(value: Quantity, spec: str, units: str) -> list[str]:
    return [number(value, spec), interval(value, spec) or NO_INTERVAL, count(value, units) or NO_N]


def _fenced(text: str) -> Markup:
    """The text in a fence that is longer than any run of backticks in it."""
    shown = visible(text)
    if not shown.strip():
        return Markup("*(white space only)*" if shown else "*(empty)*")
    longest = max(map(len, re.findall("`+", shown)), default=0)
    fence, cut = "`" * max(3, longest + 1), shown[:MARKDOWN_CHARACTERS]
    left = len(shown) - len(cut)
    more = f"\n\n{number(left)} more characters: the page has them." if left else ""
    return Markup(f"{fence}text\n{cut}\n{fence}{more}")
