"""Critical-difference diagrams: mean ranks of methods over the blocks that all of them share."""

import statistics
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mgcc_dist.evaluation.ranks import MIN_BLOCKS, MIN_METHODS, Ranking, rank
from mgcc_dist.evaluation.statistics import LEVEL
from mgcc_dist.reporting.curves import COLOURS, INK, STYLE, data_uri
from mgcc_dist.reporting.labels import Row
from mgcc_dist.reporting.runs import lookup
from mgcc_dist.reporting.views import Cell, Picture, ReportSection, TableView

METRICS = {("corrected", "iou"): "IoU", ("lesion", "f1"): "lesion Dice"}
Scores = dict[str, dict[str, float]]
"""label -> block -> mean score over its images (and runs), in percent"""


def section(rows: Sequence[Row]) -> ReportSection | None:
    """Rank the methods of each data set and kind of split; None if no three of them share five splits."""
    families: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        families.setdefault((row.group.dataset, row.group.split_kind), []).append(row)
    pictures, tables = [], []
    for (dataset, _), members in families.items():
        for path, heading in METRICS.items():
            scores = {row.label: found for row in members if len(found := _scores(row, path)) >= MIN_BLOCKS}
            blocks = [
                block for block in next(iter(scores.values()), ()) if all(block in each for each in scores.values())
            ]
            ranking = rank(np.array([[each[block] for each in scores.values()] for block in blocks], ndmin=2))
            if ranking is None:
                continue
            caption = f"{heading}: {dataset}, {len(blocks)} blocks: {', '.join(blocks)}"
            pictures.append(_diagram(list(scores), ranking, caption))
            names = {row.label: row.names for row in members if row.label in scores}
            tables.append(_table(scores, blocks, ranking, caption, names))
    if not pictures:
        return None
    legend = [
        f"A block is one split; the score of a method on it is the mean over the scored images. Rank 1 is the best. "
        f"Methods under a common bar do not differ by Nemenyi's test ({100 * (1 - LEVEL):.0f} %). Read the diagram "
        f"only where Friedman's p is below {1 - LEVEL:.2f}. At least {MIN_METHODS} methods must share {MIN_BLOCKS} "
        "blocks. Splits of one data set share training images: blocks are not independent, and both tests are "
        "optimistic.",
    ]
    return ReportSection("Mean ranks and critical difference", [], tables, legend, pictures=pictures)


def _scores(row: Row, path: tuple[str, ...]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in row.group.distinct:
        value = lookup(run.scored("best").get("summary", {}), path)
        if value is not None:
            values.setdefault(run.result["split"], []).append(100 * value)
    return {split: statistics.mean(each) for split, each in sorted(values.items())}


def _table(scores: Scores, blocks: list[str], ranking: Ranking, caption: str, names: dict[str, str]) -> TableView:
    cells = [
        (label, [Cell(f"{mean_rank:.2f}"), *(Cell(f"{scores[label][block]:.1f}") for block in blocks)])
        for mean_rank, label in sorted(zip(ranking.mean_ranks, scores, strict=True))
    ]
    caption += f". Friedman p = {ranking.p:.3g}, critical difference {ranking.critical_difference:.2f}"
    return TableView(caption, [("", ["mean rank"]), ("by block", blocks)], cells, names)


def _diagram(labels: list[str], ranking: Ranking, caption: str) -> Picture:
    count = len(labels)
    order = sorted(range(count), key=lambda method: ranking.mean_ranks[method])
    left, right = order[: (count + 1) // 2], order[(count + 1) // 2 :][::-1]
    bars = ranking.alike()
    floor = 0.35 + 0.22 * len(bars)
    depth = floor + 0.32 * len(left)
    with matplotlib.rc_context(STYLE | {"axes.grid": False}):
        figure = Figure(figsize=(11, 0.75 + 0.85 * depth), layout="constrained")
        panel = figure.subplots()
        panel.axis("off")
        panel.set(xlim=(0.3, count + 0.7), ylim=(-depth - 0.1, 0.95))
        panel.plot([1, count], [0, 0], color=INK, linewidth=1)
        for number in range(1, count + 1):
            panel.plot([number, number], [0, 0.1], color=INK, linewidth=1)
            panel.text(number, 0.16, str(number), ha="center", va="bottom")
        for side, members, edge, align in ((-1, left, 0.75, "right"), (1, right, count + 0.25, "left")):
            for level, method in enumerate(members):
                mean_rank, y = ranking.mean_ranks[method], -floor - 0.32 * level
                colour = COLOURS[order.index(method) % len(COLOURS)]
                panel.plot([mean_rank, mean_rank, edge], [0, y, y], color=colour, linewidth=1.2)
                text = f"{labels[method]}  {mean_rank:.2f}"
                panel.text(edge + 0.04 * side, y, text, ha=align, va="center", fontsize=9)
        for level, members in enumerate(bars):
            ends = [ranking.mean_ranks[members[0]] - 0.03, ranking.mean_ranks[members[-1]] + 0.03]
            panel.plot(ends, [-0.2 - 0.22 * level] * 2, color=INK, linewidth=4, solid_capstyle="butt")
        panel.plot([1, 1 + ranking.critical_difference], [0.7, 0.7], color=INK, linewidth=2, marker="|")
        panel.text(1 + ranking.critical_difference / 2, 0.78, f"CD {ranking.critical_difference:.2f}", ha="center")
        source = data_uri(figure)
    ranks = ", ".join(f"{labels[method]} {ranking.mean_ranks[method]:.2f}" for method in order)
    return Picture(source, f"Mean ranks: {ranks}. Critical difference {ranking.critical_difference:.2f}.", caption)
