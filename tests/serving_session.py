"""A session of `mgcc serve` with a stand-in for a network, for tests."""

import io

import numpy as np
from PIL import Image
from predict_runs import SIZE, Threshold

from mgcc_dist.inference.predictor import Predictor
from mgcc_dist.inference.sources import list_sources
from mgcc_dist.inference.uncertainty import Members
from mgcc_dist.serving.corrections import Corrections
from mgcc_dist.serving.predictions import Segmenter
from mgcc_dist.serving.queue import Queue
from mgcc_dist.serving.session import Session

TOKEN = "a-token"


def blob(level=200, size=SIZE, left=8):
    """A dark image with a square of 16 pixels on a side, which `Threshold` takes for the lesion."""
    image = np.full((size, size), 20, np.uint8)
    image[8:24, left : left + 16] = level
    return image


def png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def segmenter():
    network = Threshold()
    predictor = Predictor(network, SIZE, {"weights_sha256": "abc", "network": {"name": "threshold"}}, "cpu", "no")
    return Segmenter(predictor, Members([predictor], flips=True), "tta")


def open_session(out, images=(), order="name"):
    model, corrections = segmenter(), Corrections(out)
    sources = list_sources(list(images), out) if images else []
    return Session(model, corrections, Queue(sources, corrections, model, None, None, order == "uncertainty"))
