"""Curves of runs as SVG, in colours that read on a light page and on a dark one."""

import base64
import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mgcc_dist.reporting.runs import Group, Run

INK = "#75808d"
COLOURS = ("#3584bf", "#d97f30", "#3f9e68", "#a163b8", "#c5524f", "#8a8f98", "#b59a2c", "#2fa5a8")
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
# What a run is validated by: split, key and factor in its rows, and the panel's title.
VALIDATED = {
    "segmentation": ("iou", 100.0, "validation IoU, corrected, %"),
    "autoencoder": ("mse", 1.0, "validation MSE"),
    "denoiser": ("loss", 1.0, "validation loss"),
}


def of_run(run: Run) -> tuple[str, str]:
    """Training loss and validation score over the steps: (data URI, description in words)."""
    stage = _stage(run)
    key, factor, title = VALIDATED[stage]
    loss = run.points("train", "loss")
    score = [(step, factor * value) for step, value in run.points("validation", key)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 2.4), layout="constrained")
        panels = figure.subplots(1, 2)
        for panel, points, name, colour in zip(panels, (loss, score), ("training loss", title), COLOURS, strict=False):
            _plot(panel, points, colour)
            panel.set(title=name, xlabel="step")
            if stage != "segmentation" and all(value > 0 for _, value in points):
                panel.set_yscale("log")
        return _uri(figure), f"{_words('training loss', loss)}; {_words(title, score)}."


def of_groups(groups: Sequence[Group]) -> tuple[str, str]:
    """Validation IoU of all runs over the epochs, a colour for each group: (data URI, description in words)."""
    key, factor, title = VALIDATED["segmentation"]
    words = []
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.0), layout="constrained")
        panel = figure.subplots()
        for place, each in enumerate(groups):
            for run in each.runs:
                points = [(epoch, factor * value) for epoch, value in run.points("validation", key, along="epoch")]
                label = f"{each.method} ({_short(each)})" if run is each.runs[0] else None
                _plot(panel, points, COLOURS[place % len(COLOURS)], label)
                words.append(_words(run.name, points))
        panel.set(title=title, xlabel="epoch of the labeled images")
        panel.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        return _uri(figure), f"{title} over the epochs. {'; '.join(words)}."


def _stage(run: Run) -> str:
    for stage in ("autoencoder", "denoiser"):
        if stage in (run.result.get("stage"), *run.config):
            return stage
    return "segmentation"


def _plot(panel: Axes, points: Sequence[tuple[float, float]], colour: str, label: str | None = None) -> None:
    along, values = [place for place, _ in points], [value for _, value in points]
    marker = "o" if len(points) < 60 else None
    panel.plot(along, values, color=colour, label=label, marker=marker, markersize=2.5)


def _short(group: Group) -> str:
    more = len(group.runs) - 1
    return group.runs[0].name + (f" and {more} more" if more else "")


def _words(name: str, points: Sequence[tuple[float, float]]) -> str:
    return f"{name} from {points[0][1]:.3g} to {points[-1][1]:.3g}" if points else f"{name}: nothing yet"


def _uri(figure: Figure) -> str:
    content = io.BytesIO()
    figure.savefig(content, format="svg", transparent=True)
    return f"data:image/svg+xml;base64,{base64.b64encode(content.getvalue()).decode()}"
