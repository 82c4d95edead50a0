"""Report finished runs: `mgcc report out/demo --out out/demo/report.html`.

Finds all run folders below the given ones and writes one HTML file that opens offline: scores under three protocols,
training curves, galleries, and provenance. Runs that differ only in split number and seed share a row, as mean and
standard deviation. Prints the main table and the path of the page.

`--sweep configs/sweeps/table_1.yaml` puts that sweep's table first, next to the paper's values, with missing runs and
paired tests. `--efficiency` measures the networks of Table VII. Both can also be written as .md, .tex and .csv.
"""

from dataclasses import dataclass

from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.options import argument
from mgcc_dist.common.program import Command, Program
from mgcc_dist.common.value_types import FilePath, FolderPath

TABLE_7 = CONFIGS / "sweeps" / "table_7.yaml"


@dataclass(frozen=True)
class ReportConfig:
    runs: tuple[FolderPath, ...] = argument((), positional=True, nargs="*")
    """folders to search for runs, at any depth; without any, the `out` of the sweeps"""
    sweep: tuple[FilePath, ...] = argument((), nargs="+")
    """sweep files whose tables to build"""
    efficiency: FilePath | None = argument(None, nargs="?", const=TABLE_7)
    """measure the networks of a sweep file; without a file, those of table_7.yaml"""
    out: tuple[FilePath, ...] = argument((), action="append")
    """output file, report.html if not given; the suffix sets the format: .html, .md, .tex, .csv. Repeatable"""


def run(config: ReportConfig) -> None:
    """Build the report and write it to all outputs."""
    from mgcc_dist.reporting.report import write_report

    try:
        write_report(config.runs, config.sweep, config.out, config.efficiency)
    except OSError as error:
        raise UserError(str(error)) from error


PROGRAM = Program("report", __doc__, Command(ReportConfig, run, "report finished runs", __doc__))
main = PROGRAM.main

if __name__ == "__main__":
    run_program("report", main)
