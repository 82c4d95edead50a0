"""The report's page: a Jinja template filled with tables, curves and pictures, all inside the one file."""

import base64
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mgcc_dist.reporting import curves
from mgcc_dist.reporting.grids import Section
from mgcc_dist.reporting.runs import Found, Group, Run, group

# Heading, place in a run's summary, factor.
CORRECTED: list[tuple[str, tuple[str, ...], float]] = [
    ("IoU", ("corrected", "iou"), 100),
    ("Recall", ("corrected", "recall"), 100),
    ("Precision", ("corrected", "precision"), 100),
    ("F1", ("corrected", "f1"), 100),
]
BESIDE: list[tuple[str, tuple[str, ...], float]] = [
    ("Lesion IoU", ("lesion", "iou"), 100),
    ("Specificity", ("specificity",), 100),
    ("HD95 px", ("hd95",), 1),
    ("ASD px", ("asd",), 1),
]
HEADLINE = CORRECTED + BESIDE
PROTOCOLS = ("corrected", "lesion", "paper")
SCORES = ("iou", "recall", "precision", "f1")


def render(found: Found, sections: Sequence[Section] = ()) -> str:
    """The page as HTML that needs no other file and no network; `sections` come first."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    templates.filters |= {"duration": _duration, "thousands": _thousands}
    groups = group(found.segmentation)
    return templates.get_template("page.html").render(
        sections=sections,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        headings=[heading for heading, _, _ in HEADLINE],
        headline=[(each, [each.score("best", *path, scale=scale) for _, path, scale in HEADLINE]) for each in groups],
        synthetic=any("*" in each.count("unlabeled") for each in groups),
        overview=curves.of_groups(groups) if groups else None,
        every=[(each, _every_protocol(each)) for each in groups],
        segmentation=[(run, curves.of_run(run), _gallery(run), _facts(run)) for run in found.segmentation],
        generative=[(run, curves.of_run(run), _facts(run)) for run in found.generative],
        unfinished=[(run, curves.of_run(run) if run.rows else None, _facts(run)) for run in found.unfinished],
        galleries=[_picture(path) for path in found.galleries],
        provenance=_provenance(found.segmentation + found.generative),
    )


def _every_protocol(each: Group) -> list[tuple[str, list[tuple[str, list[str]]], list[str]]]:
    """For best and last step: (step's name, [(protocol, its cells)], cells of what no protocol changes)."""
    return [
        (
            weights,
            [(protocol, [each.score(weights, protocol, name) for name in SCORES]) for protocol in PROTOCOLS],
            [each.score(weights, *path, scale=scale) for _, path, scale in BESIDE[1:]],
        )
        for weights in ("best", "last")
    ]


def _facts(run: Run) -> dict[str, Any]:
    """What a run's card says; None for what the run does not tell."""
    result, parameters = run.result, run.result.get("parameters")
    last = run.rows[-1] if run.rows else {}
    finished = run.folder / "result.json"
    return {
        "parameters": parameters.get("inference") if isinstance(parameters, dict) else parameters,
        "training_parameters": parameters.get("training") if isinstance(parameters, dict) else None,
        "step": last.get("step"),
        "epoch": last.get("epoch"),
        "best_step": (result.get("best") or {}).get("step"),
        "seconds": (result.get("seconds") or {}).get("training"),
        "finished": datetime.fromtimestamp(finished.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M UTC")
        if finished.is_file()
        else None,
        "config": yaml.safe_dump(run.config, sort_keys=False) if run.config else None,
    }


def _gallery(run: Run) -> str | None:
    path = run.folder / "best" / "gallery.png"
    return _picture(path) if path.is_file() else None


def _picture(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _duration(seconds: float) -> str:
    """1234.5 -> 0:20:34"""
    return str(timedelta(seconds=round(seconds)))


def _thousands(number: int) -> str:
    return f"{number:,}"


def _provenance(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Machine, versions and commit of each run; runs that share them share a row."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        environment = run.result.get("environment") or run.result  # which had these facts itself before
        facts = {key: environment.get(key) for key in ("commit", "device")}
        facts |= {key: run.result.get(key) for key in ("precision", "world_size")}
        facts["versions"] = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
        for row in rows:
            if row["facts"] == facts:
                row["runs"].append(run.name)
                break
        else:
            rows.append({"facts": facts, "runs": [run.name]})
    return rows
