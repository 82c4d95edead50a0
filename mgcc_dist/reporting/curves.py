"""Plot training curves as SVG, in colours that are readable on light and dark pages."""

import io
from collections.abc import Iterator, Sequence
from itertools import cycle

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mgcc_dist.reporting.runs import Run, RunGroup
from mgcc_dist.reporting.templates import embed

INK = "#75808d"
COLOURS = ("#3584bf", "#d97f30", "#3f9e68", "#a163b8", "#c5524f", "#b59a2c", "#2fa5a8", "#d977b5", "#8c6a4f")
MOST_CURVES = 10
LINE_STYLES = ("-", "--", ":")  # the next style once all colours are used, so that no two groups look the same
MARGINS = {"left": 0.06, "right": 0.995, "bottom": 0.19, "top": 0.89, "wspace": 0.13}
STYLE = {
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.2,
    "font.size": 8,
    "axes.titlesize": 8,
    "lines.linewidth": 1.4,
}
# Validation metric per stage: key in metrics.jsonl, scale, axis title.
VALIDATION_METRICS = {
    "segmentation": ("iou", 100.0, "validation IoU, corrected, %"),
    "autoencoder": ("mse", 1.0, "validation MSE"),
    "denoiser": ("loss", 1.0, "validation loss"),
}


def plot_run(run: Run) -> tuple[str, str]:
    """Plot training loss and validation metric against the step; return (data URI, alternative text)."""
    stage = _stage(run)
    key, scale, title = VALIDATION_METRICS[stage]
    loss = run.series("train", "loss")
    metric = [(step, scale * value) for step, value in run.series("validation", key)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.4))  # the constrained layout takes longer than all else
        panels = figure.subplots(1, 2, gridspec_kw=MARGINS)
        for panel, points, name, colour in zip(panels, (loss, metric), ("training loss", title), COLOURS, strict=False):
            _plot(panel, points, color=colour)
            panel.set(title=name, xlabel="step")
            if stage != "segmentation" and all(value > 0 for _, value in points):
                panel.set_yscale("log")
        return data_uri(figure), f"{_describe('training loss', loss)}; {_describe(title, metric)}."


def plot_groups(groups: Sequence[RunGroup]) -> tuple[str, str]:
    """Plot validation IoU against the epoch, one colour per group; return (data URI, alternative text).

    Of a group's runs, the first MOST_CURVES are drawn.
    """
    key, scale, title = VALIDATION_METRICS["segmentation"]
    descriptions = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.0), layout="constrained")
        panel = figure.subplots()
        for group, style in zip(groups, line_styles(), strict=False):
            for run in group.runs[:MOST_CURVES]:
                points = [(epoch, scale * value) for epoch, value in run.series("validation", key, x="epoch")]
                label = f"{group.method} ({_short_names(group)})" if run is group.runs[0] else ""
                _plot(panel, points, label=label, **style)
                descriptions.append(_describe(run.name, points))
        panel.set(title=title, xlabel="epoch of the labeled images")
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return data_uri(figure), f"{title} against the epoch. {'; '.join(descriptions)}."


def line_styles() -> Iterator[dict[str, str]]:
    """Yield matplotlib line properties, distinct for the first len(COLOURS) * len(LINE_STYLES) groups."""
    return cycle({"color": colour, "linestyle": style} for style in LINE_STYLES for colour in COLOURS)


def _stage(run: Run) -> str:
    for stage in ("autoencoder", "denoiser"):
        if stage in (run.result.get("stage"), *run.config):
            return stage
    return "segmentation"


def _plot(
    panel: Axes, points: Sequence[tuple[float, float]], color: str, linestyle: str = "-", label: str = ""
) -> None:
    marker = "o" if len(points) < 60 else None
    x, y = [x for x, _ in points], [y for _, y in points]
    panel.plot(x, y, color=color, linestyle=linestyle, label=label, marker=marker, markersize=2.5)


def _short_names(group: RunGroup) -> str:
    more = len(group.runs) - 1
    return group.runs[0].name + (f" and {more} more" if more else "")


def _describe(name: str, points: Sequence[tuple[float, float]]) -> str:
    return f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" if points else f"{name}: no values yet"


def data_uri(figure: Figure) -> str:
    """Return the figure as an SVG data URI with a transparent background."""
    content = io.BytesIO()
    figure.savefig(content, format="svg", transparent=True)
    return embed(content.getvalue(), "svg+xml")
