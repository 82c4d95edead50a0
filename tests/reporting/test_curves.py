"""Training curves: every group of runs can be told apart."""

import base64
import json
import re

from mgcc_dist.reporting.curves import plot_groups
from mgcc_dist.reporting.runs import Run, RunGroup


def group(folder, index):
    result = {"program": "segment", "method": f"method {index}", "split": "split_1", "seed": 1}
    metrics = [{"step": k, "epoch": k, "split": "validation", "iou": 0.05 * index} for k in range(3)]
    run = folder / f"run {index}"
    run.mkdir()
    (run / "metrics.jsonl").write_text("\n".join(map(json.dumps, metrics)))
    return RunGroup([Run(run, run.name, {}, result)])


def test_twelve_groups_have_distinct_colours_or_line_styles(tmp_path):
    uri, _ = plot_groups([group(tmp_path, index) for index in range(12)])
    svg = base64.b64decode(uri.partition("base64,")[2]).decode()
    curves = re.findall(r'<g id="line2d_\d+">\s*<path d="[^"]+" clip-path="[^"]+" style="([^"]+)"', svg)
    coloured = [style for style in curves if "stroke-width: 1.4" in style]
    assert len(coloured) == len(set(coloured)) == 12
