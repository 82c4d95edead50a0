"""Put runs on one page: `python -m mgcc_dist.report out/demo --out out/demo/report.html`.

Finds every run folder under the given ones and writes a single HTML file that opens offline: scores in three
protocols, curves, galleries, and where the numbers come from. Runs that differ only in split number and seed share a
row, as mean and standard deviation. Prints the main table, and the page's path.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentError, ArgumentParser

from mgcc_dist.errors import UserError, run_program
from mgcc_dist.files import write_text
from mgcc_dist.reporting import page, runs
from mgcc_dist.reporting.runs import Found

# Columns of the printed table: heading, place in a run's summary, factor. The page has more.
COLUMNS: list[tuple[str, tuple[str, ...], float]] = [
    ("IoU", ("corrected", "iou"), 100),
    ("F1", ("corrected", "f1"), 100),
    ("lesion IoU", ("lesion", "iou"), 100),
    ("specificity", ("specificity",), 100),
    ("HD95 px", ("hd95",), 1),
]


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(prog="report", description=__doc__, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("runs", nargs="+", type=str, help="folders in which to look for runs, at any depth")
    parser.add_argument("--out", type=str, default="report.html", help="page to write")
    try:
        arguments = parser.parse_args(list(sys.argv[1:] if argv is None else argv))
        run([Path(folder) for folder in arguments.runs], Path(arguments.out))
    except ArgumentError as error:
        raise UserError(" ".join(error.message.split())) from error
    except OSError as error:
        raise UserError(str(error)) from error


def run(folders: Sequence[Path], out: Path) -> None:
    """Write the page and print the main table.

    Raises:
        UserError: there is no run to report, or a config.yaml or result.json is damaged.
    """
    found = runs.find(folders)
    write_text(out, page.render(found))
    print(table(found))
    print(f"report: {out}")


def table(found: Found) -> str:
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
