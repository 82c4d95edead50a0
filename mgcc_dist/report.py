"""Report finished runs: `mgcc report out/demo --out out/demo/report.html`.

Finds all run folders, and those of `mgcc evaluate`, below the given ones and writes one HTML file that opens offline:
scores under three protocols, training curves, galleries, and provenance. Runs that differ only in split number and seed
share a row, as mean and standard deviation. Prints the main table and the path of the page.

Where the runs allow it, the page also has per-split and pooled scores, a matrix of trained on by tested on, learning
curves over labels, critical-difference diagrams, and the quality and audit of synthetic images. `--cases` adds the
paper's Figure 4.

`--sweep table_1` (or a file) puts that sweep's table first, next to the paper's values, with missing runs and
paired tests. `--efficiency` measures the networks of Table VII. Both can also be written as .md, .tex and .csv.
"""

from dataclasses import dataclass

from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.options import argument, flag
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.value_types import FileOrName, FilePath, FolderPath, Name

TABLE_7 = "table_7"


@dataclass(frozen=True)
class ReportConfig:
    runs: tuple[FolderPath, ...] = argument((), positional=True, nargs="*")
    """folders to search for runs, at any depth; without any, the `out` of the sweeps"""
    sweep: tuple[FileOrName, ...] = argument((), nargs="+")
    """sweep files, or names of shipped sweeps, whose tables to build"""
    datasets: tuple[Name, ...] = argument((), nargs="+")
    """with --sweep: only these data sets"""
    rows: tuple[Name, ...] = argument((), nargs="+")
    """with --sweep: only these rows"""
    seeds: tuple[int, ...] = argument((), nargs="+")
    """with --sweep: only these seeds"""
    cases: bool = flag()
    """draw chosen images with every row's contour (the paper's Figure 4), from the runs' weights and shards"""
    efficiency: FileOrName | None = argument(None, nargs="?", const=TABLE_7)
    """measure the networks of a sweep file or shipped sweep; without one, those of table_7"""
    out: tuple[FilePath, ...] = argument((), action="append")
    """output file, report.html if not given; the suffix sets the format: .html, .md, .tex, .csv. Repeatable"""


def run(config: ReportConfig) -> None:
    """Build the report and write it to all outputs."""
    from mgcc_dist.reporting.report import write_report
    from mgcc_dist.sweep.expansion import read_sweep, select

    for key in ("datasets", "rows", "seeds"):
        if getattr(config, key) and not config.sweep:
            raise UserError(f"--{key}: selects runs of a sweep. Add --sweep FILE.")
    sweeps = [select(read_sweep(name), config.datasets, config.rows, config.seeds) for name in config.sweep]
    measured = read_sweep(config.efficiency) if config.efficiency else None
    try:
        write_report(config.runs, sweeps, config.out, measured, config.cases)
    except OSError as error:
        raise UserError(str(error)) from error


PROGRAM = Program("report", __doc__, Command(ReportConfig, run, "report finished runs", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("report", main)
