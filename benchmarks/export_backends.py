"""Milliseconds per image of the backends of `mgcc export`, against the eager network and the package's fast path.

    python -m benchmarks.export_backends --threads 2 --out export_backends.json

eager         the network as it is: float32, contiguous
fast          as `mgcc predict --precision no` runs it: phase up-convolutions with BN folded in, channels-last
onnx          the exported file in ONNX Runtime
torchscript   the exported file in PyTorch
openvino      the ONNX file in OpenVINO, float32, latency mode
onnx_int8, openvino_int8   the file of `mgcc export --int8`, in both

All take one uint8 image of the network's input size and return mask and probability, so no resizing is timed that the
others do not do. They are measured alternately in one process; each time is the median over the rounds. The network is
MGCC at the paper's size (or --widths) with random weights; `differing_pixels` is the share of mask pixels that differ
from eager.
"""

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json
from mgcc_dist.inference.export_formats import FORMATS, Run, open_onnx, open_openvino
from mgcc_dist.inference.export_graph import ExportGraph
from mgcc_dist.inference.int8 import quantize
from mgcc_dist.inference.predictor import Predictor
from mgcc_dist.kernels.dispatcher import fuse
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.models.unet import PAPER_WIDTHS


def in_pytorch(predictor: Predictor) -> Run:
    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mask, probability = predictor.predict(images[0])
        return mask[None], probability[None]

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--size", type=int, default=256, help="side of the image")
    parser.add_argument("--widths", type=int, nargs="+", default=PAPER_WIDTHS, help="channels per level")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--note", help="text to keep with the result, such as what else the machine did")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    network = build_network(MGCCConfig(widths=tuple(options.widths))).inference_module().eval().requires_grad_(False)
    grey = np.random.default_rng(0).integers(0, 256, (1, options.size, options.size, 1), dtype=np.uint8)
    images = np.repeat(grey, 3, axis=3)
    eager = Predictor(copy.deepcopy(network), options.size, device="cpu", precision="no")
    eager.network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    runs = {
        "eager": in_pytorch(eager),
        "fast": in_pytorch(
            Predictor(fuse(copy.deepcopy(network), "torch"), options.size, device="cpu", precision="no")
        ),
    }
    example = torch.from_numpy(np.zeros((2, options.size, options.size + 1, 3), np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / name for name in ("onnx", "torchscript", "float32", "int8")}
        formats = {"torchscript": ("torchscript", False), "float32": ("onnx", False), "onnx": ("onnx", True)}
        for name, (to, winograd) in formats.items():
            graph = ExportGraph(copy.deepcopy(network), options.size, "stretch", winograd).eval().requires_grad_(False)
            FORMATS[to].write(graph, example, {}, files[name])
        quantize(files["float32"], files["int8"], [images])
        runs |= {to: FORMATS[to].open(files[to]) for to in ("onnx", "torchscript")}
        runs |= {"openvino": open_openvino(files["onnx"])}
        runs |= {"onnx_int8": open_onnx(files["int8"]), "openvino_int8": open_openvino(files["int8"])}
        outputs = {name: run(images) for name, run in runs.items()}  # warms up
        for run in runs.values():
            run(images)
        rows = measure(runs, images, options.rounds)
    for name, row in rows.items():
        row["differing_pixels"] = round(float((outputs[name][0] != outputs["eager"][0]).mean()), 6)
        row["largest_difference"] = float(f"{np.abs(outputs[name][1] - outputs['eager'][1]).max():.2g}")
        print(name, row, flush=True)
    settings = {
        "network": f"MGCC {tuple(options.widths)}, random weights",
        "parameters": sum(parameter.numel() for parameter in eager.network.parameters()),
        "image_size": options.size,
        "batch": 1,
        "threads": options.threads,
        "precision": "float32, or INT8 where the name says so",
        "rounds": options.rounds,
    }
    settings |= {"note": options.note} if options.note else {}
    header = benchmark_header("benchmarks.export_backends", torch.device("cpu"))
    write_json(options.out, {**header, **settings, "rows": rows})
    print(f"export_backends: {options.out}")


def measure(runs: dict[str, Run], images: np.ndarray, rounds: int) -> dict[str, dict[str, Any]]:
    """Return the median time of each backend, and the median over the rounds of its ratio to eager."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run(images)
            seconds[name].append(time.perf_counter() - started)
    return {
        name: {
            "milliseconds": round(1000 * statistics.median(times), 1),
            "milliseconds_lowest": round(1000 * min(times), 1),
            "speedup": round(statistics.median(e / t for e, t in zip(seconds["eager"], times, strict=True)), 2),
        }
        for name, times in seconds.items()
    }


if __name__ == "__main__":
    main()
