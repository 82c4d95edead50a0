"""Filter of pairs: drop samples on which a segmentation network, trained on real images, disagrees with the mask.

The network segments every sample. With a lesion in the mask, its agreement is the Dice of prediction and mask; without
one, it is the share of the image in which it predicts no lesion. The thresholds are the same values on real images: the
quantile of the agreement on the validation images with, and without, a lesion. A lesion that is missed completely is
dropped in any case: a network may miss more real lesions than the quantile. A network that is wrong about some real
images is wrong about synthetic ones, too, so it does not have to agree with pairs more than with most real images.

`filter/filter.json` has the thresholds, the counts per class and the agreement of each pair, and `filter/dropped.png`
shows dropped ones. The pairs that are kept are in the shard folder `pairs/`; the samples stay as they are.
"""

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from mgcc_dist.assessment.config import FilterConfig
from mgcc_dist.common.distributed import gather_by_index, raise_on_all_ranks
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_json
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.datasets import ResizedDataset, SampleDataset
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.selection import write_selected
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.evaluation.gallery import Case, draw_cases
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.inference.predictor import THRESHOLD, Predictor, load

logger = logging.getLogger(__name__)

BATCH = 16
SHOWN = 18


def check_config(config: FilterConfig, images: ImageData) -> None:
    """Check the settings before training.

    Raises:
        UserError: the run can't be loaded, or no validation image has a mask.
    """
    if not config.run:
        return
    load(config.run, "best", "cpu", precision="no")
    records = images.shards.records
    if not any(records[index].labeled for index in images.val.indices):
        raise _no_lesion()


def _no_lesion() -> UserError:
    return UserError(
        "filter.run: no validation image has a mask with a lesion, so the threshold can't be chosen. Choose a split "
        "with labeled validation images, or set filter.run null."
    )


def filter_pairs(
    config: FilterConfig, images: ImageData, samples: Path, folder: Path, pairs: Path, accelerator: Accelerator
) -> dict[str, Any]:
    """Write the report to `folder` and the pairs that are kept to the shard folder `pairs`. Collective.

    Raises:
        UserError: the samples have no masks, the run does not exist, no validation image has a lesion and a mask, or
            no pair would be left.
    """
    assert config.run
    with raise_on_all_ranks():
        predictor = load(config.run, "best", accelerator.device, precision="no")
        shards = ShardFolder.open(samples, verify=False)
        if not all(record.labeled for record in shards.records):
            raise UserError(
                f"filter.run: {samples} holds images without masks. Set denoiser.masks, or filter.run null."
            )
    real = _agreements(predictor, images.val, images.size, "segmenting validation images", accelerator)
    found = _agreements(predictor, shards, images.size, "segmenting samples", accelerator)
    with raise_on_all_ranks():
        thresholds = _thresholds([value for value in real if value], config.quantile)
        rows: list[dict[str, Any]] = []
        for record, value in zip(shards.records, found, strict=True):
            assert value is not None
            accepted = value[1] > 0 and value[1] >= thresholds["lesion" if value[0] else "normal"]
            rows.append(
                {"key": record.key, "class": record.category, "agreement": round(value[1], 4), "kept": accepted}
            )
        kept = {row["key"] for row in rows if row["kept"]}
        report: dict[str, Any] = {
            "request": {"samples": shards.index.get("request"), "quantile": config.quantile},
            "run": {key: predictor.info.get(key) for key in ("weights_sha256", "method", "dataset", "split", "seed")},
            "notes": _notes(predictor, images),
            "thresholds": thresholds,
            "pairs": len(rows),
            "dropped": len(rows) - len(kept),
            "classes": {name: _summarize(rows, name) for name in sorted({row["class"] for row in rows})},
            "images": rows,
        }
        if not kept:
            raise UserError(
                f"filter.quantile: {config.quantile:g} would drop all {len(rows)} pairs. The samples may be too poor, "
                "or the run of filter.run too weak: look at the gallery, lower the quantile, or set filter.run null."
            )
        if accelerator.is_main_process:
            _draw_dropped(predictor, shards, rows, images.size, folder / "dropped.png")
            facts = {"run": report["run"], "quantile": config.quantile, "dropped": report["dropped"]}
            scratch = write_selected(shards, kept, pairs, filter=facts)
            shutil.rmtree(pairs, ignore_errors=True)
            scratch.rename(pairs)
            write_json(folder / "filter.json", report)
    logger.info(
        "filter: %d of %d pairs dropped (%s) -> %s",
        *(report["dropped"], len(rows), describe(report), pairs),
    )
    for note in report["notes"]:
        logger.warning("filter: %s", note)
    return report


