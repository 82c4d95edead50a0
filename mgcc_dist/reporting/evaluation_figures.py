"""Figures of an evaluation's page: Dice by lesion size, reliability diagram, risk-coverage curve, robustness."""

from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from mgcc_dist.evaluation.summary import Row
from mgcc_dist.reporting.curves import COLOURS, INK, STYLE, data_uri, line_styles

Chart = tuple[str, str]
"""data URI and alternative text"""


def plot_scores(rows: Sequence[Row]) -> Chart:
    """Plot the distribution of Dice over the lesions, and Dice against lesion size."""
    lesions = [row for row in rows if row["lesion"]]
    dice = [100 * row["dice"] for row in lesions]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.7), layout="constrained")
        left, right = figure.subplots(1, 2)
        left.hist(dice, bins=np.arange(0, 101, 5), color=COLOURS[0])
        left.set(title="Dice of each lesion", xlabel="Dice, %", ylabel="images")
        for name, colour in zip(sorted({row["class"] for row in lesions}), COLOURS, strict=False):
            chosen = [row for row in lesions if row["class"] == name]
            areas = [100 * row["lesion_area"] for row in chosen]
            right.scatter(areas, [100 * row["dice"] for row in chosen], s=9, alpha=0.7, color=colour, label=name)
        right.set(title="Dice against lesion size", xlabel="lesion, % of the image", ylabel="Dice, %", xscale="log")
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        text = f"Dice of {len(dice)} lesions: median {np.median(dice):.0f} %, {sum(d < 50 for d in dice)} below 50 %."
        return data_uri(figure), text


def plot_trust(summary: dict[str, Any]) -> Chart:
    """Plot the reliability diagram and the risk-coverage curve."""
    bins, curve = summary["reliability"]["bins"], summary["risk_coverage"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.9), layout="constrained")
        left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.4))
        left.plot([0, 1], [0, 1], color=INK, linestyle=":", linewidth=1)
        left.plot([b["probability"] for b in bins], [b["lesion"] for b in bins], marker="o", color=COLOURS[0])
        left.set(title=f"Reliability, ECE {100 * summary['reliability']['ece']:.2f} %", ylabel="share that is lesion")
        left.set(xlabel="predicted probability of a pixel", xlim=(0, 1), ylim=(0, 1))
        middle.bar(
            [b["from"] for b in bins],
            [b["pixels"] for b in bins],
            [b["to"] - b["from"] for b in bins],
            align="edge",
            color=COLOURS[0],
        )
        middle.set(
            title="Pixels by probability", xlabel="predicted probability", ylabel="share of pixels", yscale="log"
        )
        risk = np.array(curve["risk"])
        right.plot(100 * np.arange(1, len(risk) + 1) / len(risk), 100 * risk, color=COLOURS[1])
        if by_score := summary.get("risk_coverage_by_score"):
            right.plot(
                100 * np.arange(1, len(risk) + 1) / len(risk), 100 * np.array(by_score["risk"]), color=COLOURS[0]
            )
            right.legend(["by confidence", "by score"])
        right.axhline(100 * curve["aurc_random"], color=INK, linestyle=":", linewidth=1)
        right.set(title=f"Risk-coverage, AURC {100 * curve['aurc']:.1f}", xlabel="most confident images kept, %")
        right.set(ylabel="mean of 100 - Dice", ylim=(0, None))
        text = (
            f"ECE {summary['reliability']['ece']:.4f}; AURC {curve['aurc']:.4f}, all images {curve['aurc_random']:.4f}."
        )
        return data_uri(figure), text


def plot_robustness(summary: dict[str, Any]) -> Chart:
    """Plot lesion Dice against the strength of each corruption; strength 0 is the clean images."""
    clean = summary["overall"]["lesion"]["dice"]
    values: dict[str, list[float]] = {}
    for each in summary["corruptions"]:
        start = [100 * clean["mean"]] if clean else []
        values.setdefault(each["name"], start)
        if each["lesion"]["dice"]:
            values[each["name"]].append(100 * each["lesion"]["dice"]["mean"])
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.7), layout="constrained")
        panel = figure.subplots()
        for (name, means), style in zip(values.items(), line_styles(), strict=False):
            (line,) = panel.plot(range(len(means)), means, marker="o", markersize=3, label=name)
            line.set(**style)
        panel.set(xlabel="strength", ylabel="lesion Dice, %", xticks=range(6))
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        text = "; ".join(f"{name}: {means[0]:.1f} to {means[-1]:.1f} %" for name, means in values.items() if means)
        return data_uri(figure), f"Lesion Dice against the strength of corruptions. {text}."
