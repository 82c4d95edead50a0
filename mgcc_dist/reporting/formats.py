"""Write report sections as Markdown, LaTeX (booktabs), CSV, and plain text for a terminal."""

import csv
import io
from collections.abc import Iterable, Iterator, Sequence

from tabulate import tabulate

from mgcc_dist.reporting.runs import format_names
from mgcc_dist.reporting.tables import ResultTable
from mgcc_dist.reporting.views import Cell, ReportSection, TableView

CSV_COLUMNS = (
    *("table", "row", "data set", "protocol", "metric", "runs", "missing", "mean", "std", "paper mean", "paper std"),
    *("difference", "reference minus row", "low", "high", "p", "p_holm", "run names"),
)


def to_text(section: ReportSection) -> str:
    """Format a section as tables of aligned columns."""
    lines = [section.title]
    for table in section.tables:
        headings = [f"{group}\n{heading}" for group, names in table.column_groups for heading in names]
        rows = [[name, *(cell.plain for cell in cells)] for name, cells in table.rows]
        align = ("left", *["right"] * len(headings))
        lines += ["", table.caption, ""]
        lines.append(tabulate(rows, headers=["", *headings], tablefmt="simple", colalign=align, disable_numparse=True))
    return "\n".join([*lines, "", *section.notes, *section.legend])


def to_markdown(sections: Sequence[ReportSection]) -> str:
    """Format sections as a Markdown document."""
    lines = ["# mgcc-dist report", ""]
    for section in sections:
        lines += [f"## {_escape_markdown(section.title)}", ""]
        lines += [line for note in section.notes for line in (_escape_markdown(note), "")]
        for table in section.tables:
            lines += _markdown_table(table)
        lines += [line for note in section.legend for line in (_escape_markdown(note), "")]
        for table in section.details:
            lines += _markdown_table(table)
    return "\n".join(lines)


def _markdown_table(table: TableView) -> list[str]:
    # Markdown has no headings that span columns, so each column repeats its group's.
    headings = [" ".join(filter(None, (group, heading))) for group, names in table.column_groups for heading in names]
    lines = [
        f"**{_escape_markdown(table.caption)}**",
        "",
        f"| | {' | '.join(map(_escape_markdown, headings))} |{' run names |' * bool(table.runs)}",
        f"| --- |{' ---: |' * len(headings)}{' --- |' * bool(table.runs)}",
    ]
    for name, cells in table.rows:
        names = [_escape_markdown(table.runs.get(name, ""))] if table.runs else []
        lines.append(f"| {' | '.join([_escape_markdown(name), *map(_markdown_cell, cells), *names])} |")
    return [*lines, ""]


def _markdown_cell(cell: Cell) -> str:
    text = _escape_markdown(cell.plain)
    return (f"**{text}**" if cell.bold else text) + (" †" if cell.significant else "")


def _escape_markdown(text: str) -> str:
    """Escape Markdown and HTML syntax and put the text on one line."""
    for character in "\\`*_[]<|~":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


LATEX_ESCAPES = {
    "\\": r"\textbackslash{}",
    **{sign: f"\\{sign}" for sign in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "[": "{[}",  # [ and * at the start of a row would be read as arguments of the line break before it
    "]": "{]}",
    "*": "{*}",
    "Δ": r"$\Delta$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "\N{MINUS SIGN}": "$-$",
    "\N{EN DASH}": "--",
    "\N{MULTIPLICATION SIGN}": r"$\times$",
}


def to_latex(sections: Sequence[ReportSection]) -> str:
    r"""Format sections as table environments, for \input in a document."""
    lines = [r"% needs \usepackage{booktabs} and \usepackage{graphicx}"]
    for section in sections:
        notes = " ".join([*section.notes, *section.legend])
        for table in (*section.tables, *section.details):
            runs = "".join(f" {row}: {names}." for row, names in table.runs.items())
            below = f"{notes} Runs.{runs}" if runs else notes
            lines += ["", *_latex_table(table, f"{section.title}. {table.caption}", below)]
            notes = ""  # only below the first table of the section
    return "\n".join(lines) + "\n"


def _latex_table(table: TableView, caption: str, notes: str) -> list[str]:
    group_headings, rules, column = [], [], 2
    for group, names in table.column_groups:
        group_headings.append(rf"\multicolumn{{{len(names)}}}{{c}}{{{_escape_latex(group)}}}")
        if group:
            rules.append(rf"\cmidrule(lr){{{column}-{column + len(names) - 1}}}")
        column += len(names)
    headings = [_escape_latex(heading) for _, names in table.column_groups for heading in names]
    rows = [[_escape_latex(name), *map(_latex_cell, cells)] for name, cells in table.rows]
    footnote = rf"\par\smallskip\parbox{{\textwidth}}{{\footnotesize {_escape_latex(' '.join(notes.split()))}}}"
    return [
        r"\begin{table*}",
        r"\centering",
        rf"\caption{{{_escape_latex(caption)}}}",
        r"\resizebox{\textwidth}{!}{%",
        rf"\begin{{tabular}}{{l{'r' * (column - 2)}}}",
        r"\toprule",
        f"& {' & '.join(group_headings)} \\\\",
        *rules,
        f"& {' & '.join(headings)} \\\\",
        r"\midrule",
        *(f"{' & '.join(row)} \\\\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}}",
        *([footnote] if notes else []),
        r"\end{table*}",
    ]


def _latex_cell(cell: Cell) -> str:
    text = _escape_latex(cell.plain)
    return (rf"\textbf{{{text}}}" if cell.bold else text) + (r"$^\dagger$" if cell.significant else "")


def _escape_latex(text: str) -> str:
    return "".join(LATEX_ESCAPES.get(character, character) for character in text)


def to_csv(rows: Iterable[Sequence[object]]) -> str:
    """Format rows of `CSV_COLUMNS`, with a header."""
    content = io.StringIO()
    writer = csv.writer(content, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(rows)
    return content.getvalue()


def csv_rows(table: ResultTable) -> Iterator[tuple[object, ...]]:
    """Yield one row of `CSV_COLUMNS` per data set, row, protocol and metric, at full precision."""
    for dataset, results in table.results.items():
        for row, result in results.items():
            names = format_names([run.name for run in result.finished.values()])
            for (protocol, metric), score in result.scores.items():
                key = (table.sweep.name, row, dataset, protocol, metric, len(result.finished), result.missing)
                test = score.test
                test_columns = (test.mean, test.low, test.high, test.p, score.p_holm) if test else (None,) * 5
                paper = score.paper or (None, None)
                yield (*key, score.mean, score.std, *paper, score.difference, *test_columns, names)
