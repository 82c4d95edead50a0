"""Program: images in, lesion masks out.

    python -m mgcc_dist.predict --run out/runs/mgcc_1 --images DIR --out out/masks

Takes every PNG, JPEG, BMP and TIFF below --images, of any size, depth and colour, and writes under the same names, in
the same subfolders:

    OUT/masks/NAME.png       0 and 255, at the image's size (as it is shown: a camera's rotation is applied)
    OUT/overlays/NAME.png    the image in grey, with the contour of the mask
    OUT/predictions.csv      file, mask, width, height, area_pixels, area_fraction, confidence, lesion (yes or no)
    OUT/skipped.csv          file, problem; with --skip-bad, where there are any
    OUT/predict.json         which images, which weights

The network's probability is resized bilinearly to the image's size and thresholded at 0.5. `confidence` is the mean
probability inside the mask, and for an empty mask 1 - the highest probability of the image; it is for sorting and not
calibrated. Convolutions run in bfloat16 where the device has instructions for it, which moves single pixels of a
contour; `--precision no` keeps float32. predictions.csv is written last: without it a folder is unfinished, and the
same command makes it anew.
"""

import csv
import io
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from jsonargparse.typing import NonNegativeInt, PositiveInt
from PIL import Image
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from mgcc_dist.common.config import HelpFormatter
from mgcc_dist.common.environment import has_bf16
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.files import read_json, replacing, sha256_of, write_bytes, write_json
from mgcc_dist.data.images import SUFFIXES, BadFile, read_grey, resize_image
from mgcc_dist.data.loader import scaled
from mgcc_dist.data.workers import load_in_order
from mgcc_dist.inference.loading import load_predictor
from mgcc_dist.kernels.fuse import Kernels, fuse

MASKS, OVERLAYS, PREDICTIONS, SKIPPED, FACTS = "masks", "overlays", "predictions.csv", "skipped.csv", "predict.json"
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}
CONTOUR = (255, 90, 78)


@dataclass(frozen=True)
class Input:
    """One image file: `file` below the folder of images, `image` uint8 [H,W], `square` the same as uint8 [S,S]."""

    file: Path
    image: np.ndarray
    square: np.ndarray


