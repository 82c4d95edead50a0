"""Segment all images of a folder: the work of `mgcc predict`."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.common.progress import ProgressBar
from mgcc_dist.data.file_listing import describe_unread, walk_files
from mgcc_dist.data.geometry import Fit, fit_image
from mgcc_dist.data.images import SUFFIXES, BadFile, bits_used, find_unreadable, read_grey
from mgcc_dist.data.workers import load_in_order
from mgcc_dist.evaluation.calibration import confidence
from mgcc_dist.inference.config import PredictConfig
from mgcc_dist.inference.output_folder import (
    CONTENTS,
    MASKS,
    OVERLAYS,
    PREDICTIONS,
    SKIPPED,
    WRITTEN,
    OutputFolder,
    list_names,
)
from mgcc_dist.inference.predictor import THRESHOLD, NetworkInput, Predictor, load

logger = logging.getLogger("mgcc_dist.predict")

CONTOUR = (255, 90, 78)
_CODEC = {"encoding": "utf-8", "errors": "surrogateescape"}  # file names need not be UTF-8


Loaded = tuple[Path, NetworkInput]  # a file below the folder of images, and its pixels


def predict_folder(config: PredictConfig) -> None:
    """Segment a folder of images, unless that is done already. Files in `out` that somebody else changed are kept.

    Raises:
        UserError: `run` holds no trained network, `images` no image or an unreadable one, or `out` other files.
    """
    predictor = load(config.run, config.weights, precision=config.precision, kernels=config.kernels)
    names = output_names(list_images(config.images, config.out))
    files = list(names)
    out = OutputFolder(config.out, _contents(config, predictor))
    out.open(config.overwrite)
    hashes = {file.as_posix(): _sha256(config.images / file) for file in files}
    if out.is_finished(hashes) and _listed(config.out) == hashes.keys():
        logger.info("predict: %s already exists; nothing to do", config.out / PREDICTIONS)
        return
    out.reopen((folder / name).as_posix() for name in names.values() for folder in (Path(MASKS), Path(OVERLAYS)))

    bits = bits_used(config.images / file for file in files)
    if bits:
        logger.info("predict: 16-bit images are scaled to 8 bits as images of %d bits", bits)
    chunks = [files[start : start + config.batch] for start in range(0, len(files), config.batch)]
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    with ProgressBar(len(files), "predict", "images") as bar:
        read = partial(_read, config.images, chunks, predictor.image_size, predictor.fit, config.skip_bad, bits)
        for loaded, bad in load_in_order(read, range(len(chunks)), config.workers):
            probabilities = predictor.probabilities(
                [pixels for _, pixels in loaded], [repr(file.as_posix()) for file, _ in loaded]
            )
            for (file, pixels), probability in zip(loaded, probabilities, strict=True):
                name, mask = names[file], probability > THRESHOLD
                out.write((MASKS / name).as_posix(), _png(np.where(mask, 255, 0).astype(np.uint8)))
                out.write((OVERLAYS / name).as_posix(), _png(overlay(pixels.image, mask)))
                rows.append({"file": file.as_posix(), "mask": (MASKS / name).as_posix()} | measure(probability))
            skipped += bad
            bar.update(len(loaded) + len(bad))
    if not rows:
        raise UserError(
            f"{config.images}: none of {len(files)} images can be read. "
            f"The first error is {files[0]}: {skipped[0]['problem']}"
        )

    if skipped:
        out.write(SKIPPED, _csv(skipped))
        logger.warning("predict: skipped %d files, see %s", len(skipped), config.out / SKIPPED)
    out.write(PREDICTIONS, _csv(rows))
    out.finish(hashes)
    if out.kept:
        logger.warning(
            "predict: kept %d files that were changed, or not written by `mgcc predict`: %s. "
            "predictions.csv describes the network's masks.",
            *(len(out.kept), list_names(out.kept)),
        )
    lesions = sum(row["lesion"] == "yes" for row in rows)
    logger.info("predict: %d images, %d with a lesion -> %s", len(rows), lesions, config.out / PREDICTIONS)


def list_images(folder: Path, out: Path) -> list[Path]:
    """List the image files in `folder` and its subfolders, relative to it, sorted (see `walk_files`).

    Raises:
        UserError: there are none, or one of `out` and `folder` contains the other, so that masks could pass for images.
    """
    if not folder.is_dir():
        raise UserError(f"--images {folder}: not a folder. Give the folder that holds the images.")
    inner, outer = folder.resolve(), out.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"--out {out}: --images {folder} is inside it, or it is inside --images. Choose another --out.")
    for predicted in (folder, folder.resolve().parent):
        if (predicted / CONTENTS).is_file() and (predicted / WRITTEN).is_file():
            raise UserError(f"--images {folder}: {predicted} holds predictions. Give the folder of the images.")
    files = list(walk_files(folder))
    images = sorted(file for file in files if file.suffix.lower() in SUFFIXES)
    for note in describe_unread(set(files) - set(images), folder):
        logger.warning("predict: %s", note)
    if not images:
        raise UserError(f"--images {folder}: no images ({', '.join(SUFFIXES)}) in the folder or its subfolders")
    return [image.relative_to(folder) for image in images]


def output_names(files: Sequence[Path]) -> dict[Path, Path]:
    """The PNG of each image's mask: `a.png`; with both a.jpg and a.bmp, `a.jpg.png` and `a.bmp.png`.

    Raises:
        UserError: two images would still share a name.
    """
    times = Counter(file.with_suffix(".png") for file in files)
    names = {
        file: file.with_suffix(".png") if times[file.with_suffix(".png")] == 1 else file.with_name(f"{file.name}.png")
        for file in files
    }
    owners: dict[Path, Path] = {}
    for file, name in names.items():
        if name in owners:
            raise UserError(f"the masks of {owners[name]} and {file} would both be {name}. Rename one of the images.")
        owners[name] = file
    return names


def measure(probability: np.ndarray) -> dict[str, Any]:
    """The row of predictions.csv for a probability [H,W], without the file names."""
    mask = probability > THRESHOLD
    height, width = mask.shape
    area = int(mask.sum())
    return {
        "width": width,
        "height": height,
        "area_pixels": area,
        "area_fraction": f"{area / mask.size:.6f}",
        "confidence": f"{confidence(probability, mask):.4f}",
        "lesion": "yes" if area else "no",
    }


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the inner border of `mask` bool [H,W] on `image` uint8 [H,W]; returns uint8 [H,W,3]."""
    thickness = max(1, round(min(image.shape) / 250))
    outside = torch.from_numpy(~mask).float()[None]
    for kernel in ((2 * thickness + 1, 1), (1, 2 * thickness + 1)):
        outside = F.max_pool2d(outside, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    drawn = np.repeat(image[:, :, None], 3, axis=2)
    drawn[mask & outside[0].bool().numpy()] = CONTOUR
    return drawn


def _read(
    folder: Path, chunks: list[list[Path]], size: int, fit: Fit, skip_bad: bool, bits: int | None, index: int
) -> tuple[list[Loaded], list[dict[str, str]]]:
    """Load the images of chunk `index`; with `skip_bad` also the rows of skipped.csv."""
    loaded, skipped = [], []
    for file in chunks[index]:
        try:
            image = read_grey(folder / file, bits)
        except BadFile as bad:
            if not skip_bad:
                raise UserError(f"{bad}. Fix it or pass --skip-bad.") from bad
            skipped.append({"file": file.as_posix(), "problem": bad.reason})
        else:
            loaded.append((file, NetworkInput(image, fit_image(image, size, fit))))
    return loaded, skipped


def _contents(config: PredictConfig, predictor: Predictor) -> dict[str, Any]:
    """What makes two predictions the same: predict.json."""
    weights = str(Path(predictor.info["weights"]).resolve())
    return {
        "images": str(config.images.resolve()),
        "weights": weights,
        "weights_sha256": predictor.info["weights_sha256"],
    }


def _listed(out: Path) -> set[str]:
    """The image files that the tables of an earlier prediction list."""
    tables = [path for name in (PREDICTIONS, SKIPPED) if (path := out / name).is_file()]
    rows = (row for path in tables for row in csv.DictReader(io.StringIO(path.read_bytes().decode(**_CODEC))))
    return {row.get("file", "") for row in rows}


def _sha256(image: Path) -> str:
    """Return the sha256 of an image file, or why it can't be read, which `skipped.csv` then says too."""
    bad = find_unreadable(image)
    return bad.reason if bad else sha256_of(image)


def _png(pixels: np.ndarray) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def _csv(rows: Sequence[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode(**_CODEC)
