"""Merge the results of one run of benchmarks.suite into one file, and plot its rates.

    python -m benchmarks.collect out/suite --out benchmarks/results

Writes {device}-{date}.json, which holds the result of each stage as a part and lists stages without a result under
`not_run`, and a PNG next to it.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.compare import metrics
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.files import read_json, replacing, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="--out of benchmarks.suite")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="(default: benchmarks/results)")
    options = parser.parse_args()
    content = collected(options.folder)
    name = content["device"] if "cpu" not in content["device"] else f"cpu-{content['processor']}"
    stem = f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{content['date']}"
    write_json(options.out / f"{stem}.json", content)
    plot(content, options.out / f"{stem}.png")
    print(f"collect: {options.out / stem}.json and .png; not run: {', '.join(content['not_run']) or 'none'}")


def collected(folder: Path) -> dict[str, Any]:
    """Return the suite's header, `parts` (stage -> result) and `not_run` (stage -> reason).

    Raises:
        UserError: the folder has no summary, or no stage in it has a result.
    """
    if not (folder / "summary.json").is_file():
        raise UserError(f"{folder}: no summary.json. Give the --out folder of benchmarks.suite.")
    summary = read_json(folder / "summary.json")
    stages = summary.pop("stages")
    parts = {name: read_json(folder / row["result"]) for name, row in stages.items() if "result" in row}
    if not parts:
        raise UserError(f"{folder}: no stage has a result")
    not_run = {name: row.get("reason", row["status"]) for name, row in stages.items() if name not in parts}
    return {**summary, "parts": parts, "not_run": not_run}


def plot(content: dict[str, Any], path: Path) -> None:
    """Draw every rate as a bar, one panel per benchmark."""
    rates = {name: value for name, value in metrics(content).items() if name.endswith("per_second")}
    parts = sorted({name.partition(" / ")[0] for name in rates})
    if not parts:
        return
    names_of = {part: [name for name in rates if name.partition(" / ")[0] == part] for part in parts}
    heights = [1 + 0.25 * len(names) for names in names_of.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (part, names) in zip(panels, names_of.items(), strict=True):
        panel.barh([name.partition(" / ")[2] for name in names], [rates[name] for name in names], color="#3569a8")
        panel.bar_label(panel.containers[0], fmt="%.4g", padding=2, fontsize=7)
        panel.margins(x=0.1)
        panel.invert_yaxis()
        panel.tick_params(labelsize=7)
        panel.set_title(part, fontsize=9, loc="left")
    figure.suptitle(f"{content['device']}, {content['cores']} cores, commit {content['commit']}", fontsize=9)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=110)


if __name__ == "__main__":
    run_program("collect", main)
