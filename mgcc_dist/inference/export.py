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
from mgcc_dist.inference.config import ExportConfig
from mgcc_dist.inference.export_formats import FORMATS, Format, Metadata
from mgcc_dist.inference.export_graph import ExportGraph
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
    network, image_size = load_network(weights)
    info = run_info(weights)
    metadata = metadata_of(config, info)
    for package in form.packages:
        import_module(package)
    files = [config.out, *(config.out.with_suffix(suffix) for suffix in form.companions)]
    existing = [path for path in files if path.exists()]
    if existing and not config.overwrite:
        if existing != files or _read(form, config.out) != metadata:
            raise UserError(f"--out {existing[0]}: exists and is not this export. Choose another, or use --overwrite.")
        logger.info("export: %s is up to date", config.out)
        return

    graph = ExportGraph(network, image_size, info["fit"]).eval().requires_grad_(False)
    with scratch_folder(config.out) as folder:
        draft = folder / config.out.name
        form.write(graph, torch.from_numpy(example_images(2, image_size + 3, image_size + 5)), metadata, draft)
        difference = _compare(graph, config.to, draft, example_images(1, image_size + 9, max(image_size - 7, 1)))
        for path in sorted(folder.iterdir(), key=lambda path: path == draft):  # the file that is given last
            link(path, config.out.with_name(path.name))
    logger.info(
        "export: %s -> %s (%.1f MB; largest difference of a probability from PyTorch: %.1e)",
        *(weights, config.out, config.out.stat().st_size / 1e6, difference),
    )


def _compare(graph: ExportGraph, to: str, path: Path, images: np.ndarray) -> float:
    """Return the largest difference of a probability between a file in its backend and the graph in PyTorch.

    Raises:
        UserError: it is above TOLERANCE.
    """
    with torch.no_grad():
        _, expected = graph(torch.from_numpy(images))
    _, found = FORMATS[to].run(path, images)
    difference = float(np.abs(found - expected.numpy()).max())
    if not difference <= TOLERANCE:  # also if it is not a number
        raise UserError(
            f"--to {to}: the exported file's probabilities differ by {difference:.2g} from PyTorch's. Use another --to."
        )
    return difference


def example_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def _read(form: Format, path: Path) -> Metadata | None:
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
