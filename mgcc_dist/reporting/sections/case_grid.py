"""The paper's Figure 4: cases x methods, each with image, ground truth and every row's contour.

Runs keep no predictions, so those of the chosen cases are computed from the runs' weights.
"""

import io
import logging
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.sample import Sample
from mgcc_dist.evaluation.difficulty import RULE, choose, measure
from mgcc_dist.evaluation.gallery import PREDICTION, TRUTH
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.inference import predictor
from mgcc_dist.inference.evaluation import truth_of
from mgcc_dist.reporting.image_scores import own_rows
from mgcc_dist.reporting.labels import Row
from mgcc_dist.reporting.runs import CONTENT, Run, format_names
from mgcc_dist.reporting.sections.label_fractions import curves
from mgcc_dist.reporting.templates import embed
from mgcc_dist.reporting.views import Picture, ReportSection

logger = logging.getLogger(__name__)

Shown = list[tuple[str, Run]]
"""label and run of each column"""


def section(rows: Sequence[Row]) -> ReportSection:
    """Draw the grid of the rows that scored the same images.

    Raises:
        UserError: no run scored an image, the shards are not where the config says, or no run has its weights.
    """
    columns = choose_columns(rows)
    run = columns[0][1]
    data = _open(run)
    keys = sorted({row["key"] for row in own_rows(run)})
    cases = _choose(data, keys)
    samples = [data[data.index_of(key)] for _, key in cases]
    masks, notes = _predict(columns, samples)
    names = [f"{why}\n{key}" for why, key in cases]
    picture = Picture(
        draw(names, samples, masks),
        f"Cases {', '.join(key for _, key in cases)} with the contours of {', '.join(masks)}",
        photo=True,
    )
    legend = [
        f"{len(keys)} images of {data.dataset}, split {run.result['split']}. {RULE}",
        "Ground truth green, prediction red; below each panel the IoU, or the share of the image that is falsely "
        f"predicted. One run per row, at its best step: {format_names([run.name for _, run in columns])}.",
    ]
    return ReportSection("Cases", notes, [], legend, pictures=[picture])


def choose_columns(rows: Sequence[Row]) -> Shown:
    """Choose one run per row, all scored on the same images: the images that most rows have.

    Of rows that differ only in the number of labels, the one with the most is shown. If several runs of a row scored
    these images, it is the first.

    Raises:
        UserError: no run has scores of single images.
    """
    fewer = {row.label for curve in curves(rows) for row in list(curve.rows.values())[:-1]}
    by_images: dict[tuple[str, ...], dict[str, Run]] = {}
    for row in rows:
        for run in row.group.distinct if row.label not in fewer else ():
            if keys := sorted(image["key"] for image in own_rows(run)):
                by_images.setdefault((row.group.dataset, *keys), {}).setdefault(row.label, run)
    if not by_images:
        raise UserError("--cases: no run has scores of single images")
    return list(max(by_images.values(), key=len).items())


def draw(cases: Sequence[str], samples: Sequence[Sample], masks: Mapping[str, Sequence[np.ndarray]]) -> str:
    """Draw one row per case: image, ground truth, and the contour of each of `masks`; return a PNG as data URI."""
    headings = ["image", "ground truth", *masks]
    figure = Figure(figsize=(1.75 * len(headings) + 0.3, 1.95 * len(cases) + 0.3), layout="constrained", dpi=110)
    panels = figure.subplots(len(cases), len(headings), squeeze=False)
    for line, (case, sample) in enumerate(zip(cases, samples, strict=True)):
        truth = truth_of(sample)
        predicted = [None, None, *(each[line] for each in masks.values())]
        for column, (panel, heading, mask) in enumerate(zip(panels[line], headings, predicted, strict=True)):
            panel.set(xticks=[], yticks=[], frame_on=False)
            panel.imshow(sample.image, cmap="gray", vmin=0, vmax=255, aspect="auto")
            if column and truth.any():
                panel.contour(truth, levels=[0.5], colors=TRUTH, linewidths=1.2)
            if mask is not None:
                if mask.any():
                    panel.contour(mask, levels=[0.5], colors=PREDICTION, linewidths=1.2)
                panel.set_xlabel(_score(mask, truth), fontsize=7, labelpad=2)
            if line == 0:
                panel.set_title(heading.replace(", ", ",\n"), fontsize=8)
            if column == 0:
                panel.set_ylabel(case, fontsize=7.5)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return embed(content.getvalue(), "png")


def _score(mask: np.ndarray, truth: np.ndarray) -> str:
    if not truth.any():
        return f"{100 * mask.mean():.1f} % false" if mask.any() else "empty"
    return f"IoU {100 * score_image(mask, truth, surface=False)['corrected']['iou']:.0f}"


def _open(run: Run) -> ShardFolder:
    folder = str(run.config.get("data", {}).get("shards"))
    data = ShardFolder.open(folder, verify=False)
    if data.content_sha256 != run.result.get(CONTENT, data.content_sha256):
        raise UserError(f"{folder}: is not the data set of {run.folder}. Convert it again, or leave out --cases.")
    return data


def _choose(data: ShardFolder, keys: Sequence[str]) -> list[tuple[str, str]]:
    with ProgressBar(len(keys), "choosing cases", "images") as bar:
        measured = []
        for key in keys:
            sample = data[data.index_of(key)]
            measured.append(measure(key, sample.image, truth_of(sample)))
            bar.update()
    return choose(measured)


def _predict(columns: Shown, samples: Sequence[Sample]) -> tuple[dict[str, list[np.ndarray]], list[str]]:
    """Return the masks of each row, and what is wrong with the weights of rows that are left out."""
    masks, wrong = {}, []
    with ProgressBar(len(columns), "predicting cases", "runs") as bar:
        for label, run in columns:
            try:
                loaded = predictor.load(run.folder, "best", precision="no")
                masks[label] = [loaded.predict(sample.image).mask for sample in samples]
            except UserError as error:
                wrong.append(f"{label} is left out: {error}")
                logger.warning("--cases: %s", wrong[-1])
            bar.update()
    if not masks:
        raise UserError("--cases: no run has weights that can be read. Repair the runs, or leave out --cases.")
    return masks, wrong
