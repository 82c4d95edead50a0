"""Recall and precision of the memorisation audit on planted near-copies.

    python -m benchmarks.audit --shards out/busi_128 --encoder out/runs/unet_1 --out benchmarks/results/audit.json

Applies every change of CHANGES to `--images` training images, adds the val images that have no near-duplicate in
training, and runs the audit of `mgcc_dist.ldm` on all of them. Recall is the share of copies that the audit lists.
Precision is the share of copies among the listed images, for a mixture of as many copies as val images. Without an
encoder only pixels are compared.
"""

import argparse
import io
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.compare import markdown_table
from mgcc_dist.assessment import features
from mgcc_dist.assessment.audit import audit
from mgcc_dist.assessment.config import AuditConfig
from mgcc_dist.common.distributed import create_accelerator
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json
from mgcc_dist.data.images import resize_image
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import locate_split, read_split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData

Change = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def rotated(image: np.ndarray, degrees: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BICUBIC))


def noisy(image: np.ndarray, sigma: float, generator: np.random.Generator) -> np.ndarray:
    return np.clip(image + generator.normal(0, sigma, image.shape), 0, 255).astype(np.uint8)


def as_jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


def enlarged(image: np.ndarray, factor: float) -> np.ndarray:
    """Crop the centre of `image` [S,S] and resize it to the full size."""
    side = len(image)
    cut = round(side * (1 - 1 / factor) / 2)
    middle = Image.fromarray(image[cut : side - cut, cut : side - cut])
    return np.asarray(middle.resize((side, side), Image.Resampling.BICUBIC))


def blurred(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


# For 128 x 128 images: noise in grey levels, rotations in degrees, shifts and blur in pixels.
CHANGES: dict[str, Change] = {
    "exact": lambda image, _: image,
    "mirrored": lambda image, _: image[:, ::-1],
    "upside down": lambda image, _: image[::-1],
    "quarter turn": lambda image, _: np.rot90(image),
    "noise 20": lambda image, generator: noisy(image, 20, generator),
    "rotated 3": lambda image, _: rotated(image, 3),
    "rotated 8": lambda image, _: rotated(image, 8),
    "JPEG 20": lambda image, _: as_jpeg(image, 20),
    "brighter": lambda image, _: np.clip(image * 1.3 + 10.0, 0, 255).astype(np.uint8),
    "several": lambda image, generator: as_jpeg(rotated(noisy(image[:, ::-1], 10, generator), 4), 40),
    "noise 40": lambda image, generator: noisy(image, 40, generator),
    "blurred 2": lambda image, _: blurred(image, 2),
    "enlarged 10 %": lambda image, _: enlarged(image, 1.1),
    "moved 16": lambda image, _: np.roll(image, 16, axis=1),
    "rotated 12": lambda image, _: rotated(image, 12),
    "enlarged 20 %": lambda image, _: enlarged(image, 1.2),
}
TARGETS = tuple(CHANGES)[:10]  # the audit should find these; the others show its limits


def plant(images: ImageData, count: int, folder: Path) -> dict[str, str]:
    """Write copies and val images as a folder of samples; return the change of each key, "" for val images."""
    generator = np.random.default_rng(0)
    chosen = generator.permutation(len(images.train))[:count].tolist()
    train_groups = {images.shards.records[i].group for i in images.train.indices}
    samples: list[Sample] = []
    change_of = {}
    for name, change in CHANGES.items():
        for number, i in enumerate(chosen):
            key = f"{name} {number}"
            image = resize_image(images.train[i].image, images.size, images.size)
            samples.append(Sample(key, np.ascontiguousarray(change(image, generator)), None, {}))
            change_of[key] = name
    for i in images.val.indices:
        if images.shards.records[i].group not in train_groups:
            key = f"val {len(samples)}"
            samples.append(Sample(key, images.shards[i].image, None, {}))
            change_of[key] = ""
    folder.mkdir(parents=True)
    write_json(folder / "request.json", {})
    write_index(folder, "synthetic", [write_shard(folder / "planted-000000.tar", samples)], request={"planted": count})
    return change_of


def rates(listed: set[str], change_of: dict[str, str]) -> dict[str, Any]:
    """Return precision and recall on TARGETS, the share of val images that are listed, and recall by change."""

    def share(names: tuple[str, ...]) -> float:
        keys = [key for key, name in change_of.items() if name in names]
        return sum(key in listed for key in keys) / len(keys)

    recall, false_positives = share(TARGETS), share(("",))
    return {
        "precision": round(recall / (recall + false_positives), 4),
        "recall": round(recall, 4),
        "false_positive_rate": round(false_positives, 4),
        "by_change": {name: round(share((name,)), 4) for name in CHANGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=Path, required=True, help="shard folder of the real images")
    parser.add_argument("--split", default="busi_random_1", help="split file or name (default: busi_random_1)")
    parser.add_argument("--size", type=int, default=128, help="image side in pixels (default: 128)")
    parser.add_argument("--encoder", help="feature extractor, as quality.encoder of mgcc_dist.ldm")
    parser.add_argument("--images", type=int, default=100, help="training images to copy (default: 100)")
    parser.add_argument("--false-alarms", type=float, default=0.01, help="as audit.false_alarms (default: 0.01)")
    parser.add_argument("--pictures", help="folder for the audit's pictures")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    options = parser.parse_args()

    accelerator = create_accelerator()
    split = read_split(locate_split(options.split))
    images = ImageData(DataConfig(image_size=options.size), ShardFolder.open(options.shards), split)
    encoder = features.load(options.encoder, Path(), options.size) if options.encoder else None
    with tempfile.TemporaryDirectory() as scratch:
        samples, folder = Path(scratch) / "samples", Path(scratch) / "audit"
        change_of = plant(images, options.images, samples)
        config = AuditConfig(false_alarms=options.false_alarms)
        report = audit(config, None, images, samples, folder, accelerator)
        listed = {"pixels only": set(report["near_copies"])}
        thresholds = {"pixels only": report["threshold"]}
        if encoder:
            report = audit(config, encoder, images, samples, folder, accelerator)
            both = {"pixels": report["threshold"], "features": report["features"]["threshold"]}
            similarity = {row["key"]: (row["similarity"], row["features"]["similarity"]) for row in report["images"]}
            for index, (criterion, threshold) in enumerate(both.items()):
                listed[criterion] = {key for key, values in similarity.items() if values[index] > threshold}
            listed["either"] = set(report["near_copies"])
            thresholds |= both
        if options.pictures:
            shutil.copytree(folder, options.pictures, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.json"))
    val = sum(name == "" for name in change_of.values())
    result = benchmark_header("benchmarks.audit") | {
        "images": {"train": len(images.train), "copied": options.images, "val": val, "size": options.size},
        "encoder": encoder.info if encoder else None,
        "false_alarms": options.false_alarms,
        "thresholds": thresholds,
        "rows": {criterion: rates(keys, change_of) for criterion, keys in listed.items()},
    }
    write_json(options.out, result)
    print(table(result))


def table(result: dict[str, Any]) -> str:
    """Return the result as Markdown, one column per criterion; (*) marks changes the audit need not find."""
    rows = result["rows"]
    cells = [
        [name.replace("_", " "), *(f"{row[name]:.3f}" for row in rows.values())]
        for name in ("recall", "precision", "false_positive_rate")
    ]
    for change in CHANGES:
        label = change if change in TARGETS else f"{change} (*)"
        cells.append([label, *(f"{row['by_change'][change]:.2f}" for row in rows.values())])
    return markdown_table(["", *rows], cells, "---:")


if __name__ == "__main__":
    main()
