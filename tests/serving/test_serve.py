"""`mgcc serve` over HTTP, in this process: who may ask, what is refused, and what a correction leaves on the disk."""

import io
import json
import re
import socket
import struct
import sys
import zlib
from urllib.parse import quote

import numpy as np
import pytest
import uvicorn
from dicom_files import region, ultrasound
from PIL import Image
from predict_runs import files_in, save_run
from serving_session import TOKEN, blob, open_session, png
from starlette.testclient import TestClient

from mgcc_dist import serve, shards
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.serving import server
from mgcc_dist.serving.app import create_app
from mgcc_dist.serving.corrections import Corrections
from mgcc_dist.serving.items import safe_name

ADDRESS = "http://127.0.0.1:4711"
MASK = np.where(blob() > 128, 255, 0).astype(np.uint8)


def client_of(session, max_upload=2**16):
    app = create_app(session, TOKEN, max_upload)
    return TestClient(app, ADDRESS, headers={"Authorization": f"Bearer {TOKEN}"}, raise_server_exceptions=False)


@pytest.fixture
def client(tmp_path):
    with client_of(open_session(tmp_path / "out")) as client:
        yield client


def upload(client, content, name="a.png"):
    return client.post("/api/uploads", content=content, headers={"X-File-Name": quote(name)})


def drop(client, content, name="a.png"):
    """The ids of the items of a file that is accepted."""
    return upload(client, content, name).json()["ids"]


def correct(client, item, mask, revision=""):
    return client.put(f"/api/items/{item}/correction?revision={revision}", content=mask.tobytes())


def bytes_of(dataset):
    file = io.BytesIO()
    dataset.save_as(file, enforce_file_format=True)
    return file.getvalue()


