"""Put the files of several benchmarks into one, with a picture of their rates.

    python -m benchmarks.collect out/bench --out benchmarks/results        (benchmarks/run_all.sh calls it)

Writes {machine}-{date}.json, with each file NAME.json of the folder as part NAME, and a PNG beside it. A benchmark
that left no file but a NAME.log is listed under `not_run` with the log's last line.
"""

import argparse
import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.compare import metrics
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.files import read_json, replacing, write_json


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of NAME.json and NAME.log")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    content = collected(options.folder) | {"machine": benchmark_header("benchmarks.collect")}
    machine = content["machine"]
    content |= {key: machine[key] for key in ("device", "processor", "cores", "commit", "date", "versions")}
    name = machine["device"] if "cpu" not in machine["device"] else f"cpu-{machine['processor']}"
    stem = f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}-{machine['date']}"
    write_json(options.out / f"{stem}.json", content)
    draw(content, options.out / f"{stem}.png")
    print(f"collect: {options.out / stem}.json and .png; not run: {', '.join(content['not_run']) or 'none'}")


def collected(folder: Path) -> dict[str, Any]:
    """{"parts": {name: content}, "not_run": {name: the log's last line}}

    Raises:
        UserError: there is no result in the folder.
    """
    parts = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    if not parts:
        raise UserError(f"{folder} holds no result of a benchmark")
    logs = [path for path in sorted(folder.glob("*.log")) if path.stem not in parts]
    return {"parts": parts, "not_run": {path.stem: (path.read_text().splitlines() or [""])[-1] for path in logs}}


def draw(content: dict[str, Any], path: Path) -> None:
    """Bars of every rate, one panel a benchmark."""
    rates = {name: value for name, value in metrics(content).items() if name.endswith("per_second")}
    parts = sorted({name.partition(" / ")[0] for name in rates})
    if not parts:
        return
    chosen = {part: [name for name in rates if name.partition(" / ")[0] == part] for part in parts}
    heights = [1 + 0.25 * len(names) for names in chosen.values()]
    figure = Figure(figsize=(9, sum(heights)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, (part, names) in zip(panels, chosen.items(), strict=True):
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
