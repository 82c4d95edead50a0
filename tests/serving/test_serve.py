"""`mgcc serve` over HTTP, in this process: who may ask, what is refused, and what a correction leaves on the disk."""

import io
import json
from urllib.parse import quote

import numpy as np
import pytest
from dicom_files import region, save, ultrasound
from PIL import Image
from predict_runs import SIZE, Threshold
from starlette.testclient import TestClient

from mgcc_dist import shards
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.inference.predictor import Predictor
from mgcc_dist.inference.sources import list_sources
from mgcc_dist.inference.uncertainty import Members
from mgcc_dist.serving import items
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


def client_of(session, max_upload=2**20):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    return TestClient(
        create_app(session, TOKEN, max_upload), ADDRESS, headers=headers, raise_server_exceptions=False
    )


@pytest.fixture
def client(tmp_path):
    with client_of(open_session(tmp_path / "out")) as client:
        yield client


def upload(client, content, name="a.png"):
    return client.post("/api/uploads", content=content, headers={"X-File-Name": quote(name)})


def files_in(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_smoke(client, tmp_path):
    r = upload(client, png(blob()))
    print(r.json())
    (n,) = r.json()["ids"]
    print(client.get(f"/api/items/{n}").json())
    m = client.get(f"/api/items/{n}/predicted").content
    r = client.put(f"/api/items/{n}/correction", content=m)
    print(r.json(), r.headers)
    print(files_in(tmp_path))
