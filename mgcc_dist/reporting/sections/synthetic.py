"""Quality and audit of the synthetic images that runs were trained with."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgcc_dist.common.files import InvalidJson, read_object
from mgcc_dist.evaluation.sample_metrics import LOWER, METRICS
from mgcc_dist.reporting.runs import Run, RunCollection, format_names
from mgcc_dist.reporting.templates import embed_png
from mgcc_dist.reporting.views import NO_VALUE, Cell, Picture, ReportSection, TableView

REQUIRED = {
    "quality": ("features", "images", "synthetic_halves", "real_halves"),
    "audit": ("threshold", "near_copies", "synthetic"),
}
"""keys of quality.json and audit.json that the tables show"""
KEYS = ("synthetic", "synthetic_labeled")
"""of a run's data and result: unlabeled samples, and samples with masks"""


@dataclass(frozen=True)
class SampleSet:
    """Samples of a generative run, and the runs that were trained with them."""

    name: str
    folder: Path
    """holds quality/ and audit/"""
    quality: dict[str, Any] | None
    audit: dict[str, Any] | None
    filter: dict[str, Any] | None
    users: list[Run]


def section(found: RunCollection, folders: Sequence[Path]) -> ReportSection | None:
    """Tabulate the quality and audit of all samples below `folders` or named by a run; None if there are none."""
    sets = find_sample_sets(found, folders)
    unknown = [run.name for run in found.segmentation if _requests(run) and not any(run in each.users for each in sets)]
    if not sets and not unknown:
        return None
    notes = [f"No quality.json or audit.json was found for the synthetic images of {format_names(unknown)}."] * bool(
        unknown
    )
    notes += [_filter_note(each.name, each.filter) for each in sets if each.filter]
    pictures = [
        Picture(
            embed_png(path),
            "Pairs of a synthetic image and its most similar training image",
            f"{each.name}: synthetic images next to the training images they are most similar to",
            photo=True,
        )
        for each in sets
        if (path := each.folder / "audit" / "closest.png").is_file()
    ]
    runs = {each.name: format_names([run.name for run in each.users]) or "none of this report" for each in sets}
    tables = []
    if measured := [each for each in sets if each.quality]:
        tables.append(_quality_table(measured, runs))
    if audited := [each for each in sets if each.audit]:
        tables.append(_audit_table(audited, runs))
    legend = [
        "Quality compares equally many samples and real validation images in the features of the named network (the "
        "spectral distance: in their power spectra); mean over random halves, with 95 % intervals. The floor compares "
        "real images with real images: the best that a generator can reach. Arrows point to better values. Only "
        "values with the same features and number of images are comparable.",
        "A near-copy is more similar to one training image than real images of different patients are to each other. "
        "The audit lists candidates for a person to look at.",
    ]
    return ReportSection("Synthetic images: quality and audit", notes, tables, legend, pictures=pictures)


def find_sample_sets(collection: RunCollection, folders: Sequence[Path]) -> list[SampleSet]:
    """Find quality.json and audit.json below `folders` and next to the samples of `runs`.

    Runs belong to a set if the request of their synthetic images is that of the set; its count may differ, because
    samples can be selected and extended. Damaged files are left out of `collection`.
    """
    runs = collection.segmentation
    named = [Path(path).parent for run in runs for key in KEYS if (path := run.config.get("data", {}).get(key))]
    found = [
        (str(path.parent.parent.relative_to(folder.parent)), path.parent.parent)
        for folder in folders
        for kind in REQUIRED
        for path in sorted(folder.rglob(f"{kind}/{kind}.json"))
    ]
    places: dict[Path, tuple[str, Path]] = {}
    for name, folder in (*found, *((str(folder), folder) for folder in named)):
        if any((folder / kind / f"{kind}.json").is_file() for kind in REQUIRED):
            places.setdefault(folder.resolve(), (name, folder))
    sets = []
    for name, folder in places.values():
        quality, audit = (_read(folder / kind / f"{kind}.json", keys, collection) for kind, keys in REQUIRED.items())
        if not (quality or audit):
            continue
        request = _identify(((quality or audit or {})["request"]).get("samples"))
        users = [run for run in runs if request in _requests(run)]
        filtered = _read(folder / "filter" / "filter.json", ("pairs", "dropped", "classes"), collection)
        sets.append(SampleSet(name, folder, quality, audit, filtered, users))
    return sets


def _read(path: Path, keys: Sequence[str], collection: RunCollection) -> dict[str, Any] | None:
    """Return the content of a file; None if there is none, or it is damaged or of an early version without the keys."""
    try:
        content = read_object(path) if path.is_file() else {}
    except InvalidJson as error:
        collection.leave_out(error)
        return None
    complete = isinstance(content.get("request"), dict) and all(key in content for key in keys)
    return content if complete else None


def _filter_note(name: str, report: dict[str, Any]) -> str:
    dropped, pairs = report["dropped"], report["pairs"]
    classes = ", ".join(f"{key} {each['dropped']} of {each['pairs']}" for key, each in report["classes"].items())
    return (
        f"{name}: a segmentation run on real images disagreed with the mask of {dropped} of {pairs} pairs, which were "
        f"dropped ({classes})."
    )


def _requests(run: Run) -> list[str]:
    """Identify the samples that a run was trained with."""
    return [_identify(info["request"]) for key in KEYS if (info := run.result.get(key))]


def _identify(request: dict[str, Any] | None) -> str:
    return json.dumps({key: value for key, value in (request or {}).items() if key != "count"}, sort_keys=True)


def _quality_table(sets: Sequence[SampleSet], runs: dict[str, str]) -> TableView:
    rows: list[tuple[str, list[Cell]]] = []
    reports = [each.quality for each in sets if each.quality]
    for name in METRICS:
        cells = []
        for report in reports:
            for column in ("synthetic_halves", "real_halves"):
                metric = report[column].get(name)  # a report of an earlier version has no spectral distance
                note = f"{metric['low']:.2g} to {metric['high']:.2g}" if metric else ""
                cells.append(Cell(f"{metric['value']:.3g}" if metric else NO_VALUE, note=note))
        rows.append((f"{LOWER[name]} ↓" if name in LOWER else f"{name} ↑", cells))
    images = [Cell(str(report["images"]["half"])) for report in reports for _ in range(2)]
    features = [cell for report in reports for cell in (Cell(report["features"]["kind"]), Cell(""))]
    used = [cell for each in sets for cell in (Cell(runs[each.name]), Cell(""))]
    rows += [("images", images), ("features", features), ("runs", used)]
    return TableView("Quality", [(each.name, ["samples", "floor"]) for each in sets], rows)


def _audit_table(sets: Sequence[SampleSet], runs: dict[str, str]) -> TableView:
    rows = []
    for each in sets:
        assert each.audit
        synthetic, features = each.audit["synthetic"], each.audit.get("features")
        copies = len(each.audit["near_copies"])
        rows.append(
            (
                each.name,
                [
                    Cell(str(synthetic["images"])),
                    Cell(str(copies), note=f"{100 * copies / synthetic['images']:.1f} %"),
                    Cell(f"{each.audit['threshold']:.2f}"),
                    Cell(f"{synthetic['median']:.2f}"),
                    Cell(f"{synthetic['highest']:.2f}"),
                    Cell(f"{features['threshold']:.2f}" if features else NO_VALUE),
                ],
            )
        )
    groups = [
        ("", ["samples", "near-copies"]),
        ("similarity in pixels", ["threshold", "median", "highest"]),
        ("in features", ["threshold"]),
    ]
    return TableView("Memorization audit", groups, rows, runs)
