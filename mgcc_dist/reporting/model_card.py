"""The model card of a model folder: its measured scores, how it was trained, its limits, in Markdown."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import read_object, read_versioned
from mgcc_dist.evaluation.temperature import CALIBRATION
from mgcc_dist.evaluation.threshold import DEFAULT
from mgcc_dist.inference.evaluation_inputs import FORMAT, SUMMARY, VERSION
from mgcc_dist.inference.model_folder import read_model
from mgcc_dist.reporting.evaluation import IMAGES
from mgcc_dist.reporting.evaluation_page import ALARMS, Column, mean_cell
from mgcc_dist.train.initial_weights import WEIGHTS

Content = Mapping[str, Any]
COLUMNS: list[Column] = [
    ("IoU", ("corrected", "iou"), 100, 1),
    ("Dice", ("corrected", "dice"), 100, 1),
    ("lesion IoU", ("lesion", "iou"), 100, 1),
    ("lesion Dice", ("lesion", "dice"), 100, 1),
    ALARMS[0],
]
COUNTS = ("labeled", "unlabeled", "validation", "test")
NAMES = {"busi": "BUSI", "busbra": "BUS-BRA"}
PAPERS = {
    "busi": "W. Al-Dhabyani, M. Gomaa, H. Khaled, A. Fahmy. Dataset of breast ultrasound images. Data in Brief 28, "
    "104863, 2020. CC BY 4.0",
    "busbra": "W. Gómez-Flores, M. J. Gregorio-Calas, W. Coelho de Albuquerque Pereira. BUS-BRA: A breast ultrasound "
    "dataset for assessing computer-aided diagnosis systems. Medical Physics 51, 3110-3123, 2024",
}
MGCC = (
    "F. Tang, J. Ding, L. Wang, M. Xian, C. Ning. Multi-level global context cross consistency model for "
    "semi-supervised ultrasound image segmentation with diffusion model. arXiv 2305.09447, 2023"
)
FRONT_MATTER = {
    "library_name": "mgcc-dist",
    "pipeline_tag": "image-segmentation",
    "tags": ["medical", "ultrasound", "segmentation"],
}


def model_card(folder: Path, evaluations: Sequence[Path]) -> str:
    """Return the card of a model folder.

    Args:
        evaluations: output folders of `mgcc evaluate` with this model.

    Raises:
        UserError: an evaluation is not finished, or is of other weights.
    """
    model = read_model(folder)
    measured = [(each, _read_evaluation(each, model)) for each in evaluations]
    parts = [
        f"---\n{yaml.safe_dump(FRONT_MATTER, sort_keys=False)}---",
        f"# {model['name']}",
        f"Segments lesions in ultrasound images. Network `{model['network']['name']}`, trained by mgcc-dist with the "
        f"method `{model['method']}`.",
        "**Research use only. Not a medical device.** Do not base a diagnosis or a treatment on its masks.",
        "## Use",
        f"```bash\nmgcc predict --model {model['name']} image.png --out masks\n```",
        f'```python\nimport mgcc_dist\n\npredictor = mgcc_dist.load("{model["name"]}")\n'
        'mask, probability = predictor.predict("image.png")\n```',
        f"`{model['name']}` stands for the path of this folder, unless it is a shipped model. Images may have any "
        f"size; the network sees {model['image_size']}x{model['image_size']} pixels.",
        "## Scores",
        *(_scores(model, measured) or ["Not evaluated yet."]),
        *_calibration(folder),
        "## Training",
        *_training(model),
        "## Limitations",
        _limitations(model, [summary for _, summary in measured]),
        "## Data and papers",
        _sources(model, [summary for _, summary in measured]),
    ]
    return "\n\n".join(parts) + "\n"


def _read_evaluation(folder: Path, model: Content) -> Content:
    """Read the summary of an evaluation.

    Raises:
        UserError: it does not exist, or is not of this model only.
    """
    if not (folder / SUMMARY).is_file():
        raise UserError(
            f"--evaluations {folder}: holds no finished evaluation. Name a folder that mgcc evaluate wrote."
        )
    summary = read_versioned(folder / SUMMARY, FORMAT, VERSION, "Rerun that evaluation into another folder.")
    if [run["weights_sha256"] for run in summary["runs"]] != [model["files"][WEIGHTS]]:
        raise UserError(
            f"--evaluations {folder}: is of other weights than the exported ones, which have 16 bits. Evaluate the "
            "exported folder, then export again with --overwrite."
        )
    return summary


def _scores(model: Content, measured: Sequence[tuple[Path, Content]]) -> list[str]:
    if not measured:
        return []
    parts = [
        "In percent, with 95 % intervals over patients or groups of near-duplicates. IoU and Dice are means over all "
        "images, lesion IoU and lesion Dice over those with a lesion; specificity is the share of images without a "
        "lesion whose mask is empty. Measured with the weights of this folder in float32, at probability 0.5."
    ]
    for folder, summary in measured:
        names = " + ".join(NAMES.get(name, name) for name in summary["datasets"])
        overall, subset = summary["overall"], summary["request"]["subset"]
        parts.append(f"### {names}" + (f", {subset} images of `{_split(summary)}`" if subset else ""))
        parts.append(
            f"{overall['images']} images, {overall['lesions']} of them with a lesion, {overall['groups']} patients or "
            f"groups; scored at {_size(folder)}. {_provenance(model, summary)}"
        )
        classes = [(each["name"], each) for each in summary["subsets"] if each["by"] == "class"]
        rows = []
        for name, each in [("all", overall), *classes]:
            cells = [mean_cell(each, column) for column in COLUMNS]
            texts = [cell.plain for cell in cells]
            rows.append([name, each["images"], *texts])
        headings = ["class", "images", *(heading for heading, *_ in COLUMNS)]
        align = ("left", *["right"] * (len(headings) - 1))
        parts.append(tabulate(rows, headings, tablefmt="pipe", disable_numparse=True, colalign=align))
    return parts


def _provenance(model: Content, summary: Content) -> str:
    """Say whether the images were used for training or selection, and what was done besides predicting them."""
    subset = summary["request"]["subset"]
    if model.get("dataset") not in summary["datasets"]:
        said = "A data set that was not used for training or selection."
    elif _split(summary) != model.get("split"):
        said = "Some of these images may have been used for training."
    elif subset == "test":
        said = "Not used for training or selection."
    else:
        said = "Used for " + ("selection" if subset == "validation" else "training") + ", so scores are optimistic."
    extras = [f"--tta {' '.join(summary['request']['tta'])}"] if summary["request"]["tta"] else []
    if (setting := summary["postprocess"]["setting"]) != "none":
        extras.append(f"--postprocess {setting}")
    if (threshold := summary.get("threshold", {}).get("value", DEFAULT)) != DEFAULT:
        extras.append(f"--threshold {threshold:g}")
    return said + (f" With {' and '.join(extras)}, which `mgcc predict` does not apply." if extras else "")


def _split(summary: Content) -> str | None:
    """Return the name of the split, which may have been given as a file."""
    split = summary["config"]["split"]
    return Path(split).name.removesuffix(".json") if split else None


def _size(folder: Path) -> str:
    """Return the size of the scored images of an evaluation in words."""
    with (folder / IMAGES).open(newline="", encoding="utf-8") as file:
        sizes = {(row["width"], row["height"]) for row in csv.DictReader(file)}
    return f"{'x'.join(sizes.pop())} pixels" if len(sizes) == 1 else "their own sizes"


def _calibration(folder: Path) -> list[str]:
    if not (folder / CALIBRATION).is_file():
        return []
    fitted = read_object(folder / CALIBRATION)
    ece = fitted["ece"]
    return [
        f"Probabilities: `--calibrated` applies the temperature {fitted['temperature']:.3f}, fitted to the "
        f"{fitted['images']} val images of `{fitted['split']}`. The expected calibration error on these is "
        f"{100 * ece['before']:.2f} % before and {100 * ece['after']:.2f} % after. Masks do not change."
    ]


def _training(model: Content) -> list[str]:
    facts = {"data set": NAMES.get(str(model.get("dataset")), model.get("dataset")), "split": model.get("split")}
    counts = model.get("images") or {}
    facts["images"] = ", ".join(f"{counts[kind]} {kind}" for kind in COUNTS if counts.get(kind))
    facts |= {key: model.get(key) for key in ("step", "seed", "commit")}
    rows = [(key, value) for key, value in facts.items() if value not in (None, "")]
    if not model["training"]:
        return [tabulate(rows, ["", ""], tablefmt="pipe", disable_numparse=True)] if rows else ["Not known."]
    given = {key: value for key, value in model["training"].items() if value is not None}
    config = yaml.safe_dump(given, default_flow_style=None, width=120)
    return [
        tabulate(rows, ["", ""], tablefmt="pipe", disable_numparse=True),
        "```bash\nmgcc segment --config training.yaml --out run\n```",
        f"with this `training.yaml`, where `data.shards` is the folder of the shards:\n\n```yaml\n{config}```",
    ]


def _limitations(model: Content, summaries: Sequence[Content]) -> str:
    size = model["image_size"]
    lines = [
        "Research software. No clinical validation, no approval by any authority.",
        f"Trained on {NAMES.get(str(model.get('dataset')), 'one data set')} only. Expect other scores on other "
        "scanners, hospitals and patients, and measure them with `mgcc evaluate`.",
        f"Images are resized to {size}x{size} pixels, so contours are no finer than that.",
        "Segments; does not classify. Areas and diameters are those of the mask.",
    ]
    for summary in summaries:
        overall, names = summary["overall"], " + ".join(NAMES.get(name, name) for name in summary["datasets"])
        if alarms := overall["specificity"]:
            missed = round(alarms["images"] * (1 - alarms["mean"]))
            subset = f", {summary['request']['subset']}" if summary["request"]["subset"] else ""
            lines.append(f"Finds a lesion in {missed} of {alarms['images']} images without one ({names}{subset}).")
    return "\n".join(f"- {line}" for line in lines)


def _sources(model: Content, summaries: Sequence[Content]) -> str:
    used = dict.fromkeys([str(model.get("dataset")), *(name for each in summaries for name in each["datasets"])])
    lines = [f"{NAMES[name]}: {PAPERS[name]}." for name in used if name in PAPERS]
    return "\n".join(f"- {line}" for line in [*lines, f"Method: {MGCC}."])
