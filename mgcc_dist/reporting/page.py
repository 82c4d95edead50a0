"""Render the report as one HTML file with all tables, curves and images embedded."""

import statistics
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import yaml

from mgcc_dist.reporting import curves
from mgcc_dist.reporting.image_arrays import METRICS
from mgcc_dist.reporting.runs import Run, RunCollection, RunGroup, group_runs
from mgcc_dist.reporting.templates import embed_png, format_time, render
from mgcc_dist.reporting.views import ReportSection
from mgcc_dist.train.stragglers import COUNT, slow_rank

# Heading, path in a run's summary, scale.
CORRECTED_METRICS: list[tuple[str, tuple[str, ...], float]] = [
    ("IoU", ("corrected", "iou"), 100),
    ("Recall", ("corrected", "recall"), 100),
    ("Precision", ("corrected", "precision"), 100),
    ("F1", ("corrected", "f1"), 100),
]
OTHER_METRICS: list[tuple[str, tuple[str, ...], float]] = [
    ("Lesion IoU", ("lesion", "iou"), 100),
    ("Specificity", ("specificity",), 100),
    ("HD95 px", ("hd95",), 1),
    ("ASD px", ("asd",), 1),
    ("HD95 penalized", ("hd95_penalized",), 1),
    ("ASD penalized", ("asd_penalized",), 1),
]
HEADLINE_METRICS = CORRECTED_METRICS + OTHER_METRICS[:-1]
PROTOCOLS = ("corrected", "lesion", "paper")
MOST_CARDS = 30
"""runs that the page shows one by one, with curves and gallery: these take most of its time and size"""
SLOW_ROWS = 0.1
"""share of the logged rows in which a rank must be slow to be named"""


def render_page(
    found: RunCollection, sections: Sequence[ReportSection] = (), supplement: Sequence[ReportSection] = ()
) -> str:
    """Return the page as HTML that needs no other file and no network.

    `sections` come first, then the segmentation runs' scores, the `supplement`, and the single runs.
    """
    groups = group_runs(found.segmentation)
    return render(
        "page.html",
        sections=sections,
        supplement=supplement,
        created=format_time(datetime.now(UTC)),
        other_headings=[heading for heading, _, _ in OTHER_METRICS[1:]],
        headings=[heading for heading, _, _ in HEADLINE_METRICS],
        headline=[
            (group, [group.score("best", *path, scale=scale) for _, path, scale in HEADLINE_METRICS])
            for group in groups
        ],
        synthetic=any("*" in group.count("labeled") + group.count("unlabeled") for group in groups),
        overview=curves.plot_groups(groups) if groups else None,
        all_protocols=[(group, _protocol_rows(group)) for group in groups],
        counts=[len(runs) for runs in (found.segmentation, found.generative, found.unfinished)],
        segmentation=[
            (run, curves.plot_run(run), _gallery(run), _run_facts(run)) for run in found.segmentation[:MOST_CARDS]
        ],
        generative=[(run, curves.plot_run(run), _run_facts(run)) for run in found.generative[:MOST_CARDS]],
        unfinished=[
            (run, curves.plot_run(run) if run.metrics else None, _run_facts(run))
            for run in found.unfinished[:MOST_CARDS]
        ],
        damaged=found.damaged,
        galleries=[embed_png(path) for path in found.galleries],
        provenance=_provenance_rows(found.segmentation + found.generative),
    )


def _protocol_rows(group: RunGroup) -> list[tuple[str, list[tuple[str, list[str]]], list[str]]]:
    """Return for best and last step: (step, [(protocol, its scores)], metrics that are the same in all protocols).

    The last step is left out where it was not scored, on the test part of a split.
    """
    return [
        (
            weights,
            [(protocol, [group.score(weights, protocol, name) for name in METRICS]) for protocol in PROTOCOLS],
            [group.score(weights, *path, scale=scale) for _, path, scale in OTHER_METRICS[1:]],
        )
        for weights in ("best", "last")
        if any(run.scored(weights) for run in group.runs)
    ]


def _run_facts(run: Run) -> dict[str, Any]:
    """Return what the run's card shows; None for values that the run does not have."""
    result, parameters = run.result, run.result.get("parameters")
    last = run.metrics[-1] if run.metrics else {}
    result_file = run.folder / "result.json"
    finished = datetime.fromtimestamp(result_file.stat().st_mtime, UTC) if result_file.is_file() else None
    return {
        "parameters": parameters.get("inference") if isinstance(parameters, dict) else parameters,
        "training_parameters": parameters.get("training") if isinstance(parameters, dict) else None,
        "step": last.get("step"),
        "epoch": last.get("epoch"),
        "best_step": (result.get("best") or {}).get("step"),
        "seconds": (result.get("seconds") or {}).get("training"),
        "speed": _speed(run),
        "finished": format_time(finished) if finished else None,
        "config": yaml.safe_dump(run.config, sort_keys=False) if run.config else None,
    }


def _speed(run: Run) -> str:
    """Return the median speed of a run, and the ranks that the others often waited for; "" if it was not logged."""
    images = [value for _, value in run.series("train", "images_per_second")]
    utilisation = [value for _, value in run.series("train", "mfu")]
    found = [row["stragglers"] for row in run.metrics if isinstance(row.get("stragglers"), dict)]
    slow = Counter(_name_of(rank) for row in found if (rank := slow_rank(row)))
    texts = [f"{statistics.median(images):.3g} images per second"] if images else []
    texts += [f"model FLOP utilisation {statistics.median(utilisation):.1%}"] if utilisation else []
    texts += [
        f"{name} was slow in {rows} of {len(found)} rows"
        for name, rows in slow.most_common(COUNT)
        if rows > SLOW_ROWS * len(found)
    ]
    return "; ".join(texts)


def _name_of(rank: dict[str, Any]) -> str:
    return f"rank {rank['rank']}" + f" ({rank['host']})" * bool(rank.get("host"))


def _gallery(run: Run) -> str | None:
    path = run.folder / "best" / "gallery.png"
    return embed_png(path) if path.is_file() else None


def _provenance_rows(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return commit, device, precision and versions of all runs; runs with the same values share a row."""
    rows: list[dict[str, Any]] = []
    for run in runs:
        environment = run.result.get("environment") or run.result  # results of early versions have them at the top
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
