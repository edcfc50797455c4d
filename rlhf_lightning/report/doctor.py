"""The doctor's findings for people: in the terminal, and as a page that is drawn as a report is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from rich import table
from rich.console import Console
from rich.text import Text

from rlhf_lightning.data.doctor import QUANTILES, Diagnosis, Limit, Piece, RoleDiagnosis, Sample
from rlhf_lightning.data.examples import BAD_ROW_REASONS
from rlhf_lightning.evaluation import blocks
from rlhf_lightning.evaluation.blocks import Document, Pieces, Section, Table
from rlhf_lightning.report.pages import to_html
from rlhf_lightning.report.wording import NOT_MEASURED
from rlhf_lightning.terminal import visible as shown

_ROWS_SHOWN = 10
_SHOWN_AT_THE_START, _SHOWN_AT_THE_END = 300, 700
"""Characters of a long stretch of a sample that are shown."""


_UNSEEN = {
    "line breaks": "lists and paragraphs look like running text; a copy of the tokenizer can be given a token for them "
    "(docs/data.md, The data doctor)",
    "capitals": "nothing; another model would be needed",
}
"""What can be done about what a tokenizer does not see."""


class Finding(NamedTuple):
    """A titled table with a sentence or two below it."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    remarks: Sequence[str] = ()


_NO_TOKENIZER = "Not measured: it needs a tokenizer."
_BIASED, _MANY = 0.75, 0.01
"""Shares from which on a finding is a judgement: of pairs in which length decides, and of rows of any other kind."""


def findings(diagnosis: Diagnosis) -> Iterator[Finding]:
    """Everything but the samples: what is judged, then tables; those that have nothing to show are left out."""
    yield Finding("Judgement", (), (), list(judgements(diagnosis)) or ["Nothing that would spoil a run was found."])
    yield _rows(diagnosis)
    unused = [(role.role, ", ".join(role.columns_unused)) for role in diagnosis.roles if role.columns_unused]
    unseen = [(name, _UNSEEN[name]) for name in diagnosis.unseen or ()]
    for finding in (
        _rows_left_out(diagnosis.roles),
        Finding("Columns not used", ("role", "columns"), unused),
        _rows_to_look_at(diagnosis.roles),
        Finding("What the tokenizer does not see", ("difference", "what to do"), unseen),
    ):
        if finding.rows:
            yield finding
    yield _lengths(diagnosis)
    yield _limits(diagnosis)
    if diagnosis.max_length is not None:
        yield _layouts(diagnosis)


def judgements(diagnosis: Diagnosis) -> Iterator[str]:
    """What a run should not begin with, or what would make it better, worst first, each in a sentence or two."""
    for role in diagnosis.roles:
        yield from _judged(role, diagnosis)


def _judged(role: RoleDiagnosis, diagnosis: Diagnosis) -> Iterator[str]:
    share, where = role.longer_chosen, f"of the {role.kind} of {role.role}"
    if share is not None and role.pairs >= _FEW and max(share, 1 - share) >= _BIASED:
        which = "longer" if share > 0.5 else "shorter"
        yield (
            f"The {which} response is chosen in {_percent(max(share, 1 - share))} {where}: a reward model can learn "
            "length and nothing else. Add pairs in which it is the other way, and read its accuracy at equal length."
        )
    total = max(role.pairs, 1)
    yield from _judged_balance(role)
    counts = [
        (role.contradictions, "state the opposite of another one, so they teach nothing", "remove one of each two"),
        (
            role.shared_prompts or (),
            "have a prompt that is also trained on, so they are not held out",
            "split by prompt",
        ),
        (role.duplicates, "are copies of an earlier one and count twice", "remove them"),
        (role.foreign_tokens, "hold what looks like another model's control token", "look at them in the table below"),
    ]
    for rows, what, advice in counts:
        if len(rows) > _MANY * total:
            yield f"{len(rows)} {where} ({_percent(len(rows) / total)}) {what}: {advice}."
    if len(role.rows_cut) > _MANY * total:
        yield (
            f"{len(role.rows_cut)} {where} ({_percent(len(role.rows_cut) / total)}) lose the beginning of their "
            f"prompt: data.max_length is {diagnosis.max_length}."
        )
    if role.dropped > _MANY * max(role.rows_read, 1):
        yield f"{role.dropped} of {role.rows_read} rows of {role.role} cannot be used: the table says why."


def _judged_balance(role: RoleDiagnosis) -> Iterator[str]:
    """What the numbers of good and bad responses ask of KTO's weights."""
    if role.desirable is None or role.role != "train" or role.pairs < _FEW:
        return
    good, bad = role.desirable, role.pairs - role.desirable
    if good and not bad <= good <= 4 / 3 * bad:
        yield (
            f"{good} responses of train are good and {bad} are bad: with KTO set model.desirable_weight to "
            f"{bad / good:.3g} to {4 / 3 * bad / good:.3g}, so that good ones weigh 1 to 4/3 times what bad ones do."
        )


