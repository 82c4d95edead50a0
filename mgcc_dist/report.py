"""Put runs on one page: `python -m mgcc_dist.report out/demo --out out/demo/report.html`.

Finds every run folder under the given ones and writes a single HTML file that opens offline: scores in three
protocols, curves, galleries, and where the numbers come from. Runs that differ only in split number and seed share a
row, as mean and standard deviation. Prints the main table, and the page's path.
"""

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from mgcc_dist.errors import UserError, run_program
from mgcc_dist.files import write_text
from mgcc_dist.reporting import page, runs
from mgcc_dist.reporting.runs import Found


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="report", description=__doc__, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=str, help="folders in which to look for runs, at any depth")
    parser.add_argument("--out", type=str, default="report.html", help="page to write")
    arguments = parser.parse_args(argv)
    run([Path(folder) for folder in arguments.runs], Path(arguments.out))


def run(folders: Sequence[Path], out: Path) -> None:
    """Write the page and print the main table.

    Raises:
        UserError: there is no finished run to report, or a result.json is damaged.
    """
    found = runs.find(folders)
    if not found.segmentation and not found.generative:
        raise UserError(f"no run under {', '.join(map(str, folders))} is finished: none has a result.json")
    write_text(out, page.render(found))
    print(table(found))
    print(f"report: {out}")


def table(found: Found) -> str:
    """The main table as plain text."""
    groups = runs.group(found.segmentation)
    if not groups:
        return "no segmentation run is finished"
    rows = [["method", "images", "runs", *(heading for heading, _, _ in page.HEADLINE)]]
    rows += [[each.method, each.data, str(len(each.runs)), *page.headline(each)] for each in groups]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, "validation images, best step, corrected protocol, percent (distances in pixels)"])


if __name__ == "__main__":
    run_program("report", main)
