"""Milliseconds per image of the backends of `mgcc export`, against the eager network and the package's fast path.

    python -m benchmarks.export_backends --threads 2 --out export_backends.json

eager         the network as it is: float32, contiguous
fast          as `mgcc predict --precision no` runs it: phase up-convolutions with BN folded in, channels-last
onnx          the exported file in ONNX Runtime
torchscript   the exported file in PyTorch
openvino      the ONNX file in OpenVINO, float32, latency mode

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json
from mgcc_dist.inference.export_formats import FORMATS
from mgcc_dist.inference.export_graph import ExportGraph
from mgcc_dist.inference.predictor import Predictor
from mgcc_dist.kernels.dispatcher import fuse
from mgcc_dist.models.config import MGCCConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.models.unet import PAPER_WIDTHS

Run = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
"""images uint8 [1,S,S,3] -> mask, probability"""


def in_pytorch(predictor: Predictor) -> Run:
    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mask, probability = predictor.predict(images[0])
        return mask[None], probability[None]

    return run


def in_onnxruntime(path: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: tuple(session.run(["mask", "probability"], {"images": images}))


def in_torchscript(path: Path) -> Run:
    module = torch.jit.load(path)

    @torch.inference_mode()
    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        mask, probability = module(torch.from_numpy(images))
        return mask.numpy(), probability.numpy()

    return run


def in_openvino(path: Path, threads: int) -> Run:
    import openvino

    hints = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().compile_model(path, "CPU", hints)

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = model(images)
        return found["mask"], found["probability"]

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
    graph = ExportGraph(network, options.size, "stretch").eval().requires_grad_(False)
    example = torch.from_numpy(np.zeros((2, options.size, options.size + 1, 3), np.uint8))
    with tempfile.TemporaryDirectory() as folder:
        onnx, script = Path(folder) / "mgcc.onnx", Path(folder) / "mgcc.pt"
        FORMATS["torchscript"].write(graph, example, {}, script)
        FORMATS["onnx"].write(graph, example, {}, onnx)
        runs["onnx"] = in_onnxruntime(onnx, options.threads)
        runs["torchscript"] = in_torchscript(script)
        runs["openvino"] = in_openvino(onnx, options.threads)
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
        "precision": "float32",
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
