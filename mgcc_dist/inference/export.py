"""Write a trained network as ONNX, TorchScript or OpenVINO: one model with everything from image to mask.

A file is run by its own backend and compared with PyTorch before it gets its name.
"""

import logging
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mgcc_dist
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import link, scratch_folder
from mgcc_dist.common.words import counted
from mgcc_dist.inference.config import ExportConfig
from mgcc_dist.inference.export_formats import FORMATS, Format, Metadata, describe_onnx
from mgcc_dist.inference.export_graph import ExportGraph
from mgcc_dist.inference.int8 import MEASURED, ValImages, as_input, check_loss, measure, open_val_images, quantize
from mgcc_dist.inference.loading import load_network, run_info
from mgcc_dist.inference.predictor import THRESHOLD
from mgcc_dist.train.initial_weights import find_weights

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""largest difference of a probability between a backend and PyTorch, both in float32"""


def export(config: ExportConfig) -> None:
    """Export the network of a run.

    Raises:
        ModuleNotFoundError: a package of the format is not installed.
        UserError: no such run; the suffix is not the format's; the file exists and is not the same export; the network
            cannot be translated; or the backend computes something else.
    """
    form = FORMATS[config.to]
    if config.out.suffix != form.suffix:
        raise UserError(f"--out {config.out}: the suffix of {config.to} is {form.suffix}. Rename it, or change --to.")
    weights = find_weights(config.run, config.weights)
    info = run_info(weights)
    metadata = metadata_of(config, info)
    for package in form.packages:
        import_module(package)
    val = open_val_images(config, info) if config.int8 else None
    if val:
        metadata |= val.origin
    files = [config.out, *(config.out.with_suffix(suffix) for suffix in form.companions)]
    existing = [path for path in files if path.exists()]
    if existing and not config.overwrite:
        known = read_metadata(form, config.out) or {}
        if existing != files or {key: value for key, value in known.items() if key not in MEASURED} != metadata:
            raise UserError(f"--out {existing[0]}: exists and is not this export. Choose another, or use --overwrite.")
        if val:
            check_loss(known, config.max_iou_loss)
        logger.info("export: %s is up to date", config.out)
        return

    with scratch_folder(config.out) as folder:
        draft = folder / config.out.name
        difference = write_compared(weights, config.to, metadata, draft, for_int8=val is not None)
        if val:
            _quantize(draft, val, metadata, config.max_iou_loss)
        for path in sorted(folder.iterdir(), key=lambda path: path == draft):  # the file that is given last
            link(path, config.out.with_name(path.name))
    logger.info(
        "export: %s -> %s (%.1f MB; largest difference of a probability from PyTorch: %.1e)",
        *(weights, config.out, config.out.stat().st_size / 1e6, difference),
    )


def write_compared(weights: Path, to: str, metadata: Metadata, path: Path, for_int8: bool = False) -> float:
    """Write a network to a file, and return the largest difference of a probability between its backend and PyTorch.

    Raises:
        UserError: the weights can't be read or the network can't be translated, or the backend computes something else.
    """
    network, size = load_network(weights)
    form = FORMATS[to]
    winograd = form.winograd and not for_int8  # its products need more than 8 bits
    graph = ExportGraph(network, size, run_info(weights)["fit"], winograd).eval().requires_grad_(False)
    form.write(graph, torch.from_numpy(example_images(2, size + 3, size + 5)), metadata, path)
    return _compare(graph, to, path, example_images(1, size + 9, max(size - 7, 1)))


def _quantize(path: Path, val: ValImages, metadata: Metadata, max_iou_loss: float) -> None:
    """Replace a float32 ONNX file by its INT8 form, which says what it costs.

    Raises:
        UserError: it costs too much.
    """
    float32 = path.rename(path.with_name("float32.onnx"))
    quantize(float32, path, [as_input(sample.image) for sample in val.samples])
    measured = measure(float32, path, val)
    float32.unlink()
    logger.info(
        "export: IoU of %s: %s in float32, %s in INT8; %.2f %% of the pixels differ",
        *(counted(int(measured["int8_images"]), "validation image"), measured["float32_iou"], measured["int8_iou"]),
        100 * float(measured["int8_differing_pixels"]),
    )
    check_loss(measured, max_iou_loss)
    describe_onnx(path, metadata | measured)


def _compare(graph: ExportGraph, to: str, path: Path, images: np.ndarray) -> float:
    """Return the largest difference of a probability between a file in its backend and the graph in PyTorch.

    Raises:
        UserError: it is above TOLERANCE.
    """
    with torch.no_grad():
        _, expected = graph(torch.from_numpy(images))
    _, found = FORMATS[to].open(path)(images)
    difference = float(np.abs(found - expected.numpy()).max())
    if not difference <= TOLERANCE:  # also if it is not a number
        raise UserError(
            f"--to {to}: the exported file's probabilities differ by {difference:.2g} from PyTorch's. Use another --to."
        )
    return difference


def example_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def read_metadata(form: Format, path: Path) -> Metadata | None:
    """Return what a file says about itself; None if it is not a model of this format."""
    try:
        return form.read(path)
    except OSError:
        raise
    except Exception:  # every library has its own, for a damaged file or one of another kind
        return None


def metadata_of(config: ExportConfig, info: dict[str, Any]) -> Metadata:
    """Return what the file says about itself."""
    known = {key: info[key] for key in ("method", "weights_sha256", "image_size", "fit")}
    known |= {key: info[key] for key in ("dataset", "split", "seed", "commit") if info.get(key) is not None}
    return {key: str(value) for key, value in known.items()} | {
        "run": config.run.resolve().name,
        "weights": config.weights,
        "network": info["network"]["name"],
        "threshold": str(THRESHOLD),
        "version": mgcc_dist.__version__,
        "use": "research use only; not a medical device",
    }
