"""Predict with an exported network instead of PyTorch: `mgcc predict --backend`."""

import logging
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.common.finite import require_finite
from mgcc_dist.inference.config import PredictConfig
from mgcc_dist.inference.export import read_metadata, write_compared
from mgcc_dist.inference.export_formats import FORMATS, Run
from mgcc_dist.inference.predictor import THRESHOLD, Predictor

logger = logging.getLogger("mgcc_dist.predict")

PACKAGES = {name: {*FORMATS["onnx"].packages, *FORMATS[name].packages} for name in ("onnx", "openvino")}
"""what each backend needs: both get an ONNX file"""
AUTO_IMAGES = 100
"""images from which `auto` exports the network, which takes seconds"""
SPEEDUP = 1.2
"""how much faster than PyTorch `auto` wants a backend to be"""
DIFFERING = 0.005
"""share of the masks' pixels that may differ then"""
ROUNDS = 3


class ExportedPredictor(Predictor):
    """A predictor whose network runs in another backend, on the CPU and in the precision of the exported file.

    Args:
        predictor: that of PyTorch.
        open_file: is called before the first prediction, because to export a network takes seconds.
    """

    def __init__(self, predictor: Predictor, open_file: Callable[[], Run]) -> None:
        super().__init__(predictor.network, predictor.image_size, predictor.info, "cpu", "no", predictor.fit)
        self._open_file = open_file

    @cached_property
    def run(self) -> Run:
        return self._open_file()

    def squares(self, squares: Sequence[np.ndarray], names: Sequence[object] | None = None) -> list[Tensor]:
        """As `Predictor.squares`. The graph's own resizing leaves squares as they are."""
        if not squares:
            return []
        probability = torch.from_numpy(self.run(np.repeat(np.stack(squares)[..., None], 3, axis=3))[1])
        require_finite(probability, "network", names or range(len(squares)), "Use --backend torch.")
        return list(probability)


class FastestPredictor(Predictor):
    """Predicts by PyTorch or a faster backend, and decides by timing them on the first images."""

    def __init__(self, predictor: Predictor, backends: Sequence[str]) -> None:
        super().__init__(
            *(predictor.network, predictor.image_size, predictor.info),
            *(predictor.device, predictor.precision, predictor.fit),
        )
        self.predictor, self.backends = predictor, backends
        self.chosen: Predictor | None = None

    def squares(self, squares: Sequence[np.ndarray], names: Sequence[object] | None = None) -> list[Tensor]:
        if not self.chosen and squares:
            try:
                self.chosen = choose(self.predictor, export_and_open(self.predictor, self.backends), squares)
            except UserError as error:
                logger.warning("predict: --backend auto uses PyTorch: %s", error)
                self.chosen = self.predictor
        return (self.chosen or self.predictor).squares(squares, names)


def open_backend(config: PredictConfig, predictor: Predictor, images: int) -> tuple[Predictor, str | None]:
    """Return the predictor that `--backend` names, and the sha256 of an INT8 file, whose masks are others.

    Args:
        predictor: that of PyTorch.
        images: how many will be predicted.

    Raises:
        ModuleNotFoundError: a package of the backend is not installed.
        UserError: there is no such backend or file, or it is of other weights.
    """
    name = config.backend
    if name == "torch":
        return predictor, None
    if config.precision == "bf16":
        raise UserError(f"--precision bf16: is for --backend torch. Leave it out, or leave out --backend {name}.")
    if name in PACKAGES:
        for package in PACKAGES[name]:
            import_module(package)
        return ExportedPredictor(predictor, lambda: export_and_open(predictor, [name])[name]), None
    if name != "auto":
        return _open_file(Path(name), predictor)
    installed = [name for name in PACKAGES if all(map(find_spec, PACKAGES[name]))]
    reason = ""
    if predictor.device.type != "cpu":
        reason = f"the network is on {predictor.device}"
    elif not installed:
        reason = "neither ONNX Runtime nor OpenVINO is installed (pip install 'mgcc-dist[export]')"
    elif images < AUTO_IMAGES:
        reason = f"it exports the network only for {AUTO_IMAGES} images and more"
    if reason:
        logger.info("predict: --backend auto uses PyTorch: %s", reason)
        return predictor, None
    return FastestPredictor(predictor, installed), None


def export_and_open(predictor: Predictor, backends: Sequence[str]) -> dict[str, Run]:
    """Export a predictor's network, and open it in each of `backends`: onnx, openvino."""
    logger.info("predict: exporting the network. To do this once, use `mgcc export` and --backend FILE.")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        write_compared(Path(predictor.info["weights"]), "onnx", {}, path)
        return {name: FORMATS[name].open(path) for name in backends}


def choose(predictor: Predictor, runs: dict[str, Run], squares: Sequence[np.ndarray]) -> Predictor:
    """Return the fastest of `runs` if it is SPEEDUP times as fast as PyTorch, with equal masks; else `predictor`."""
    others = {name: ExportedPredictor(predictor, partial(lambda run: run, run)) for name, run in runs.items()}
    everyone: dict[str, Predictor] = {"PyTorch": predictor, **others}
    outputs = {name: torch.stack(each.squares(squares)).cpu() for name, each in everyone.items()}
    seconds = dict.fromkeys(everyone, float("inf"))
    for _ in range(ROUNDS):
        for name, each in everyone.items():
            started = time.perf_counter()
            each.squares(squares)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    masks = {name: output > THRESHOLD for name, output in outputs.items()}
    name = min(others, key=lambda name: seconds[name])
    speedup = seconds["PyTorch"] / seconds[name]
    differing = float((masks[name] != masks["PyTorch"]).float().mean())
    good = speedup >= SPEEDUP and differing <= DIFFERING
    logger.info(
        "predict: --backend auto uses %s: on the first %d images %s is %.2f times as fast and %.2f %% of pixels differ",
        *(name if good else "PyTorch", len(squares), name, speedup, 100 * differing),
    )
    return others[name] if good else predictor


def _open_file(path: Path, predictor: Predictor) -> tuple[Predictor, str | None]:
    formats = {form.suffix: form for form in FORMATS.values()}
    if path.suffix not in formats or not path.is_file():
        raise UserError(
            f"--backend {path}: is not torch, onnx, openvino, auto or a file of `mgcc export` ({', '.join(formats)})"
        )
    form = formats[path.suffix]
    metadata = read_metadata(form, path)
    if metadata is None:
        raise UserError(f"--backend {path}: can't be read. Export it again.")
    if metadata.get("weights_sha256") != predictor.info["weights_sha256"]:
        raise UserError(f"--backend {path}: is of other weights than {predictor.info['weights']}. Export these.")
    return ExportedPredictor(predictor, partial(form.open, path)), sha256_of(path) if "precision" in metadata else None
