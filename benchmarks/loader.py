"""Throughput of the shard loader against a plain folder loader like that of the paper's released code.

    python -m benchmarks.loader --root Dataset_BUSI_with_GT --out benchmarks/results/loader.json

plain   torch's DataLoader over the published files: decode image and mask, convert to RGB, resize to 256x256, rotate,
        flip, normalise; again in every epoch.
shards  the package's StreamLoader over shards written once at 256x256 (that time is reported too): in the first epoch,
        which decodes the records, and after EPOCHS epochs, when nearly all of them are cached in every process.

Both yield augmented float32 batches of eight images with masks to one consumer that does nothing with them. The two are
measured alternately; each rate is the median over the rounds, and the ratio the median of the rounds' ratios.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.loader import ImageTrainLoader, Ranks, Stream, StreamOffsets
from mgcc_dist.data.readers.busi import busi
from mgcc_dist.data.records import ShardFolder

SIZE, BATCH = 256, 8
EPOCHS = 8


class Folder(Dataset):
    """Image and mask files, decoded on every access."""

    def __init__(self, root: Path) -> None:
        self.files = [(item.image, item.masks[0]) for item in busi(root).items]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        image, mask = (Image.open(path) for path in self.files[i])
        pixels = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)
        labels = np.asarray(mask.convert("L").resize((SIZE, SIZE), Image.Resampling.NEAREST), np.float32)
        turns, flip = int(torch.randint(4, ())), bool(torch.randint(2, ()))
        pixels, labels = np.rot90(pixels, turns), np.rot90(labels, turns)
        if flip:
            pixels, labels = np.fliplr(pixels), np.fliplr(labels)
        normalized = (pixels / 255 - 0.5) / 0.5
        return torch.from_numpy(np.ascontiguousarray(normalized.transpose(2, 0, 1))), torch.from_numpy(labels / 255)


def plain(root: Path, workers: int) -> Iterator[object]:
    loader = DataLoader(Folder(root), batch_size=BATCH, shuffle=True, drop_last=True, num_workers=workers)
    while True:
        yield from loader


def sharded(folder: ShardFolder, workers: int) -> Iterator[object]:
    images = Stream(folder, BATCH)
    loader = ImageTrainLoader(
        images, None, image_size=SIZE, seed=0, ranks=Ranks(), workers=workers, augment="symmetries"
    )
    return (batch.to("cpu") for batch, _ in loader.batches(StreamOffsets()))


def samples_per_second(batches: Iterator[object], count: int) -> float:
    next(batches)  # starts the workers
    started = time.perf_counter()
    for _ in itertools.islice(batches, count):
        pass
    return count * BATCH / (time.perf_counter() - started)


def compared(pairs: list[tuple[float, float]]) -> dict[str, object]:
    """Return the result row for (plain, shards) samples per second of each round."""
    ratios = sorted(fast / slow for slow, fast in pairs)
    return {
        "plain_samples_per_second": round(statistics.median(slow for slow, _ in pairs), 1),
        "shards_samples_per_second": round(statistics.median(fast for _, fast in pairs), 1),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_lowest_highest": [round(ratios[0], 2), round(ratios[-1], 2)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="BUSI as published")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=60, help="batches per round and loader")
    options = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        folder = write_shards(busi(options.root), Path(scratch) / "shards", size=SIZE)
        rows = {}
        written = time.perf_counter() - started
        for workers in (0, 1, 2):
            first, later = [], []
            decoded = sharded(folder, workers)
            for _ in itertools.islice(decoded, EPOCHS * len(folder) // BATCH):
                pass
            for _ in range(options.rounds):
                slow = samples_per_second(plain(options.root, workers), options.batches)
                first.append((slow, samples_per_second(sharded(folder, workers), options.batches)))
                later.append((slow, samples_per_second(decoded, 5 * options.batches)))
            for name, pairs in (("first epoch", first), ("later epochs", later)):
                rows[f"{workers} workers, {name}"] = compared(pairs)
                print(f"{workers} workers, {name}: {rows[f'{workers} workers, {name}']}", flush=True)
    header = benchmark_header("benchmarks.loader")
    write_json(options.out, {**header, "seconds_to_write_shards": round(written, 1), "rows": rows})
    print(f"loader: {options.out}")


if __name__ == "__main__":
    main()
