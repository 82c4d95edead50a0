"""A picture of a benchmark's figures: ratios to PyTorch, and shares of the roofline."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mgcc_dist.common.files import replacing

PLAIN_COLOUR, COMPILE_COLOUR, FORM_COLOURS = (
    "#9aa3ad",
    "#e0a03a",
    ("#3569a8", "#4aa3a2", "#7a5ea8", "#2f8f5b", "#b3477d"),
)


def draw(content: dict[str, Any], path: Path) -> None:
    """Two panels of bars, a group for each workload and direction; of a candidate's layouts the faster is shown."""
    groups = _groups(content["rows"])
    names = list(dict.fromkeys(name for _, bars in groups for name in bars))
    colours = dict(zip(names, _colours(names), strict=True))
    figure = Figure(figsize=(14, 1.5 + 0.16 * sum(len(bars) + 1 for _, bars in groups)), layout="constrained")
    for panel, key, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("ratio", "share"),
        ("times as fast as the plain module in its faster layout", "share of the measured roofline"),
        strict=True,
    ):
        place, ticks = 0.0, []
        for _, bars in groups:
            ticks.append(place + (len(bars) - 1) / 2)
            for name, found in bars.items():
                bar = panel.barh(place, found[key], color=colours[name], height=0.9)
                panel.bar_label(bar, fmt="%.2f", padding=2, fontsize=6)
                place += 1
            place += 1
        panel.axvline(1, color="black", linewidth=0.6)
        panel.set_yticks(ticks, [name for name, _ in groups], fontsize=7)
        panel.set_title(title, fontsize=9, loc="left")
        panel.tick_params(axis="x", labelsize=7)
    panel.set_ylim(place - 1, -1)  # the first on top
    handles = [panel.barh(0, 0, color=colours[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    load = f", load {content['load']}" if "cpu" in content["device"] else ""
    where = f"{content['device']} ({content['processor']}{load}), torch {content['versions']['torch']}"
    figure.suptitle(f"{where}, commit {content['commit']}", fontsize=9)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=130)


def _groups(rows: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """[(workload and direction, {form: ratio and share by the first clock, of its faster layout})]"""
    groups = []
    for workload, row in rows.items():
        for direction in row["floor_ms"]:
            bars: dict[str, dict[str, float]] = {}
            for candidate, by_clock in row[direction].items():
                found: dict[str, float] = next(iter(by_clock.values()), {})
                form, ratio = candidate.rpartition(" ")[0], found.get("ratio_to_best_plain", 0.0)
                if ratio > bars.get(form, {"ratio": 0.0})["ratio"]:
                    bars[form] = {"ratio": ratio, "share": found["roofline_share"]}
            if bars:
                groups.append((f"{workload}, {direction}", bars))
    return groups


def _colours(names: list[str]) -> list[str]:
    forms = [name for name in names if not name.startswith(("plain", "compile"))]
    return [
        PLAIN_COLOUR
        if name.startswith("plain")
        else COMPILE_COLOUR
        if name.startswith("compile")
        else FORM_COLOURS[forms.index(name) % len(FORM_COLOURS)]
        for name in names
    ]