_FEW = 20
"""Pairs below which nothing is said of a share."""


def _rows(diagnosis: Diagnosis) -> Finding:
    rows = [
        (
            role.role,
            f"{role.rows_read}",
            f"{role.pairs}",
            f"{role.dropped}",
            NOT_MEASURED if diagnosis.max_length is None else f"{len(role.rows_cut)}",
            *_longer(role),
            *([] if role.desirable is None else [_share(role.desirable, role.pairs)]),
        )
        for role in diagnosis.roles
    ]
    pairs = any(role.kind == "pairs" for role in diagnosis.roles)
    remarks = [
        *(f"{role.role}: {role.source}" for role in diagnosis.roles),
        *(f"{role.role}: {role.label} says which response is chosen." for role in diagnosis.roles if role.label),
    ]
    if pairs:
        remarks.append(
            "Longer is chosen: the share of the used pairs whose chosen response has more characters, which a reward "
            "model has to beat."
        )
    judged = any(role.desirable is not None for role in diagnosis.roles)
    shares = [*(["longer is chosen"] if pairs else []), *(["good"] if judged else [])]
    header = ("role", "rows read", "used", "left out", "prompt cut", *shares)
    return Finding("Rows", header, rows, remarks)


def _longer(role: RoleDiagnosis) -> list[str]:
    if role.kind != "pairs":
        return []
    return [NOT_MEASURED if role.longer_chosen is None else _percent(role.longer_chosen)]


def _rows_left_out(roles: Sequence[RoleDiagnosis]) -> Finding:
    rows = [
        (role.role, reason, f"{len(rows)}", row_numbers(rows, files=role.files), BAD_ROW_REASONS[reason])
        for role in roles
        for reason, rows in sorted(role.bad_rows.items(), key=lambda item: -len(item[1]))
    ]
    messages = [message for role in roles for message in role.messages if "max_length is" not in message]
    header = ("role", "reason", "rows", "which (from 0)", "meaning")
    return Finding("Rows left out", header, rows, messages[:_ROWS_SHOWN])


def _rows_to_look_at(roles: Sequence[RoleDiagnosis]) -> Finding:
    odd = [
        (role.role, what, f"{len(rows)}", row_numbers(rows, files=role.files))
        for role in roles
        for what, rows in _oddities(role)
        if rows
    ]
    remark = "They are used. A copy counts twice, contradictions teach nothing, a prompt on both sides is not held out."
    return Finding("Rows to look at", ("role", "what", "rows", "which (from 0)"), odd, [remark])


def _lengths(diagnosis: Diagnosis) -> Finding:
    rows = [
        (role.role, "longer row" if part == "row" and role.kind == "pairs" else part, *map(str, values.values()))
        for role in diagnosis.roles
        for part, values in role.quantiles.items()
    ]
    words = ["No tokenizer is named: lengths are in words (--data.tokenizer NAME)."]
    title = f"Lengths in {diagnosis.unit}, before any cut"
    header = ("role", "part", *(f"{q} %" for q in QUANTILES))
    return Finding(title, header, rows, [] if diagnosis.unit == "tokens" else words)


def _limits(diagnosis: Diagnosis) -> Finding:
    rows = []
    for role in diagnosis.roles:
        total = role.pairs + len(role.bad_rows.get("too_long", ()))
        for row in _telling(role.limits or (), diagnosis.max_length):
            length = f"{row.max_length}{' *' if row.max_length == diagnosis.max_length else ''}"
            rows.append((role.role, length, _share(row.cut, total), _share(row.too_long, total)))
    remarks = [_NO_TOKENIZER]
    if diagnosis.max_length is not None:
        remarks = ["* as set"]
        remarks += ["A run refuses the data while rows are left out."] if diagnosis.truncation == "error" else []
    title = f"What max_length would do (truncation: {diagnosis.truncation})"
    return Finding(title, ("role", "max_length", "prompts cut", "rows left out"), rows, remarks)


def _telling(limits: Sequence[Limit], chosen: int | None) -> Iterator[Limit]:
    """Limits up to the first that would change no row, and the one that is set."""
    whole = False
    for limit in limits:
        if not whole or limit.max_length == chosen:
            yield limit
        whole = whole or not (limit.cut or limit.too_long)


def _layouts(diagnosis: Diagnosis) -> Finding:
    rows = [
        (role.role, layout.name, f"{layout.tokens_per_pair:.0f}", _percent(layout.padding))
        for role in diagnosis.roles
        for layout in role.layouts or ()
    ]
    limit = f"max_length {diagnosis.max_length}"
    batches = f"batch_size {diagnosis.batch_size}, accumulation {diagnosis.accumulate}"
    remark = (
        "model.layout auto computes the fewest that the model allows. Padded rows are grouped by length within a step; "
        "with accumulation 1 there is nothing to group."
    )
    one = diagnosis.roles[0].kind.removesuffix("s")
    title = f"Tokens computed per {one}, {limit}, {batches}"
    return Finding(title, ("role", "batches", f"tokens per {one}", "padding"), rows, [remark])


