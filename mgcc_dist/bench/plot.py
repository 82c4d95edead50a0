"""Plot benchmark results: speedups over PyTorch, and shares of the roofline."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from mgcc_dist.common.files import replacing

PLAIN_COLOR, COMPILE_COLOR = "#9aa3ad", "#e0a03a"
FUSED_COLORS = ("#3569a8", "#4aa3a2", "#7a5ea8", "#2f8f5b", "#b3477d")


def draw(content: dict[str, Any], path: Path) -> None:
    """Draw two bar charts with a group per workload and direction, showing the faster layout of each implementation."""
    groups = _groups(content["rows"])
    names = list(dict.fromkeys(name for _, bars in groups for name in bars))
    colors = dict(zip(names, _colors(names), strict=True))
    figure = Figure(figsize=(14, 1.5 + 0.16 * sum(len(bars) + 1 for _, bars in groups)), layout="constrained")
    for axes, key, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("speedup", "share"),
        ("speedup over the plain module in its faster layout", "share of the measured roofline"),
        strict=True,
    ):
        y, ticks = 0.0, []
        for _, bars in groups:
            ticks.append(y + (len(bars) - 1) / 2)
            for name, values in bars.items():
                bar = axes.barh(y, values[key], color=colors[name], height=0.9)
                axes.bar_label(bar, fmt="%.2f", padding=2, fontsize=6)
                y += 1
            y += 1
        axes.axvline(1, color="black", linewidth=0.6)
        axes.set_yticks(ticks, [name for name, _ in groups], fontsize=7)
        axes.set_title(title, fontsize=9, loc="left")
        axes.tick_params(axis="x", labelsize=7)
    axes.set_ylim(y - 1, -1)  # first group on top
    handles = [axes.barh(0, 0, color=colors[name]) for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=6, fontsize=7, frameon=False)
    load = f", load {content['load']}" if "cpu" in content["device"] else ""
    machine = f"{content['device']} ({content['processor']}{load}), torch {content['versions']['torch']}"
    figure.suptitle(f"{machine}, commit {content['commit']}", fontsize=9)
    with replacing(path) as scratch:
        figure.savefig(scratch, format="png", dpi=130)


def _groups(rows: dict[str, Any]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """Return (workload and direction, {implementation: values of its faster layout by the first timer}) pairs."""
    groups = []
    for workload, row in rows.items():
        for direction in row["floor_ms"]:
            bars: dict[str, dict[str, float]] = {}
            for variant, by_timer in row[direction].items():
                metrics: dict[str, float] = next(iter(by_timer.values()), {})
                implementation, speedup = variant.rpartition(" ")[0], metrics.get("ratio_to_best_plain", 0.0)
                if speedup > bars.get(implementation, {"speedup": 0.0})["speedup"]:
                    bars[implementation] = {"speedup": speedup, "share": metrics["roofline_share"]}
            if bars:
                groups.append((f"{workload}, {direction}", bars))
    return groups


def _colors(names: list[str]) -> list[str]:
    fused = [name for name in names if not name.startswith(("plain", "compile"))]
    return [
        PLAIN_COLOR
        if name.startswith("plain")
        else COMPILE_COLOR
        if name.startswith("compile")
        else FUSED_COLORS[fused.index(name) % len(FUSED_COLORS)]
        for name in names
    ]