def png_header(width, height):
    """A PNG of a few bytes that says it is larger."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:9000"}, 200),  # through a tunnel
        ({"Origin": ADDRESS}, 200),
        ({"Host": "evil.example:4711"}, 400),  # a name that was rebound to 127.0.0.1
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:8080"}, 403),  # another server on this machine
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Authorization": "Bearer another"}, 401),
        ({"Authorization": ""}, 401),
        ({"Authorization": "", "Cookie": f"token={TOKEN}"}, 401),
    ],
)
def test_only_the_page_with_the_token_may_ask(client, tmp_path, headers, status):
    for method, path in (("GET", "/api/state"), ("POST", "/api/uploads")):
        answer = client.request(method, path, headers=headers, content=png(blob()) if method == "POST" else None)
        assert answer.status_code == status
    assert len(list((tmp_path / "out" / ".uploads").iterdir())) == (status == 200)


def test_the_page_loads_without_a_token_and_may_load_nothing_else(client):
    answer = client.get("/", headers={"Authorization": ""})
    assert answer.status_code == 200
    assert TOKEN not in answer.text
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|/\* page\.js \*/", answer.text)
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert answer.headers["cache-control"] == "no-store"
    assert client.get("/../page.js").status_code == 404
    refused = client.post("/", headers={"Origin": "https://evil.example"})
    assert (refused.status_code, refused.headers["x-frame-options"]) == (403, "DENY")


HOSTILE = {
    "a.svg": (b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>", "is neither an image"),
    "page.png": (b"<html><script>alert(1)</script>", "is neither an image"),
    "a.zip": (b"PK\x03\x04" + b"\0" * 100, "is neither an image"),
    "postscript.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n", "is neither an image"),
    "empty.png": (b"", "not a readable image (the file is empty)"),
    "cine.MP4": (b"\0\0\0\x18ftypmp42", "is a video. Save its frames as images first"),
    "bomb.png": (png_header(2**17, 2**17), "is too large"),
    "wide.png": (png_header(2**15, 8), "is too large (32768x8, more than 33 million pixels, or 16384 on a side)"),
    "large.dcm": (bytes_of(ultrasound(blob(), Rows=16000, Columns=16000)), "is too large (16000x16000"),
    "text.dcm": (b"not DICOM at all", "not a readable DICOM file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_in_one_line_and_not_kept(client, tmp_path, name):
    content, message = HOSTILE[name]
    answer = upload(client, content, name)
    assert answer.status_code == 415
    error = answer.json()["error"]
    assert error.startswith(f"{name}: {message}")
    assert "\n" not in error
    assert str(tmp_path) not in error
    assert files_in(tmp_path) == ["out/.lock", "out/corrections.jsonl"]


def test_a_damaged_image_is_refused_when_it_is_opened(client):
    (item,) = drop(client, png(np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8))[:200])
    answer = client.get(f"/api/items/{item}")
    assert answer.status_code == 415
    assert answer.json()["error"].startswith("a.png: not a readable image (")


def test_a_large_body_is_refused_with_and_without_its_length(client, tmp_path):
    message = {"error": "a.png: is larger than --max-upload-mb"}
    assert upload(client, b"x" * (2**16 + 1)).json() == message
    answer = upload(client, (b"x" * 2**12 for _ in range(17)))
    assert (answer.status_code, answer.json()) == (413, message)
    (item,) = drop(client, png(blob()))
    for size, status in ((32 * 32 - 1, 400), (32 * 32 + 1, 413)):
        for method, path in (("PUT", "correction"), ("POST", "measures")):
            answer = client.request(method, f"/api/items/{item}/{path}", content=b"\0" * size)
            assert (answer.status_code, answer.json()) == (status, {"error": "mask: is not 32x32 bytes"})
    assert not (tmp_path / "out" / "masks").exists()


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        ("../../../etc/passwd.png", "passwd"),
        (r"C:\Users\me\scan 1.png", "scan 1"),
        ("..", "image"),
        (".hidden.png", "hidden"),
        ("a\n\x00b<script>.png", "a_b_script"),
        ("größe (2).jpeg", "größe (2)"),
        ("", "image"),
        ("x" * 300 + ".png", "x" * 80),
    ],
)
def test_names_of_uploads_can_not_leave_the_folder(name, safe):
    assert safe_name(name) == safe


@pytest.mark.parametrize("name", ["u-1-7", "u-9-0", "q-0", "u-1", "u--1", "..", "u-1-0-0", "q-99999999999", "q-²"])
def test_an_image_that_does_not_exist_is_not_found(client, name):
    drop(client, png(blob()))
    assert client.get(f"/api/items/{name}").status_code == 404


def test_a_correction_becomes_training_data(client, tmp_path, capsys):
    """And of two images of one name both are kept."""
    corrected = MASK.copy()
    corrected[20:30, 2:6] = 255
    (item,) = drop(client, png(blob()), "../scan.png")
    (other,) = drop(client, png(blob(220)), "scan.png")
    found = client.get(f"/api/items/{item}").json()
    assert (found["predicted"]["area"], found["predicted"]["unit"], found["spacing"]) == (256, "px", None)
    assert found["predicted"]["longest"] == pytest.approx(16 * 2**0.5, rel=0.05)
    assert found["saved"] is None
    assert client.get(f"/api/items/{item}/predicted").content == MASK.tobytes()
    assert len(client.get(f"/api/items/{item}/uncertainty").content) == 32 * 32
    assert np.array_equal(Image.open(io.BytesIO(client.get(f"/api/items/{item}/image").content)), blob())
    measured = client.post(f"/api/items/{item}/measures", content=corrected.tobytes()).json()
    assert (measured["area"], measured["lesions"]) == (256 + 40, 2)

    saved = correct(client, item, corrected).json()
    assert saved["measures"] == measured
    assert correct(client, other, np.zeros_like(MASK)).status_code == 200
    again = client.get(f"/api/items/{item}").json()
    assert (again["saved"], again["revision"]) == (measured, saved["revision"])
    assert client.get(f"/api/items/{item}/saved").content == corrected.tobytes()

    out = tmp_path / "out"
    names = sorted(path.name for path in (out / "masks").iterdir())
    assert [re.sub(r"-[0-9a-f]{8}", "", name) for name in names] == ["scan.png"] * 2
    records = [json.loads(line) for line in (out / "corrections.jsonl").read_text().splitlines()]
    assert [record["changed_pixels"] for record in records] == [40, 256]
    shards.main(["folder", "--root", str(out), "--out", str(tmp_path / "shards"), "--groups", "none"])
    folder = ShardFolder.open(tmp_path / "shards")
    masks = {folder[i].key: folder[i].mask for i in range(2)}
    assert np.array_equal(masks[records[0]["file"]], corrected)
    assert not masks[records[1]["file"]].any()


def test_dicom_gives_millimetres_and_leaves_no_identifier(client, tmp_path):
    """The saved image is the ultrasound region alone; a name above it in the frame is cut off."""
    frame = np.full((48, 40), 255, np.uint8)
    frame[12:44, 4:36] = blob()
    dataset = ultrasound(frame, regions=[region(4, 12, 35, 43, delta=(0.02, 0.05))])
    (item,) = drop(client, bytes_of(dataset), "DOE_JANE.dcm")
    found = client.get(f"/api/items/{item}").json()
    assert found["label"] == found["name"] == dataset.SOPInstanceUID
    assert (found["width"], found["height"], found["spacing"]) == (32, 32, [0.2, 0.5])
    assert found["predicted"]["unit"] == "mm"
    assert found["predicted"]["area"] == pytest.approx(256 * 0.2 * 0.5)
    assert found["predicted"]["longest"] == pytest.approx(np.hypot(16 * 0.2, 16 * 0.5), rel=0.05)
    assert correct(client, item, MASK).status_code == 200
    out = tmp_path / "out"
    assert np.array_equal(Image.open(out / "images" / f"{dataset.SOPInstanceUID}.png"), blob())
    client.__exit__(None, None, None)  # Ctrl-C
    content = b"".join(name.encode() + (out / name).read_bytes() for name in files_in(out))
    for identifier in (b"DOE", b"JANE", b"4711", b"19700102", b"20240506"):
        assert identifier not in content
    assert not (out / ".uploads").exists()


def test_frames_and_regions_of_a_cine_are_corrected_one_by_one(client, tmp_path):
    cine = np.stack([np.hstack([blob(150 + 20 * i), blob(250)]) for i in range(3)])
    dataset = ultrasound(cine, regions=[region(0, 0, 31, 31), region(32, 0, 63, 31)])
    items = drop(client, bytes_of(dataset), "cine.dcm")
    assert len(items) == 6
    found = client.get(f"/api/items/{items[3]}").json()
    assert [found[key] for key in ("frame", "frames", "region", "regions")] == [2, 3, 2, 2]
    for item in items[2:4]:
        correct(client, item, MASK)
    names = [f"{dataset.SOPInstanceUID}-0002-region{number}.png" for number in (1, 2)]
    assert sorted(path.name for path in (tmp_path / "out" / "masks").iterdir()) == names
    assert np.array_equal(Image.open(tmp_path / "out" / "images" / names[0]), blob(170))


def test_the_most_uncertain_image_comes_first_and_corrected_ones_are_skipped_after_a_restart(tmp_path, monkeypatch):
    folder, out = tmp_path / "images", tmp_path / "out"
    for name, level in {"benign/a": 250, "benign/b": 129, "malignant/c": 131, "malignant/d": 140}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.png").write_bytes(png(blob(level)))
    (folder / "broken.png").write_bytes(b"no image")

    def labels(client, count):
        items = [client.get("/api/next").json()["id"] for _ in range(count)]
        return {client.get(f"/api/items/{item}").json()["label"]: item for item in items}

    session = open_session(out, [folder], "uncertainty")
    progress = session.queue.progress()
    assert (progress["total"], progress["scored"], progress["left"]) == (5, 0, 5)
    assert session.queue.next() is None  # scores are incomplete
    assert session.queue.next(early=True) == 0
    session = open_session(out, [folder], "uncertainty")
    with client_of(session) as client:
        session.queue._thread.join()
        order = labels(client, 4)
        assert list(order) == ["benign/b.png", "malignant/c.png", "malignant/d.png", "benign/a.png"]
        assert next(iter(labels(client, 1))) == "benign/b.png"  # skipped ones come again
        answer = correct(client, order["benign/b.png"], MASK).json()
        expected = {"total": 5, "corrected": 1, "unreadable": 1, "order": "uncertainty", "scored": 3, "left": 3}
        assert answer["queue"] == expected
        correct(client, order["benign/a.png"], MASK)
    assert files_in(out)[-2:] == ["masks/benign/b.png", "scores.jsonl"]

    (folder / "benign" / "a.png").write_bytes(png(blob(245)))  # another image of that name
    with (out / "corrections.jsonl").open("a") as file:
        file.write('{"file": "malignant/d", "sou')  # cut off by a kill
    session = open_session(out, [folder], "uncertainty")
    scored = []
    score = session.segmenter.score
    monkeypatch.setattr(session.segmenter, "score", lambda image, name: scored.append(name) or score(image, name))
    with client_of(session) as client:
        session.queue._thread.join()
        order = labels(client, 3)
        assert list(order) == ["malignant/c.png", "malignant/d.png", "benign/a.png"]
        assert scored == ["benign/a"]  # the others are in scores.jsonl
        found = client.get(f"/api/items/{order['benign/a.png']}").json()
        correct(client, order["benign/a.png"], MASK, found["revision"])
        correct(client, order["malignant/c.png"], MASK)
        correct(client, order["malignant/d.png"], MASK)
        assert client.get("/api/next").json()["id"] is None
    lines = (out / "corrections.jsonl").read_text().splitlines()
    assert sum(line.startswith('{"file": "malignant/d", "source_sha256"') for line in lines) == 1
    shards.main(["folder", "--root", str(out), "--out", str(tmp_path / "shards"), "--groups", "none"])
    assert len(ShardFolder.open(tmp_path / "shards")) == 4


def test_a_second_tab_does_not_replace_a_mask_that_it_has_not_seen(client, tmp_path):
    (item,) = drop(client, png(blob()))
    first = correct(client, item, MASK).json()["revision"]
    other = np.zeros_like(MASK)
    answer = correct(client, item, other)
    assert answer.status_code == 409
    assert "was saved by another tab or program" in answer.json()["error"]
    (mask,) = (tmp_path / "out" / "masks").iterdir()
    assert np.array_equal(Image.open(mask), MASK)
    assert correct(client, item, other, first).status_code == 200
    assert not np.asarray(Image.open(mask)).any()


def test_a_link_that_leads_out_of_the_folder_is_refused(client, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "masks").symlink_to(tmp_path / "elsewhere")
    (item,) = drop(client, png(blob()))
    assert correct(client, item, MASK).status_code == 400
    assert files_in(tmp_path / "elsewhere") == []


def test_a_full_disk_is_answered_in_one_line(client, monkeypatch):
    (item,) = drop(client, png(blob()))
    full = OSError(28, "No space left on device", "/out/masks/a.png")

    def write(path, content):
        raise full

    monkeypatch.setattr("mgcc_dist.serving.corrections.write_bytes", write)
    answer = correct(client, item, MASK)
    assert (answer.status_code, answer.json()["error"][:31]) == (507, "[Errno 28] No space left on dev")


def test_only_recent_uploads_are_kept(client, tmp_path):
    ids = [drop(client, png(blob(130 + i)))[0] for i in range(18)]
    assert len(list((tmp_path / "out" / ".uploads").iterdir())) == 16
    answer = client.get(f"/api/items/{ids[0]}")
    assert (answer.status_code, answer.json()) == (404, {"error": "this image is no longer kept. Drop its file again."})
    assert client.get(f"/api/items/{ids[-1]}").status_code == 200


def test_dicom_without_pydicom_names_the_extra(client, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    answer = upload(client, b"\0" * 128 + b"DICM" + b"\0" * 100, "a.dcm")
    assert answer.json() == {"error": "pydicom is not installed. Run `pip install 'mgcc-dist[clinic]'`."}


def start(tmp_path, *options):
    run = save_run(tmp_path / "run")
    serve.main(["--run", str(run), "--out", str(tmp_path / "out"), *options])


def test_the_program_prints_its_address_and_ends_with_ctrl_c(tmp_path, monkeypatch, capsys):
    opened = []

    def run_until_ctrl_c(self, sockets):
        (opener,) = (tmp_path / "out").glob("open.html")
        assert opener.stat().st_mode & 0o777 == 0o600
        port, token = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/#(\S{43})\n", capsys.readouterr().out).groups()
        assert f"http://127.0.0.1:{port}/#{token}" in opener.read_text()
        assert sockets[0].getsockname() == ("127.0.0.1", int(port))
        raise KeyboardInterrupt

    monkeypatch.setenv("DISPLAY", ":0")
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    monkeypatch.setattr(uvicorn.Server, "run", run_until_ctrl_c)
    start(tmp_path)
    assert opened == [(tmp_path / "out" / "open.html").as_uri()]  # no token in the words of a command
    assert "stopped; 0 corrections" in capsys.readouterr().err
    assert files_in(tmp_path / "out") == [".lock", "corrections.jsonl"]


def test_wrong_options_are_answered_in_one_line(tmp_path, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"^--port {port}: is in use\. Choose another one"):
            start(tmp_path, "--port", str(port))
    with pytest.raises(UserError, match=r"^--port 70000: can't be used \("):
        start(tmp_path, "--port", "70000")
    with pytest.raises(UserError, match=r"^--order uncertainty: needs a score"):
        start(tmp_path, "--order", "uncertainty", "--uncertainty", "none")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png(blob()))
    with pytest.raises(UserError, match="Choose another --out"):
        start(tmp_path, "--images", str(tmp_path / "images"), "--out", str(tmp_path / "images" / "out"))
    with pytest.raises(UserError, match=r"holds 'a\.png' and is not a folder of corrections\. Choose another --out"):
        start(tmp_path, "--out", str(tmp_path / "images"))
    with pytest.raises(UserError, match=r"is a file\. Give a folder"):
        Corrections(tmp_path / "images" / "a.png")


def test_a_missing_server_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "mgcc_dist.serving.server")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(SystemExit) as exited:
        run_program("serve", lambda: start(tmp_path))
    assert exited.value.code == 2
    assert capsys.readouterr().err == "serve: uvicorn is not installed. Run `pip install 'mgcc-dist[serve]'`.\n"