def verdict(diagnosis: Diagnosis) -> str:
    """One sentence."""
    dropped, read = (sum(getattr(role, name) for role in diagnosis.roles) for name in ("dropped", "rows_read"))
    settings = "no tokenizer" if diagnosis.tokenizer is None else f"{diagnosis.tokenizer}, {diagnosis.template}"
    if dropped == 0:
        return f"All {read} rows can be used ({settings})."
    if empty := [role.role for role in diagnosis.roles if not role.pairs]:
        return f"No row of {' and '.join(empty)} can be used ({settings})."
    return f"{dropped} of {read} rows would be left out, the others can be used ({settings})."


def print_diagnosis(diagnosis: Diagnosis, console: Console) -> None:
    """The findings as tables, and the samples in colour."""
    for finding in findings(diagnosis):
        if finding.rows:
            shape = table.Table(title=finding.title, title_justify="left", title_style="bold")
            for number, column in enumerate(finding.header):
                shape.add_column(column, overflow="fold", justify="left" if number < 2 else "right")
            for row in finding.rows:
                shape.add_row(*(Text(shown(cell)) for cell in row))
            console.print(shape)
        else:
            console.print(Text(finding.title, style="bold"))
        for remark in finding.remarks:
            console.print(Text(f"  {shown(remark)}"))
        console.print()
    styles = {"control": "bold magenta", "prompt": "dim", "response": "green", "gap": "yellow"}
    for title, pieces in _sample_rows(diagnosis):
        console.print(Text(shown(title), style="bold"))
        line = Text()
        for piece in pieces:
            underline = " underline" if piece.in_response else ""
            line.append(visible(piece.text), style=styles[piece.kind] + underline)
        console.print(line)
        console.print()
    if diagnosis.unit == "tokens":
        console.print(Text(_LEGEND))
    console.print(Text(shown(verdict(diagnosis)), style="bold"))


_LEGEND = "Underlined: the response mask. Magenta: control tokens. ⏎ marks a line end."


def html_page(diagnosis: Diagnosis) -> str:
    """The findings and samples as one page, drawn as a report is."""
    sections = []
    for finding in findings(diagnosis):
        tables = [Table(finding.header, finding.rows, "")] if finding.rows else []
        sections.append(Section(finding.title, tables, "\n\n".join(finding.remarks)))
    samples = [
        Pieces(title, [blocks.Piece(visible(p.text), p.kind + (" masked" if p.in_response else "")) for p in pieces])
        for title, pieces in _sample_rows(diagnosis)
    ]
    sections.append(Section("Examples as the model gets them", samples, _LEGEND))
    return to_html(Document("Data", sections, subtitle=verdict(diagnosis)))


def row_numbers(origins: Sequence[str], *, files: int) -> str:
    """`47, 291, 548 and 4 more`: the rows of `file, row 47` and so on, with the file where there are several."""
    split = [origin.rpartition(", row ") for origin in origins[:_ROWS_SHOWN]]
    shown = [number if files == 1 else f"{file.rpartition('/')[2]} {number}" for file, _, number in split]
    more = f" and {len(origins) - _ROWS_SHOWN} more" if len(origins) > _ROWS_SHOWN else ""
    return ", ".join(shown) + more


def visible(text: str) -> str:
    """Line ends marked, control characters written out, so that nothing of a text can move the terminal's cursor."""
    marks = {"\n": "⏎\n", "\r": "␍"}
    return "".join(marks.get(c) or (c if c.isprintable() else f"\\x{ord(c):02x}") for c in text)


def _oddities(role: RoleDiagnosis) -> Iterator[tuple[str, list[str]]]:
    yield f"copies of an earlier {role.kind.removesuffix('s')}", role.duplicates
    judged = role.kind == "responses"
    yield "the same with the opposite label" if judged else "contradicted by another pair", role.contradictions
    if role.shared_prompts is not None:
        yield "prompt is also trained on", role.shared_prompts
    yield "prompt is cut to fit max_length", role.rows_cut
    yield "a text holds what looks like a control token or role marker", role.foreign_tokens


def _sample_rows(diagnosis: Diagnosis) -> Iterator[tuple[str, list[Piece]]]:
    samples: list[Sample] = diagnosis.roles[0].samples
    for sample in samples:
        for side, pieces in sample.sides.items():
            yield f"{sample.origin}: {side}", [part for piece in pieces for part in _shortened(piece)]


def _shortened(piece: Piece) -> Iterator[Piece]:
    text, hidden = piece.text, len(piece.text) - _SHOWN_AT_THE_START - _SHOWN_AT_THE_END
    if hidden <= 0:
        yield piece
        return
    yield replace(piece, text=text[:_SHOWN_AT_THE_START])
    yield Piece(f" ... {hidden} characters more ... ", "gap", piece.in_response)
    yield replace(piece, text=text[-_SHOWN_AT_THE_END:])


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _share(count: int, total: int) -> str:
    return f"{count} ({_percent(count / total)})" if total else f"{count}"
