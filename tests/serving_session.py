"""A session of `mgcc serve` with a stand-in for a network, for tests."""

import io
from urllib.parse import quote

import numpy as np
from PIL import Image
from predict_runs import SIZE, Threshold
from starlette.testclient import TestClient

from mgcc_dist.inference.predictor import Predictor
from mgcc_dist.inference.sources import list_sources
from mgcc_dist.inference.uncertainty import Members
from mgcc_dist.serving.app import create_app
from mgcc_dist.serving.corrections import Corrections
from mgcc_dist.serving.predictions import Segmenter
from mgcc_dist.serving.queue import Queue
from mgcc_dist.serving.session import Session

TOKEN = "a-token"
ADDRESS = "http://127.0.0.1:4711"


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


MASK = np.where(blob() > 128, 255, 0).astype(np.uint8)


def client_of(session, max_upload=2**16):
    app = create_app(session, TOKEN, max_upload)
    return TestClient(app, ADDRESS, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False)


def upload(client, content, name="a.png"):
    return client.post("/api/uploads", content=content, headers={"X-File-Name": quote(name)})


def drop(client, content, name="a.png"):
    """The ids of the items of a file that is accepted."""
    return upload(client, content, name).json()["ids"]


def correct(client, item, mask, revision="", key=""):
    query = {"revision": revision, "key": key or client.get(f"/api/items/{item}").json()["key"]}
    return client.put(f"/api/items/{item}/correction", params=query, content=mask.tobytes())


def bytes_of(dataset):
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()
