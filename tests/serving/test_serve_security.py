"""`mgcc serve` over HTTP, in this process: who may ask, and which files are refused."""

import re
import struct
import zlib

import numpy as np
import pytest
from dicom_files import ultrasound
from predict_runs import files_in
from serving_session import ADDRESS, MASK, TOKEN, blob, bytes_of, correct, drop, png, upload

from mgcc_dist.serving.items import safe_name


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
    assert not re.search(r"(src|href)=\"(?!data:)|https?://|page\.js \*/", answer.text)
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


def test_a_link_that_leads_out_of_the_folder_is_refused(client, tmp_path):
    (item,) = drop(client, png(blob()))
    key = client.get(f"/api/items/{item}").json()["key"]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "masks").symlink_to(tmp_path / "elsewhere")
    answer = correct(client, item, MASK, key=key)
    assert answer.status_code == 400
    assert "is outside of --out. Remove the link that leads there." in answer.json()["error"]
    assert files_in(tmp_path / "elsewhere") == []


def test_only_recent_uploads_are_kept(client, tmp_path, monkeypatch):
    monkeypatch.setattr("mgcc_dist.serving.session.MAX_UPLOAD_BYTES", 2.5 * len(png(blob())))
    ids = [drop(client, png(blob(130 + i)))[0] for i in range(3)]
    assert len(list((tmp_path / "out" / ".uploads").iterdir())) == 2
    answer = client.get(f"/api/items/{ids[0]}")
    assert (answer.status_code, answer.json()) == (404, {"error": "this image is no longer kept. Drop its file again."})
    assert client.get(f"/api/items/{ids[-1]}").status_code == 200
