"""Compare two result files metric by metric, or print one as a table.

    python -m benchmarks.compare benchmarks/results/A.json benchmarks/results/B.json
    python -m benchmarks.compare --table benchmarks/results/train_step-cpu.json    the rows as a Markdown table

A metric is a number under `rows` of the file, or of each part of a file written by benchmarks.collect. Its name tells
which value is better: the higher one for `..._per_second`, `ratio...` and `tflops`, the lower one for names with
`seconds`, `milliseconds`, `ms`, `us` or `mib`. Other metrics get a ratio only.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.files import read_json

HIGHER_IS_BETTER = re.compile(r"per_(processor_)?second|ratio|tflops")
LOWER_IS_BETTER = re.compile(r"(^|_)(seconds|milliseconds|ms|us|mib)($|_)")
FACTS = ("device", "processor", "cores", "commit", "date", "versions.torch", "versions.triton", "command")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="two result files, or one with --table")
    parser.add_argument("--table", action="store_true", help="print one file as a Markdown table")
    options = parser.parse_args()
    if len(options.files) != (1 if options.table else 2):
        parser.error("give two files, or one with --table")
    contents = [_read(path) for path in options.files]
    print(table(contents[0]) if options.table else comparison(*contents))


def comparison(first: dict[str, Any], second: dict[str, Any]) -> str:
    """Return machine and versions of both, one line per common metric, and the number of other metrics."""
    lines = []
    for fact in FACTS:
        a, b = (_fact(content, fact) for content in (first, second))
        lines.append(f"{fact:>16}  A {a}" if a == b else f"{fact:>16}  A {a}\n{'':>16}  B {b}")
    a, b = metrics(first), metrics(second)
    common = [name for name in a if name in b]
    width = max(map(len, common), default=0)
    lines += ["", f"{'':{width}}  {'A':>12}  {'B':>12}  {'B / A':>8}"]
    for name in common:
        ratio = f"{b[name] / a[name]:8.3f}" if a[name] else f"{'-':>8}"
        lines.append(f"{name:{width}}  {a[name]:12.6g}  {b[name]:12.6g}  {ratio}  {better(name, a[name], b[name])}")
    lines.append(f"{len(common)} metrics in both, {len(a) - len(common)} only in A, {len(b) - len(common)} only in B")
    return "\n".join(lines)


def better(name: str, a: float, b: float) -> str:
    """Return "A" or "B"; "" if they are equal or the name does not tell which is better."""
    last = name.rpartition(" / ")[2]
    if a == b or not (HIGHER_IS_BETTER.search(last) or LOWER_IS_BETTER.search(last)):
        return ""
    return "B" if (b > a) == bool(HIGHER_IS_BETTER.search(last)) else "A"


def metrics(content: dict[str, Any]) -> dict[str, float]:
    """Return every number under `rows` by its path "part / row / metric"."""
    parts = content.get("parts") or {"": content}
    return {
        name: value
        for part, inner in parts.items()
        for name, value in _numbers(inner.get("rows", {}), (part,) if part else ()).items()
    }


def table(content: dict[str, Any]) -> str:
    """Return the rows as Markdown, one column per metric; a row that was not run shows the reason."""
    rows = content["rows"]
    names = list(dict.fromkeys(name for row in rows.values() for name, value in row.items() if _is_number(value)))
    cells = []
    for name, row in rows.items():
        shown = [f"{row[key]:g}" if key in row else "" for key in names]
        if "not_run" in row:
            shown[:1] = [f"not run: {row['not_run']}"]
        label = f"{name} ({', '.join(row['settings'])})" if row.get("settings") else name
        cells.append([label, *shown])
    where = ", ".join(str(_fact(content, fact)) for fact in ("processor", "device", "cores"))
    source = f"{where} cores, torch {_fact(content, 'versions.torch')}, commit {_fact(content, 'commit')}:"
    columns = ["", *(name.replace("_", " ") for name in names)]
    return "\n".join([markdown_table(columns, cells, "---:"), "", source, f"`{_fact(content, 'command')}`"])


def markdown_table(columns: list[str], rows: list[list[str]], rule: str = "---") -> str:
    """Return a Markdown table; `rule` aligns all columns but the first."""
    lines = [columns, ["---", *[rule] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _numbers(tree: Any, path: tuple[str, ...]) -> dict[str, float]:
    if _is_number(tree):
        return {" / ".join(path): tree}
    if not isinstance(tree, dict):
        return {}
    return {name: value for key, inner in tree.items() for name, value in _numbers(inner, (*path, str(key))).items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _fact(content: dict[str, Any], name: str) -> Any:
    for key in name.split("."):
        content = content.get(key) if isinstance(content, dict) else None  # type: ignore[assignment]
    return content


def _read(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a result file ({error})") from error
    if not isinstance(content, dict) or not ("rows" in content or "parts" in content):
        raise UserError(f"{path}: not a result file. It has neither `rows` nor `parts`.")
    return content


if __name__ == "__main__":
    run_program("compare", main)
