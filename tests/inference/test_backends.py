"""`mgcc predict --backend`: the masks are those of PyTorch, and `auto` takes another backend only if it pays."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from predict_runs import SIZE, Threshold

from mgcc_dist.common.errors import UserError
from mgcc_dist.inference import backends
from mgcc_dist.inference.config import PredictConfig
from mgcc_dist.inference.predictor import Predictor

SQUARES = [np.random.default_rng(index).integers(0, 256, (SIZE, SIZE), dtype=np.uint8) for index in range(3)]
CONFIG = PredictConfig(images=("images",), run=Path("run"))


class Clock:
    """A clock that only the backends move."""

    now = 0.0

    def perf_counter(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(backends, "time", clock)
    return clock


@pytest.fixture
def predictor(clock, monkeypatch):
    """In PyTorch; takes 3 s per batch."""
    predictor = Predictor(Threshold(), SIZE, {"weights": "w"}, device="cpu", precision="no")
    plain = predictor.squares

    def squares(*words):
        clock.now += 3
        return plain(*words)

    monkeypatch.setattr(predictor, "squares", squares)
    return predictor


def backend(clock, seconds, wrong=0.0):
    """One that takes `seconds` per batch, and whose masks are wrong in a share of the pixels."""

    def run(images):
        assert images.shape[1:] == (SIZE, SIZE, 3)
        clock.now += seconds
        probability = torch.sigmoid(20 * (torch.from_numpy(images[..., 0]).float() / 127.5 - 1)).numpy()
        flat = probability.reshape(-1)
        count = round(wrong * flat.size)
        flat[:count] = 1 - flat[:count]
        return probability > 0.5, probability

    return run


@pytest.mark.parametrize(
    ("runs", "chosen"),
    [
        ({"onnx": (2, 0), "openvino": (1, 0)}, "openvino"),
        ({"onnx": (2, 0), "openvino": (2.9, 0)}, "onnx"),
        ({"onnx": (2.6, 0)}, "PyTorch"),
        ({"onnx": (2.4, 0.004)}, "onnx"),
        ({"onnx": (1, 0.006)}, "PyTorch"),
    ],
)
def test_auto_takes_the_fastest_that_is_a_fifth_faster_with_equal_masks(
    predictor, clock, monkeypatch, caplog, runs, chosen
):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(
        backends, "export_and_open", lambda _, names: {name: backend(clock, *runs[name]) for name in names}
    )
    fastest = backends.FastestPredictor(predictor, list(runs))
    first = fastest.squares(SQUARES)
    assert f"--backend auto uses {chosen}: on the first 3 images " in caplog.text
    expected = torch.stack(predictor.squares(SQUARES)) > 0.5
    assert ((torch.stack(first) > 0.5) != expected).float().mean() <= 0.005
    started = clock.now
    fastest.squares(SQUARES)
    assert clock.now - started == pytest.approx(({"PyTorch": (3, 0)} | runs)[chosen][0])
    assert caplog.text.count("--backend auto") == 1


@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        (
            {"backend": "tensorrt"},
            1,
            r"--backend tensorrt: is not torch, onnx, openvino, auto or a file of",
        ),
        ({"backend": "onnx", "precision": "bf16"}, 1, r"--precision bf16: is for --backend torch"),
    ],
)
def test_backends_that_cannot_be_are_refused(predictor, options, images, message):
    with pytest.raises(UserError, match=message):
        backends.open_backend(replace(CONFIG, **options), predictor, images)


def test_auto_predicts_what_cannot_be_exported_by_pytorch(predictor, monkeypatch, caplog):
    def fail(*_):
        raise UserError("--to onnx: PyTorch can't translate this network")

    monkeypatch.setattr(backends, "write_compared", fail)
    fastest = backends.FastestPredictor(predictor, ["onnx"])
    torch.testing.assert_close(fastest.squares(SQUARES), predictor.squares(SQUARES))
    assert "--backend auto uses PyTorch: --to onnx: PyTorch can't translate" in caplog.text
    fastest.squares(SQUARES)
    assert caplog.text.count("--backend auto") == 1


def test_auto_exports_for_many_images_only(predictor, caplog):
    caplog.set_level(logging.INFO)
    config = replace(CONFIG, backend="auto")
    assert backends.open_backend(config, predictor, 99) == (predictor, None)
    assert "--backend auto uses PyTorch: it exports the network only for 100 images and more" in caplog.text
    assert isinstance(backends.open_backend(config, predictor, 100)[0], backends.FastestPredictor)
