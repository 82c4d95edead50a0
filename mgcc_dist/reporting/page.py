"""The report's page: a Jinja template filled with tables, curves and pictures, all inside the one file."""

import base64
import io
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from mgcc_dist.reporting.runs import Found, Group, Run, group

# Heading, place in a run's summary, factor. The first table of a report, and what is printed.
HEADLINE: list[tuple[str, tuple[str, ...], float]] = [
    ("IoU", ("corrected", "iou"), 100),
    ("Recall", ("corrected", "recall"), 100),
    ("Precision", ("corrected", "precision"), 100),
    ("F1", ("corrected", "f1"), 100),
    ("Lesion IoU", ("lesion", "iou"), 100),
    ("Specificity", ("specificity",), 100),
    ("HD95 px", ("hd95",), 1),
    ("ASD px", ("asd",), 1),
]
PROTOCOLS = ("corrected", "lesion", "paper")
SCORES = ("iou", "recall", "precision", "f1")


def render(found: Found) -> str:
    """The page as HTML that needs no other file and no network."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    groups = group(found.segmentation)
    return templates.get_template("page.html").render(
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headings=[heading for heading, _, _ in HEADLINE],
        headline=[(each, headline(each)) for each in groups],
        protocols=PROTOCOLS,
        scores=SCORES,
        every=[(each, weights, _every_protocol(each, weights)) for each in groups for weights in ("best", "last")],
        segmentation=[(run, _curves(run, ("loss",), "iou"), _gallery(run)) for run in found.segmentation],
        generative=[(run, _curves(run, ("loss", "mse"), run_metric(run))) for run in found.generative],
        galleries=[_picture(path) for path in found.galleries],
        unfinished=found.unfinished,
        provenance=_provenance(found.segmentation + found.generative),
    )


def headline(each: Group) -> list[str]:
    """The group's cells under HEADLINE, at the best step."""
    return [each.score("best", *path, scale=scale) for _, path, scale in HEADLINE]


def run_metric(run: Run) -> str:
    """What a generative stage is validated by."""
    return "mse" if run.result["stage"] == "autoencoder" else "loss"


def _every_protocol(each: Group, weights: str) -> list[str]:
    return [each.score(weights, protocol, name) for protocol in PROTOCOLS for name in SCORES]


def _curves(run: Run, losses: tuple[str, ...], metric: str) -> str:
    """Training losses and a validation metric over the steps, as a data URI."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    train = [row for row in run.rows if row["split"] == "train"]
    validation = [row for row in run.rows if row["split"] == "validation"]
    for name in losses:
        points = [(row["step"], row[name]) for row in train if name in row]
        if points:
            left.plot(*zip(*points, strict=True), label=f"training {name}", linewidth=1.2)
    right.plot(
        [row["step"] for row in validation], [row[metric] for row in validation], marker="o", markersize=2.5, color="C2"
    )
    left.legend(fontsize=7, frameon=False)
    right.set_title(f"validation {metric}", fontsize=8)
    for axes in (left, right):
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    content = io.BytesIO()
    figure.savefig(content, format="svg")
    return _data_uri(content.getvalue(), "image/svg+xml")


def _gallery(run: Run) -> str | None:
    path = run.folder / "best" / "gallery.png"
    return _picture(path) if path.is_file() else None


def _picture(path: Path) -> str:
    return _data_uri(path.read_bytes(), "image/png")


def _data_uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _provenance(runs: list[Run]) -> list[dict[str, Any]]:
    """Machine, versions and commit of each run; runs that share them share a row."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        facts = {key: run.result.get(key) for key in ("commit", "device", "precision", "world_size", "versions")}
        for row in rows:
            if row["facts"] == facts:
                row["runs"].append(run.folder.name)
                break
        else:
            rows.append({"facts": facts, "runs": [run.folder.name]})
    return rows