def main(argv: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    try:
        predict(_parser().parse_args(words))
    except ArgumentError as error:
        raise UserError(" ".join(error.message.split())) from error
    except OSError as error:
        raise UserError(str(error)) from error


def predict(arguments: Namespace) -> None:
    """Segment a folder of images.

    Raises:
        UserError: `run` holds no trained network, `images` no image or one that can't be read, or `out` other things.
    """
    network, size = load_predictor(arguments.run, arguments.weights)
    network = ready(network, arguments.kernels)
    precision = (
        fast_dtype(next(network.parameters()).device) if arguments.precision == "auto" else DTYPES[arguments.precision]
    )
    names = output_names(list_images(arguments.images, arguments.out))
    claim(arguments.out, _facts(arguments), arguments.overwrite)

    files = list(names)
    chunks = [files[start : start + arguments.batch] for start in range(0, len(files), arguments.batch)]
    rows: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    with tqdm(total=len(files), desc="predict", unit="image", disable=None) as bar:
        read = partial(_read, arguments.images, chunks, size, arguments.skip_bad)
        for inputs, bad in load_in_order(read, range(len(chunks)), arguments.workers):
            for one, probability in zip(inputs, probabilities(network, inputs, precision), strict=True):
                name, mask = names[one.file], probability > 0.5
                _save(np.where(mask, 255, 0).astype(np.uint8), arguments.out / MASKS / name)
                _save(overlay(one.image, mask), arguments.out / OVERLAYS / name)
                row = {"file": one.file.as_posix(), "mask": (MASKS / name).as_posix()}
                rows.append(row | measure(probability))
            skipped += bad
            bar.update(len(inputs) + len(bad))
    if not rows:
        raise UserError(f"none of {len(files)} images can be read; the first, {files[0]}, {skipped[0]['problem']}")

    if skipped:
        _write_csv(arguments.out / SKIPPED, skipped)
        print(f"predict: {len(skipped)} files skipped, see {arguments.out / SKIPPED}")
    _write_csv(arguments.out / PREDICTIONS, rows)
    lesions = sum(row["lesion"] == "yes" for row in rows)
    print(f"predict: {len(rows)} images, {lesions} with a lesion -> {arguments.out / PREDICTIONS}")


def list_images(folder: Path, out: Path) -> list[Path]:
    """Image files in `folder` and below, relative to it, sorted; hidden ones are left out.

    Raises:
        UserError: there is none, or `out` and `folder` lie within each other, so that masks could pass for images.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; --images is the folder that holds the images")
    inner, outer = folder.resolve(), out.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise UserError(f"--out {out} and --images {folder} lie within each other; give another --out")
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    found = sorted(
        file for file in files if (folder / file).is_file() and not any(part.startswith(".") for part in file.parts)
    )
    if not found:
        raise UserError(f"{folder} holds no image ({', '.join(SUFFIXES)}), in its subfolders neither")
    return found


def output_names(files: Sequence[Path]) -> dict[Path, Path]:
    """The PNG each image's mask goes to: `a.png`; where there are both a.jpg and a.bmp, `a.jpg.png` and `a.bmp.png`.

    Raises:
        UserError: two names are the same all the same.
    """
    times = Counter(file.with_suffix(".png") for file in files)
    names = {
        file: file.with_suffix(".png") if times[file.with_suffix(".png")] == 1 else file.with_name(f"{file.name}.png")
        for file in files
    }
    owners: dict[Path, Path] = {}
    for file, name in names.items():
        if name in owners:
            raise UserError(f"the masks of {owners[name]} and {file} would both be {name}; rename one of the images")
        owners[name] = file
    return names


def claim(out: Path, facts: dict[str, Any], overwrite: bool) -> None:
    """Make `out` ready: new, or emptied of earlier predictions with the same `facts` (with `overwrite`: of any).

    Raises:
        UserError: it holds predictions of other images or weights, or what is not a prediction.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; give a folder as --out")
    there = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    if there and FACTS not in there:
        raise UserError(f"{out} holds {there[0]!r} and is not a folder of predictions; give another --out")
    if there and not overwrite:
        try:
            earlier = read_json(out / FACTS)
        except ValueError as error:
            raise UserError(f"{out / FACTS} is damaged; pass --overwrite to replace the predictions there") from error
        if earlier != facts:
            raise UserError(
                f"{out} holds predictions of other images or weights ({FACTS} there says which); "
                "give another --out, or pass --overwrite to replace them"
            )
    for name in (PREDICTIONS, SKIPPED):
        (out / name).unlink(missing_ok=True)
    for name in (MASKS, OVERLAYS):
        if (out / name).exists():
            shutil.rmtree(out / name)
    write_json(out / FACTS, facts)


def ready(network: nn.Module, kernels: Kernels) -> nn.Module:
    """`network` fused, on the device, in the layout in which convolutions are fast."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return fuse(network, kernels).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def fast_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the device has instructions for it, else float32."""
    return torch.bfloat16 if has_bf16(device) else torch.float32


@torch.inference_mode()
def probabilities(
    network: nn.Module, inputs: Sequence[Input], precision: torch.dtype = torch.float32
) -> list[np.ndarray]:
    """Probability of lesion, float32 [H,W] in [0,1] at each image's own size; convolutions in `precision`."""
    if not inputs:
        return []
    device = next(network.parameters()).device
    squares = torch.from_numpy(np.stack([one.square for one in inputs]))[:, None]
    with torch.autocast(device.type, precision, enabled=precision != torch.float32):
        logits = network(scaled(squares.to(device)).contiguous(memory_format=torch.channels_last))
    found = logits.float().sigmoid()
    return [
        F.interpolate(one_found[None], one.image.shape, mode="bilinear", antialias=True)[0, 0].cpu().numpy()
        for one, one_found in zip(inputs, found, strict=True)
    ]


def measure(probability: np.ndarray) -> dict[str, Any]:
    """A row of predictions.csv from a probability [H,W], without the file's name."""
    mask = probability > 0.5
    height, width = mask.shape
    area = int(mask.sum())
    confidence = probability[mask].mean(dtype=np.float64) if area else 1 - probability.max()
    return {
        "width": width,
        "height": height,
        "area_pixels": area,
        "area_fraction": f"{area / mask.size:.6f}",
        "confidence": f"{confidence:.4f}",
        "lesion": "yes" if area else "no",
    }


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """`image` uint8 [H,W] in grey with the inner border of `mask` bool [H,W]: uint8 [H,W,3]."""
    thick = max(1, round(min(image.shape) / 250))
    outside = torch.from_numpy(~mask).float()[None]
    for kernel in ((2 * thick + 1, 1), (1, 2 * thick + 1)):
        outside = F.max_pool2d(outside, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    drawn = np.repeat(image[:, :, None], 3, axis=2)
    drawn[mask & outside[0].bool().numpy()] = CONTOUR
    return drawn


def _read(
    folder: Path, chunks: list[list[Path]], size: int, skip_bad: bool, number: int
) -> tuple[list[Input], list[dict[str, str]]]:
    """The images of a chunk, and with `skip_bad` the rows of skipped.csv."""
    inputs, skipped = [], []
    for file in chunks[number]:
        try:
            image = read_grey(folder / file)
        except BadFile as bad:
            if not skip_bad:
                raise UserError(f"{bad}; fix it or pass --skip-bad") from bad
            skipped.append({"file": file.as_posix(), "problem": bad.problem})
        else:
            inputs.append(Input(file, image, resize_image(image, size, size)))
    return inputs, skipped


def _facts(arguments: Namespace) -> dict[str, Any]:
    """What makes two predictions the same."""
    weights = (arguments.run / arguments.weights / "model.safetensors").resolve()
    return {"images": str(arguments.images.resolve()), "weights": str(weights), "weights_sha256": sha256_of(weights)}


def _save(pixels: np.ndarray, path: Path) -> None:
    with replacing(path) as scratch:
        Image.fromarray(pixels).save(scratch, format="PNG")


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_bytes(path, text.getvalue().encode(errors="surrogateescape"))  # file names need not be UTF-8


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="predict", description=__doc__, formatter_class=HelpFormatter, exit_on_error=False, allow_abbrev=False
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a segmentation run")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, with any subfolders")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; new, or of the same prediction")
    parser.add_argument(
        "--weights", choices=("best", "last"), default="best", help="best on the run's validation images, or last"
    )
    parser.add_argument("--batch", type=PositiveInt, default=8, help="images at once, as memory allows")
    parser.add_argument("--workers", type=NonNegativeInt, default=2, help="processes that read images; 0 for none")
    parser.add_argument(
        "--kernels",
        choices=("auto", "torch", "triton"),
        default="auto",
        help="forms of modules; see mgcc_dist.kernels.fuse",
    )
    parser.add_argument(
        "--precision", choices=("auto", *DTYPES), default="auto", help="bf16 where the device has it, float32, or bf16"
    )
    parser.add_argument("--skip-bad", action="store_true", help="list unreadable images in skipped.csv and go on")
    parser.add_argument("--overwrite", action="store_true", help="replace predictions of other images or weights")
    return parser


if __name__ == "__main__":
    run_program("predict", main)
