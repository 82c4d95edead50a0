"""Write the output folder of `mgcc evaluate`: images.csv, gallery.png, page.html and, last, summary.json."""

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tabulate import tabulate

from mgcc_dist.common.config import as_plain
from mgcc_dist.common.distributed import raise_on_all_ranks
from mgcc_dist.common.environment import describe_environment
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import InvalidJson, read_object, write_json, write_text
from mgcc_dist.common.lock import LOCK, lock_folder
from mgcc_dist.evaluation.cases import choose_cases
from mgcc_dist.evaluation.config import EvaluateConfig
from mgcc_dist.evaluation.gallery import LEGEND, Case, draw_cases
from mgcc_dist.evaluation.summary import (
    FORMAT,
    IMAGES,
    REQUEST,
    SUMMARY,
    VERSION,
    Row,
    add_sizes,
    summarize,
    summarize_subsets,
    summarize_trust,
)
from mgcc_dist.evaluation.temperature import fit_temperature, write_temperature
from mgcc_dist.inference.evaluation import Scores, truth_of
from mgcc_dist.inference.evaluation_inputs import Inputs
from mgcc_dist.reporting.evaluation_page import OVERLAP, protocol_table, render_evaluation

logger = logging.getLogger("mgcc_dist.evaluate")

GALLERY, PAGE = "gallery.png", "page.html"
FILES = (REQUEST, IMAGES, GALLERY, PAGE, SUMMARY, LOCK)


def is_finished(folder: Path) -> bool:
    """Return whether the evaluation in `folder` is complete: summary.json is written last."""
    return (folder / SUMMARY).is_file()


def open_folder(folder: Path, request: dict[str, Any], accelerator: Accelerator) -> None:
    """Create or reopen the output folder of the evaluation `request` and, unless it is finished, lock it. Collective.

    Raises:
        UserError: another process uses it, or it holds other files or another evaluation.
    """
    with raise_on_all_ranks():
        if accelerator.is_main_process:
            _check_content(folder, request)
    if is_finished(folder):  # which may be read-only
        return
    lock_folder(folder, accelerator)
    with raise_on_all_ranks():
        if accelerator.is_main_process and not (folder / REQUEST).is_file():
            write_json(folder / REQUEST, request)


def _check_content(folder: Path, request: dict[str, Any]) -> None:
    existing = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    own = FILES if REQUEST in existing else (LOCK,)
    if foreign := [name for name in existing if name not in own and not name.endswith(".tmp")]:
        raise UserError(
            f"--out {folder}: holds {foreign[0]!r} and is not the folder of an evaluation. Choose another --out."
        )
    if REQUEST not in existing:
        return
    try:
        earlier = read_object(folder / REQUEST)
    except InvalidJson as error:
        raise UserError(f"{error} Choose another --out.") from error
    if differing := [key for key in request if earlier.get(key) != request[key]]:
        raise UserError(
            f"--out {folder}: holds an evaluation with other {' and '.join(differing)} (see its {REQUEST}). "
            "Choose another --out."
        )


def write_evaluation(
    config: EvaluateConfig, inputs: Inputs, scores: Scores, accelerator: Accelerator
) -> dict[str, Any]:
    """Summarize the scores, write all files, and return the summary."""
    folder = config.out
    add_sizes(scores.rows)
    summary = {
        "format": FORMAT,
        "version": VERSION,
        "config": as_plain(config),
        "datasets": list(dict.fromkeys(row["dataset"] for row in scores.rows)),
        "request": inputs.request,
        "runs": inputs.runs,
        "notes": inputs.notes,
        "threshold": {"value": scores.threshold, "chosen": inputs.threshold is None},
        "postprocess": {"setting": str(scores.postprocess), "chosen": inputs.postprocess is None},
        "overall": summarize(scores.rows),
        "subsets": summarize_subsets(scores.rows),
        **summarize_trust(scores.rows, scores.bins),
        **_store_temperature(config, inputs, scores),
        "corruptions": [
            {"name": name, "strength": strength, **summarize(rows)}
            for (name, strength), rows in scores.corrupted.items()
        ],
        "environment": describe_environment(accelerator.device),
    }
    write_text(folder / IMAGES, _csv(scores.rows))
    cases = choose_cases(scores.rows)
    draw_cases(_panels(cases, inputs, scores), LEGEND, folder / GALLERY, columns=5)
    write_text(folder / PAGE, render_evaluation(summary, scores.rows, folder / GALLERY))
    write_json(folder / SUMMARY, summary)
    return summary


def _store_temperature(config: EvaluateConfig, inputs: Inputs, scores: Scores) -> dict[str, Any]:
    """Fit a temperature and write it next to the run's weights, if that is asked for; returns it for the summary."""
    if not config.fit_temperature:
        return {}
    (run,) = inputs.runs
    fitted = fit_temperature(scores.histograms)
    try:
        path = write_temperature(fitted, Path(run["weights"]), run["weights_sha256"], str(config.split))
    except OSError as error:
        raise UserError(f"--fit-temperature: {run['weights']}: can't write next to it ({error})") from error
    logger.info(
        "evaluate: temperature %.3f, ECE %.4f before and %.4f after -> %s",
        *(fitted.temperature, fitted.ece.before, fitted.ece.after, path),
    )
    return {"temperature": asdict(fitted)}


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {name: int(value) if isinstance(value, bool) else value for name, value in row.items()} for row in rows
    )
    return text.getvalue()


def _panels(cases: Sequence[tuple[str, Row]], inputs: Inputs, scores: Scores) -> list[Case]:
    """Read and predict the images of `cases` again."""
    panels = []
    for why, row in cases:
        sample = inputs.data[scores.indices[scores.rows.index(row)]]
        (probability,) = inputs.ensemble.probabilities([sample.image], [sample.key])
        score = (
            f"Dice {100 * row['dice']:.0f} %" if row["lesion"] else f"{100 * row['predicted_area']:.1f} % of the image"
        )
        mask = scores.postprocess(probability > scores.threshold)
        panels.append(Case(f"{why}\n{row['key']}, {score}", sample.image, truth_of(sample), mask))
    return panels


def main_table(summary: dict[str, Any]) -> str:
    """Format the main scores as plain text."""
    rows = [[name, *(cell.plain for cell in cells)] for name, cells in protocol_table(summary["overall"]).rows]
    headings = ["protocol", "images", *OVERLAP.values()]
    return tabulate(rows, headings, tablefmt="simple", disable_numparse=True)
