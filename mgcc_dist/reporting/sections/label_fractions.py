"""Learning curves: scores against the number of labeled images, for runs that differ in nothing else."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import matplotlib
from matplotlib.figure import Figure

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data.splits import locate_split, read_split
from mgcc_dist.reporting.curves import STYLE, data_uri, line_styles
from mgcc_dist.reporting.image_scores import HEADINGS, INTERVALS, MAIN, Means, group_note, means, own_rows
from mgcc_dist.reporting.labels import Row, sources
from mgcc_dist.reporting.runs import format_names
from mgcc_dist.reporting.views import Cell, Picture, ReportSection, TableView, mean_cell

LABELS = "data.labels"


@dataclass(frozen=True)
class Curve:
    """Rows that differ only in which training images have labels, and that are scored on the same images."""

    label: str
    rows: dict[int, Row]
    """by number of labeled images"""
    images: str
    """identifies the data set and the scored images"""


def curves(rows: Sequence[Row]) -> list[Curve]:
    """Return the curves of at least two points."""
    families: dict[str, list[Row]] = {}
    for row in rows:
        run = row.group.runs[0]
        of_row = (images for each in row.group.distinct if (images := each.scored("best").get("images")))
        scored = sorted({key for images in of_row for key in images.keys})
        if scored and isinstance(run.result.get("images", {}).get("labeled"), int):
            settings = {key: value for key, value in run.settings.items() if key != LABELS}
            same = [
                row.group.dataset,
                scored,
                run.result["method"],
                run.result["network"],
                settings,
                sources(row.group),
            ]
            families.setdefault(json.dumps(same, sort_keys=True, default=str), []).append(row)
    found: list[Curve] = []
    for family in families.values():
        by_count = {row.group.runs[0].result["images"]["labeled"]: row for row in family}
        if len(by_count) > 1 and len(by_count) == len(family):
            images = json.dumps(
                [family[0].group.dataset, *sorted(image["key"] for image in own_rows(family[0].group.runs[0]))]
            )
            label = _common(family)
            if any(label == curve.label for curve in found):  # curves that have no number of labels in common
                label += f", {family[0].names}"
            found.append(Curve(label, dict(sorted(by_count.items())), images))
    return found


def section(rows: Sequence[Row]) -> ReportSection | None:
    """Plot and tabulate all curves, one figure per set of test images; None if there are none."""
    sets: dict[str, list[Curve]] = {}
    for curve in curves(rows):
        sets.setdefault(curve.images, []).append(curve)
    if not sets:
        return None
    shown: dict[bool, list[TableView]] = {True: [], False: []}
    pictures, notes = [], []
    for members in sets.values():
        group = next(iter(members[0].rows.values())).group
        caption = f"{group.dataset}, {len(own_rows(group.runs[0]))} images"
        points = {curve.label: {count: means(_images(row)) for count, row in curve.rows.items()} for curve in members}
        fractions = {count: _fraction(row) for curve in members for count, row in curve.rows.items()}
        pictures.append(_plot(points, fractions, caption))
        for heading, table in _tables(members, points, fractions, caption).items():
            shown[heading in MAIN].append(table)
        notes += [note for curve in members for row in curve.rows.values() for note in group_note(_images(row))]
    legend = [
        "Rows that differ only in the number of labeled training images and are scored on the same images. Corrected "
        "protocol, best step, in percent; fractions are those of the training images of the split.",
        INTERVALS,
        *dict.fromkeys(notes),
    ]
    return ReportSection("Learning curves over labels", [], shown[True], legend, shown[False], pictures=pictures)


def _images(row: Row) -> list[dict[str, object]]:
    return [image for run in row.group.distinct for image in own_rows(run)]


def _common(rows: Sequence[Row]) -> str:
    """Return the parts of the labels that all rows share."""
    parts = [row.label.split(", ") for row in rows]
    return ", ".join(part for part in parts[0] if all(part in other for other in parts))


def _fraction(row: Row) -> str:
    """Return the share of the training images that have labels, such as "1/8"; "" if the split can't be read."""
    run = row.group.runs[0]
    data = run.config.get("data", {})
    if data.get("labels") == "all":
        return "all"
    try:
        path = locate_split(str(data.get("split")))
        if sha256_of(path) not in run.result.get("inputs", {}).values():
            return ""
        split = read_split(path)
    except UserError:
        return ""
    share = Fraction(len(split.labeled), len(split.train))
    near = Fraction(1, max(1, round(1 / share)))
    return str(near) if abs(near - share) < share / 20 else f"{100 * float(share):.0f} %"


def _tick(count: int, fraction: str, between: str) -> str:
    return f"{fraction}{between}({count})" if fraction else str(count)


def _tables(
    members: Sequence[Curve], points: dict[str, dict[int, Means]], fractions: dict[int, str], caption: str
) -> dict[str, TableView]:
    """Return a table per metric, by its heading."""
    counts = sorted(fractions)
    names = {
        curve.label: format_names([run.name for row in curve.rows.values() for run in row.group.distinct])
        for curve in members
    }
    tables = {}
    for heading in HEADINGS.values():
        cells: list[tuple[str, list[Cell]]] = [
            (label, [mean_cell(scores[count][heading] if count in scores else None) for count in counts])
            for label, scores in points.items()
        ]
        if any(scores[heading] for by_count in points.values() for scores in by_count.values()):
            headings = [_tick(count, fractions[count], " ") for count in counts]
            tables[heading] = TableView(f"{heading}: {caption}", [("labeled images", headings)], cells, names)
    return tables


def _plot(points: dict[str, dict[int, Means]], fractions: dict[int, str], caption: str) -> Picture:
    ticks = sorted(fractions)
    texts = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.2), layout="constrained")
        panels = figure.subplots(1, len(MAIN))
        for panel, heading in zip(panels, MAIN, strict=True):
            for number, ((label, scores), style) in enumerate(zip(points.items(), line_styles(), strict=False)):
                known = [(count, mean) for count, each in scores.items() if (mean := each[heading])]
                if not known:
                    continue
                shift = 1 + 0.012 * (number - (len(points) - 1) / 2)  # so that intervals do not hide each other
                x, y = [count * shift for count, _ in known], [mean.mean for _, mean in known]
                bars = [
                    [mean.mean - (mean.mean if mean.low is None else mean.low) for _, mean in known],
                    [(mean.mean if mean.high is None else mean.high) - mean.mean for _, mean in known],
                ]
                panel.errorbar(x, y, bars, label=label, marker="o", markersize=4, elinewidth=0.9, capsize=2, **style)
                texts.append(f"{label}: {heading} from {y[0]:.1f} to {y[-1]:.1f} %")
            panel.set(title=f"{heading}, %", xlabel="labeled training images", xscale="log")
            panel.set_xticks(ticks, [_tick(count, fractions[count], "\n") for count in ticks])
            panel.minorticks_off()
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        source = data_uri(figure)
    return Picture(source, f"Scores against the number of labeled images. {'; '.join(texts)}.", caption)
