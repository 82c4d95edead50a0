"""Build the report of `mgcc report`: find runs, build tables, write files."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_text
from mgcc_dist.reporting import efficiency, formats
from mgcc_dist.reporting.efficiency import Efficiency
from mgcc_dist.reporting.page import render_page
from mgcc_dist.reporting.runs import RunCollection, find_runs, group_runs
from mgcc_dist.reporting.supplement import supplement
from mgcc_dist.reporting.tables import ResultTable, build_table
from mgcc_dist.reporting.views import ReportSection, format_run_count, sweep_section
from mgcc_dist.sweep.expansion import Sweep

# Metrics of the printed table: heading, path in a run's summary, scale. The page has more.
COLUMNS: list[tuple[str, tuple[str, ...], float]] = [
    ("IoU", ("corrected", "iou"), 100),
    ("F1", ("corrected", "f1"), 100),
    ("lesion IoU", ("lesion", "iou"), 100),
    ("specificity", ("specificity",), 100),
    ("HD95 px", ("hd95",), 1),
    ("HD95 penalized", ("hd95_penalized",), 1),
]


@dataclass(frozen=True)
class Report:
    found: RunCollection = field(default_factory=RunCollection)
    tables: list[ResultTable] = field(default_factory=list)
    measured: Efficiency | None = None
    supplement: list[ReportSection] = field(default_factory=list)

    @property
    def first_sections(self) -> list[ReportSection]:
        """what the command line asks for: sweeps and efficiency"""
        sections = [sweep_section(table) for table in self.tables]
        return [*sections, efficiency.efficiency_section(self.measured)] if self.measured else sections

    @property
    def sections(self) -> list[ReportSection]:
        return [*self.first_sections, *self.supplement]

    def to_csv(self) -> str:
        rows = [row for table in self.tables for row in formats.csv_rows(table)]
        return formats.to_csv([*rows, *(efficiency.csv_rows(self.measured) if self.measured else ())])


FORMATS: dict[str, Callable[[Report], str]] = {
    ".html": lambda report: render_page(report.found, report.first_sections, report.supplement),
    ".md": lambda report: formats.to_markdown(report.sections),
    ".tex": lambda report: formats.to_latex(report.sections),
    ".csv": Report.to_csv,
}


def write_report(
    folders: Sequence[Path],
    sweeps: Sequence[Sweep],
    outs: Sequence[Path],
    efficiency_sweep: Sweep | None,
    cases: bool = False,
) -> None:
    """Build the report, with predictions of chosen images if `cases`; print the main table; write to `outs`.

    Raises:
        UserError: there are no runs to report, or all are damaged, a run's config differs from its sweep's, or the
            suffix of an output file is unknown.
    """
    if not (folders or sweeps or efficiency_sweep):
        raise UserError("nothing to report. Pass folders of runs, --sweep FILE or --efficiency.")
    if not outs and (folders or sweeps):
        outs = [Path("report.html")]
    for out in outs:
        if out.suffix not in FORMATS:
            raise UserError(f"{out}: unknown format {out.suffix!r}. Use one of: {', '.join(FORMATS)}.")
        if out.suffix == ".csv" and not (sweeps or efficiency_sweep):
            raise UserError(f"{out}: .csv holds only sweep tables. Add --sweep FILE or --efficiency.")

    folders = folders or [sweep.out for sweep in sweeps if sweep.out.is_dir()]
    found = find_runs(folders) if folders else RunCollection()
    tables = [build_table(sweep, found, folders) for sweep in sweeps]
    measured = None
    if efficiency_sweep:
        from mgcc_dist.reporting.efficiency_measure import (
            measure_sweep,  # imports torch, which other reports don't need
        )

        measured = measure_sweep(efficiency_sweep)
    report = Report(found, tables, measured, supplement(found, folders, tables, cases))
    for out in outs:
        if out.suffix != ".html" and not report.sections:
            raise UserError(
                f"{out}: these runs give no table to compare. Write .html, or add --sweep FILE or --efficiency."
            )
    written = {out: FORMATS[out.suffix](report) for out in outs}
    for out, content in written.items():
        write_text(out, content)
    if folders:
        print(main_table(found))
    for table in tables:
        print(coverage(table))
    if report.measured:
        print(formats.to_text(efficiency.efficiency_section(report.measured)))
    for out in outs:
        print(f"report: {out}")


def coverage(table: ResultTable) -> str:
    """Format how many of a sweep's runs are finished and which rows lack runs."""
    results = [(dataset, row, result) for dataset, rows in table.results.items() for row, result in rows.items()]
    finished = sum(len(result.finished) for *_, result in results)
    expected = sum(result.expected for *_, result in results)
    lines = [f"{table.sweep.name}: {finished} of {expected} runs are finished"]
    lines += [f"  {row} on {dataset}: {format_run_count(result)}" for dataset, row, result in results if result.missing]
    return "\n".join(lines)


def main_table(found: RunCollection) -> str:
    """Format the main table as plain text, followed by the unfinished runs."""
    lines = []
    if groups := group_runs(found.segmentation):
        headings = ["method", "labeled", "unlabeled", *(heading for heading, _, _ in COLUMNS), "runs"]
        rows = [
            [
                *(group.method, group.count("labeled"), group.count("unlabeled")),
                *(group.score("best", *path, scale=scale) for _, path, scale in COLUMNS),
                group.names,
            ]
            for group in groups
        ]
        align = ("left", *["right"] * (len(headings) - 2), "left")
        lines.append(tabulate(rows, headings, tablefmt="simple", colalign=align, disable_numparse=True))
        lines.append("Validation or test images at the best step, corrected protocol, in percent.")
        lines.append(
            "HD95 in pixels, and how many of the lesions it covers; penalized: a missed lesion counts as the image "
            "diagonal."
        )
        if any("*" in row[1] + row[2] for row in rows):
            lines.append("* includes synthetic images")
    lines += [f"unfinished: {run.name}" for run in found.unfinished]
    return "\n".join(lines or ["no segmentation runs found"])
