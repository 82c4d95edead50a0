"""Throughput of `predict` against the plain eager float32 network, and the share of mask pixels that differ.

    python -m benchmarks.predict --run out/runs/mgcc_1 --images Dataset_BUSI_with_GT --out predict.json

plain   the run's network as it is: eager, float32, contiguous, in batches of --batch
fast    as `predict` runs it: fused (--kernels), channels-last, bfloat16 where the device has instructions for it

Both get the same decoded images and return probabilities at each image's own size; file I/O is not timed. They are
measured alternately; each rate is the median over the rounds, and the ratio the median of the rounds' ratios. Masks are
compared pixel by pixel at the images' own sizes. Without --run the network is MGCC at the paper's size with random
weights, and masks are not compared. On a GPU the time of batch 1 in a CUDA graph is reported too.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from mgcc_dist.bench.timing import capture_graph, median_cuda_ms
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json
from mgcc_dist.data.geometry import fit_image
from mgcc_dist.data.images import read_grey
from mgcc_dist.inference.loading import load_predictor
from mgcc_dist.inference.predictor import NetworkInput, Predictor
from mgcc_dist.inference.sources import list_sources
from mgcc_dist.kernels.dispatcher import fuse
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.models.network import build_network

Pass = Callable[[list[NetworkInput]], list[np.ndarray]]


def read_inputs(folder: Path, count: int, size: int) -> list[NetworkInput]:
    """Read `count` images spread evenly over the folder, without mask files."""
    sources = [source for source in list_sources([folder], folder.parent / "nowhere") if "_mask" not in source.file]
    chosen = sources[:: max(1, len(sources) // count)][:count]
    images = [read_grey(source.path) for source in chosen]
    return [NetworkInput(image, fit_image(image, size, "stretch")) for image in images]


def in_batches(predictor: Predictor, batch: int) -> Pass:
    return lambda inputs: [
        one
        for chunk in (inputs[i : i + batch] for i in range(0, len(inputs), batch))
        for one in predictor.probabilities(chunk)
    ]


def seconds(run: Pass, inputs: list[NetworkInput]) -> float:
    started = time.perf_counter()
    run(inputs)
    return time.perf_counter() - started


def differing_pixels(plain: list[np.ndarray], fast: list[np.ndarray]) -> dict[str, float]:
    """Return the share of pixels in which the masks differ: over all images, and in the worst image."""
    wrong = [(a > 0.5) != (b > 0.5) for a, b in zip(plain, fast, strict=True)]
    return {
        "all": round(sum(int(w.sum()) for w in wrong) / sum(w.size for w in wrong), 6),
        "worst_image": round(max(float(w.mean()) for w in wrong), 6),
        "lesion_pixels": round(float(np.mean([(a > 0.5).mean() for a in plain])), 4),
    }


@torch.inference_mode()
def graph_milliseconds(network: nn.Module, size: int, precision: torch.dtype) -> float:
    """Return the median time of one image [1,1,size,size] in a CUDA graph."""
    image = torch.randn(1, 1, size, size, device="cuda")

    def forward() -> torch.Tensor:
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            return network(image)

    return round(median_cuda_ms(capture_graph([forward]).replay, repeats=100), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="folder of a segmentation run; without it, random weights")
    parser.add_argument("--images", type=Path, required=True, help="folder of images, such as BUSI as published")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--kernels", choices=("auto", "torch", "triton"), default="torch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--count", type=int, default=16, help="images per round")
    parser.add_argument("--compare", type=int, default=64, help="images whose masks are compared, with --run")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=256, help="image size without --run")
    options = parser.parse_args()

    if options.run:
        plain, size = load_predictor(options.run)
    else:
        torch.manual_seed(0)
        plain, size = build_network(MGCCConfig()).inference_module().eval(), options.size
    fused = fuse(copy.deepcopy(plain), options.kernels)
    baseline, predictor = Predictor(plain, size, precision="no"), Predictor(fused, size)
    plain.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    device, precision = predictor.device, predictor.dtype
    slow, fast = in_batches(baseline, options.batch), in_batches(predictor, options.batch)

    inputs = read_inputs(options.images, max(options.count, options.compare if options.run else 0), size)
    timed = inputs[: options.count]
    for run in (slow, fast):
        run(timed[: options.batch])
    pairs = [(seconds(slow, timed), seconds(fast, timed)) for _ in range(options.rounds)]
    ratios = sorted(s / f for s, f in pairs)
    settings = {
        "network": "trained" if options.run else "MGCC of the paper's size, random weights",
        "parameters": sum(p.numel() for p in plain.parameters()),
        "image_size": size,
        "batch": options.batch,
        "threads": torch.get_num_threads(),
        "precision": str(precision).removeprefix("torch."),
        "kernels": options.kernels,
    }
    row: dict[str, Any] = {
        "plain_images_per_second": round(len(timed) / statistics.median(s for s, _ in pairs), 3),
        "fast_images_per_second": round(len(timed) / statistics.median(f for _, f in pairs), 3),
        "ratio": round(statistics.median(ratios), 2),
        "ratio_lowest_highest": [round(ratios[0], 2), round(ratios[-1], 2)],
    }
    if options.run:
        row["images_compared"] = len(inputs)
        row["differing_pixels"] = differing_pixels(slow(inputs), fast(inputs))
    if device.type == "cuda":
        row["graph_milliseconds_batch_1"] = {
            "plain": graph_milliseconds(plain, size, torch.float32),
            "fast": graph_milliseconds(fused, size, precision),
        }
    print(row, flush=True)
    header = benchmark_header("benchmarks.predict")
    write_json(options.out, {**header, **settings, "rows": {f"batch {options.batch}": row}})
    print(f"predict: {options.out}")


if __name__ == "__main__":
    main()