def describe(report: dict[str, Any]) -> str:
    """Return the dropped pairs per class: `benign 3 of 40, malignant 1 of 20`."""
    return ", ".join(f"{name} {each['dropped']} of {each['pairs']}" for name, each in report["classes"].items())


def agreement(predicted: np.ndarray, mask: np.ndarray) -> tuple[bool, float]:
    """Return whether a mask has a lesion, and how much a prediction agrees with it; both bool [H,W]."""
    if mask.any():
        return True, score_image(predicted, mask, surface=False)["corrected"]["f1"]
    return False, float(1 - predicted.mean())


def _agreements(
    predictor: Predictor, dataset: SampleDataset, size: int, task: str, accelerator: Accelerator
) -> list[tuple[bool, float] | None]:
    """Return `agreement` for each image, as the square that the diffusion model sees; None without a mask."""
    squares = ResizedDataset(dataset, size)
    mine = range(accelerator.process_index, len(squares), accelerator.num_processes)
    rows: list[tuple[int, tuple[bool, float] | None]] = []
    with raise_on_all_ranks(), ProgressBar(len(squares), task, "images", share=len(mine)) as bar:
        for start in range(0, len(mine), BATCH):
            indices = mine[start : start + BATCH]
            batch = [squares[i] for i in indices]
            for i, sample, predicted in zip(indices, batch, _predict(predictor, batch), strict=True):
                rows.append((i, None if sample.mask is None else agreement(predicted, sample.mask > 0)))
            bar.update(len(batch))
    return gather_by_index(rows)


def _predict(predictor: Predictor, samples: Sequence[Sample]) -> list[np.ndarray]:
    inputs = [predictor.prepare(sample.image) for sample in samples]
    names = [repr(sample.key) for sample in samples]
    return [probability > THRESHOLD for probability in predictor.probabilities(inputs, names)]


def _thresholds(real: Sequence[tuple[bool, float]], quantile: float) -> dict[str, float]:
    """Return the lowest accepted agreement of masks with and without a lesion."""
    lesion = [value for has_lesion, value in real if has_lesion]
    normal = [value for has_lesion, value in real if not has_lesion]
    if not lesion:
        raise _no_lesion()
    return {
        "lesion": round(float(np.quantile(lesion, quantile)), 4),
        "normal": round(float(np.quantile(normal, quantile)), 4) if normal else 1.0,
    }


def _summarize(rows: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    chosen = [row for row in rows if row["class"] == name]
    median = float(np.median([row["agreement"] for row in chosen]))
    dropped = sum(not row["kept"] for row in chosen)
    return {"pairs": len(chosen), "dropped": dropped, "median_agreement": round(median, 4)}


def _notes(predictor: Predictor, images: ImageData) -> list[str]:
    """Say what makes the thresholds wrong: a run that was trained on validation images, or on other images."""
    info = predictor.info
    if info.get("dataset") not in (None, images.info["dataset"]):
        return [
            f"the run was trained on {info['dataset']}, and this model on {images.info['dataset']}. If it fails on "
            "these images, the thresholds are too low and the filter keeps wrong pairs."
        ]
    if info.get("dataset") is None or info.get("split") in (None, images.info["split"]):
        return []
    return [
        f"the run was trained on split {info['split']}, and this model on split {images.info['split']}. If it has seen "
        "these validation images, the thresholds are too high."
    ]


def _draw_dropped(
    predictor: Predictor, shards: ShardFolder, rows: Sequence[dict[str, Any]], size: int, path: Path
) -> None:
    """Draw dropped pairs, those of the lowest agreement first; with none, the kept ones of the lowest agreement."""
    order = sorted(range(len(rows)), key=lambda i: (rows[i]["kept"], rows[i]["agreement"]))[:SHOWN]
    squares = ResizedDataset(shards, size)
    samples = [squares[i] for i in order]
    cases = []
    for i, sample, predicted in zip(order, samples, _predict(predictor, samples), strict=True):
        assert sample.mask is not None
        state = "kept" if rows[i]["kept"] else "dropped"
        title = f"{sample.key.removeprefix('synthetic-')} {rows[i]['class']}\n{rows[i]['agreement']:.3f}, {state}"
        cases.append(Case(title, sample.image, (sample.mask > 0).astype(float), predicted.astype(float)))
    draw_cases(cases, "pairs of the lowest agreement: mask green, prediction red", path, columns=6)
