"""Put runs on one page: `python -m mgcc_dist.report out/demo --out out/demo/report.html`.

Finds every run folder under the given ones and writes a single HTML file that opens offline: scores in three
protocols, curves, galleries, and where the numbers come from. Runs that differ only in split number and seed share a
row, as mean and standard deviation. Prints the main table, and the page's path.

With `--sweep configs/sweeps/table_1.yaml` the page begins with that table, beside the paper's, with what is missing and
with paired tests; `--efficiency` measures the networks of Table VII. Both can be written as .md, .tex and .csv too.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.files import write_text
from mgcc_dist.common.sweep_file import read_sweep
from mgcc_dist.reporting import efficiency, formats, grids, page, runs
from mgcc_dist.reporting.efficiency import Efficiency
from mgcc_dist.reporting.grids import Section
from mgcc_dist.reporting.runs import Found
from mgcc_dist.reporting.tables import Table, make_table

TABLE_7 = CONFIGS / "sweeps" / "table_7.yaml"

# Columns of the printed table: heading, place in a run's summary, factor. The page has more.
COLUMNS: list[tuple[str, tuple[str, ...], float]] = [
    ("IoU", ("corrected", "iou"), 100),
    ("F1", ("corrected", "f1"), 100),
    ("lesion IoU", ("lesion", "iou"), 100),
    ("specificity", ("specificity",), 100),
    ("HD95 px", ("hd95",), 1),
]


@dataclass(frozen=True)
class Report:
    found: Found = field(default_factory=Found)
    tables: list[Table] = field(default_factory=list)
    measured: Efficiency | None = None

    @property
    def sections(self) -> list[Section]:
        sections = [grids.section(table) for table in self.tables]
        return [*sections, efficiency.section(self.measured)] if self.measured else sections

    def as_csv(self) -> str:
        lines = [line for table in self.tables for line in formats.lines_of(table)]
        return formats.comma_separated([*lines, *(efficiency.lines_of(self.measured) if self.measured else ())])


FORMATS: dict[str, Callable[[Report], str]] = {
    ".html": lambda report: page.render(report.found, report.sections),
    ".md": lambda report: formats.markdown(report.sections),
    ".tex": lambda report: formats.latex(report.sections),
    ".csv": Report.as_csv,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="report", description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument(
        "runs", nargs="*", type=str, help="folders in which to look for runs, at any depth (default: the sweeps' out)"
    )
    parser.add_argument("--sweep", nargs="+", type=str, default=[], help="sweep files whose tables to make")
    parser.add_argument(
        "--efficiency",
        nargs="?",
        const=str(TABLE_7),
        type=str,
        help="measure the networks of a sweep (default: table_7)",
    )
    parser.add_argument(
        "--out",
        action="append",
        type=str,
        help=f"file to write, by its suffix: {', '.join(FORMATS)}; may be given several times (default: report.html)",
    )
    try:
        given = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        folders, sweeps, outs = (list(map(Path, paths or ())) for paths in (given.runs, given.sweep, given.out))
        run(folders, sweeps, outs, Path(given.efficiency) if given.efficiency else None)
    except ArgumentError as error:
        raise UserError(" ".join(error.message.split())) from error
    except OSError as error:
        raise UserError(str(error)) from error


def run(folders: Sequence[Path], sweeps: Sequence[Path], outs: Sequence[Path], cost_of: Path | None) -> None:
    """Make the report, print the main table, write the report to `outs`.

    Raises:
        UserError: there is no run to report, a config.yaml or result.json is damaged, a run is not what its sweep asks
            for, or a file has a suffix of no format.
    """
    if not (folders or sweeps or cost_of):
        raise UserError("name folders of runs, or --sweep or --efficiency with a sweep file")
    if not outs and (folders or sweeps):
        outs = [Path("report.html")]
    for out in outs:
        if out.suffix not in FORMATS:
            raise UserError(f"{out}: a report is one of {', '.join(FORMATS)}")
        if out.suffix != ".html" and not (sweeps or cost_of):
            raise UserError(f"{out}: {out.suffix} holds the tables of --sweep or --efficiency, and neither is given")

    asked = [read_sweep(path) for path in sweeps]
    folders = folders or [sweep.out for sweep in asked if sweep.out.is_dir()]
    found = runs.find(folders) if folders else Found()
    tables = [make_table(sweep, found, folders) for sweep in asked]
    report = Report(found, tables, efficiency.measure(read_sweep(cost_of)) if cost_of else None)
    written = {out: FORMATS[out.suffix](report) for out in outs}
    for out, content in written.items():
        write_text(out, content)
    if folders:
        print(main_table(found))
    for table in tables:
        print(coverage(table))
    if report.measured:
        print(formats.plain(efficiency.section(report.measured)))
    for out in outs:
        print(f"report: {out}")


def coverage(table: Table) -> str:
    """How many of a sweep's runs are finished, and which rows lack some."""
    cells = [(dataset, row, cell) for dataset, column in table.cells.items() for row, cell in column.items()]
    finished, asked = sum(len(cell.finished) for *_, cell in cells), sum(cell.asked for *_, cell in cells)
    lines = [f"{table.sweep.name}: {finished} of {asked} runs are finished"]
    lines += [f"  {row} on {dataset}: {grids.runs(cell)}" for dataset, row, cell in cells if cell.missing]
    return "\n".join(lines)


def main_table(found: Found) -> str:
    """The main table as plain text, and what is not in it because it is not finished."""
    lines = []
    if groups := runs.group(found.segmentation):
        rows = [["method", "labeled", "unlabeled", *(heading for heading, _, _ in COLUMNS), "runs"]]
        for each in groups:
            scores = [each.score("best", *path, scale=scale) for _, path, scale in COLUMNS]
            rows.append([each.method, each.count("labeled"), each.count("unlabeled"), *scores, each.names])
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        for method, *numbers, names in rows:
            aligned = [cell.rjust(width) for cell, width in zip(numbers, widths[1:-1], strict=True)]
            lines.append("  ".join([method.ljust(widths[0]), *aligned, names]))
        lines.insert(1, "-" * max(map(len, lines)))
        lines.append("Validation images at the best step, corrected protocol, in percent.")
        if any("*" in row[2] for row in rows):
            lines.append("* synthetic images among them")
    lines += [f"not finished: {each.name}" for each in found.unfinished]
    return "\n".join(lines or ["no segmentation run"])


if __name__ == "__main__":
    run_program("report", main)
