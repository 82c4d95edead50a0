"""Helpers of the tests of `mgcc predict`: runs with random weights, images, and what a prediction wrote."""

import csv

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from mgcc_dist.inference.loading import header
from mgcc_dist.methods.config import SupervisedConfig
from mgcc_dist.methods.method import build
from mgcc_dist.models.config import UNetConfig
from mgcc_dist.predict import main
from mgcc_dist.train.weights_file import save_weights

SIZE = 32


def save_run(folder, seed=0, fit="stretch", network=None):
    """A run folder with tiny networks of random weights."""
    torch.manual_seed(seed)
    method, network = SupervisedConfig(), network or UNetConfig(widths=(2, 4))
    for which in ("best", "last"):
        weights = build(method, network).predictor().state_dict()
        for name in weights:
            if name.endswith("head.bias"):
                weights[name].zero_()
        save_weights(weights, folder / which / "model.safetensors", header(method, network, SIZE, fit))
    return folder


def save_with_checkpoint(folder, method, network):
    """A run folder whose newest checkpoint has the network's decoders; `best` is of another step."""
    torch.manual_seed(0)
    trained = build(method, network)
    checkpoint = folder / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    Accelerator(cpu=True).save_model(trained, checkpoint)
    for which, state in (("last", trained.predictor()), ("best", build(method, network).predictor())):
        save_weights(state.state_dict(), folder / which / "model.safetensors", header(method, network, SIZE))
    return trained


class Threshold(nn.Module):
    """Stand-in for a trained network: everything brighter than middle grey is a lesion."""

    def __init__(self, gain=20.0, bias=0.0):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.tensor(gain)), bias

    def forward(self, x):
        assert x.shape[1:] == (1, SIZE, SIZE)
        return self.gain * x + self.bias


def predict(run, images, *options, workers=0):
    out = run.parent / "out"
    inputs = map(str, images if isinstance(images, list) else [images])
    main(["--run", str(run), "--images", *inputs, "--out", str(out), "--workers", str(workers), *options])
    return out


def read_csv(path):
    with path.open(newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def noise(width, height, channels=None):
    shape = (height, width) if channels is None else (height, width, channels)
    return np.random.default_rng(width).integers(0, 256, shape, dtype=np.uint8)


def bytes_in(folder):
    return {name: (folder / name).read_bytes() for name in files_in(folder)}
