"""The tables as Markdown, LaTeX (booktabs), CSV, and plain text for a terminal."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from mgcc_dist.reporting.grids import Grid, Section, Text
from mgcc_dist.reporting.tables import Table

COLUMNS = (
    *("table", "row", "data set", "protocol", "metric", "runs", "missing", "mean", "std", "paper mean", "paper std"),
    *("difference", "reference minus row", "low", "high", "p", "p_holm"),
)


def markdown(sections: Sequence[Section]) -> str:
    lines = ["# mgcc-dist report", ""]
    for each in sections:
        lines += [f"## {_plain_markdown(each.title)}", ""]
        lines += [line for note in each.notes for line in (_plain_markdown(note), "")]
        for grid in each.grids:
            lines += _markdown_grid(grid)
        lines += [line for note in each.legend for line in (_plain_markdown(note), "")]
        for grid in each.details:
            lines += _markdown_grid(grid)
    return "\n".join(lines)


def _markdown_grid(grid: Grid) -> list[str]:
    headings = [
        " ".join(filter(None, (group, heading))) for group, names in grid.groups for heading in names
    ]  # Markdown has no headings over several columns
    lines = [
        f"**{_plain_markdown(grid.caption)}**",
        "",
        f"| | {' | '.join(map(_plain_markdown, headings))} |",
        f"| --- |{' ---: |' * len(headings)}",
    ]
    for name, texts in grid.rows:
        lines.append(f"| {' | '.join([_plain_markdown(name), *map(_markdown_text, texts)])} |")
    return [*lines, ""]


def _markdown_text(text: Text) -> str:
    shown = _plain_markdown(text.text)
    return (f"**{shown}**" if text.bold else shown) + (" †" if text.mark else "")


def _plain_markdown(text: str) -> str:
    """Text in which Markdown and its HTML see nothing of theirs, on one line."""
    for sign in "\\`*_[]<|~":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


def plain(section: Section) -> str:
    """Columns aligned by spaces."""
    lines = [section.title]
    for grid in section.grids:
        over = [group if place == 0 else "" for group, names in grid.groups for place in range(len(names))]
        below = [heading for _, names in grid.groups for heading in names]
        rows = [["", *over], ["", *below], *([name, *(text.text for text in texts)] for name, texts in grid.rows)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines += ["", grid.caption]
        for row in rows:
            cells = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
            lines.append("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())
    return "\n".join([*lines, "", *section.notes, *section.legend])


LATEX = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "[": "{[}",  # at the start of a row it would belong to the line break before it, as a star would
    "]": "{]}",
    "*": "{*}",
    "Δ": r"$\Delta$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
}


def latex(sections: Sequence[Section]) -> str:
    r"""Table environments to be \input into a document."""
    lines = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}"]
    for each in sections:
        notes = " ".join([*each.notes, *each.legend])
        for grid in (*each.grids, *each.details):
            lines += ["", *_latex_grid(grid, f"{each.title}. {grid.caption}", notes)]
            notes = ""  # with the first table of the section
    return "\n".join(lines) + "\n"


def _latex_grid(grid: Grid, caption: str, notes: str) -> list[str]:
    over, rules, column = [], [], 2
    for group, names in grid.groups:
        over.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{_plain_latex(group)}}}")
        if group:
            rules.append(rf"\cmidrule(lr){{{column}-{column + len(names) - 1}}}")
        column += len(names)
    rows = [[_plain_latex(name), *map(_latex_text, texts)] for name, texts in grid.rows]
    below = rf"\par\smallskip\parbox{{\textwidth}}{{\footnotesize {_plain_latex(' '.join(notes.split()))}}}"
    return [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_plain_latex(caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (column - 2)}}}",
        r"\toprule",
        f"& {' & '.join(over)} \\\\",
        *rules,
        f"& {' & '.join(_plain_latex(heading) for _, names in grid.groups for heading in names)} \\\\",
        r"\midrule",
        *(f"{' & '.join(row)} \\\\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        *([below] if notes else []),
        r"\end{table*}",
    ]


def _latex_text(text: Text) -> str:
    shown = _plain_latex(text.text)
    return (rf"\textbf{{{shown}}}" if text.bold else shown) + (r"$^\dagger$" if text.mark else "")


def _plain_latex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text)


def comma_separated(lines: Iterable[Sequence[object]]) -> str:
    """Lines of `COLUMNS` under their headings."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(lines)
    return content.getvalue()


def lines_of(table: Table) -> Iterator[tuple[object, ...]]:
    """One line of `COLUMNS` for each data set, row, protocol and metric; at full precision."""
    for dataset, cells in table.cells.items():
        for row, cell in cells.items():
            for (protocol, metric), score in cell.scores.items():
                place = (table.sweep.name, row, dataset, protocol, metric, len(cell.finished), cell.missing)
                test = score.test
                tested = (test.mean, test.low, test.high, test.p, score.p_holm) if test else (None,) * 5
                yield (*place, score.mean, score.deviation, *(score.paper or (None, None)), score.difference, *tested)
