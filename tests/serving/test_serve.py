"""`mgcc serve` over HTTP, in this process: what a correction leaves on the disk, the queue, and the program."""

import json
import os
import re
import socket
import sys

import numpy as np
import pytest
import uvicorn
from dicom_files import region, ultrasound
from PIL import Image
from predict_runs import files_in, save_run
from serving_session import MASK, blob, bytes_of, client_of, correct, drop, open_session, png, upload

from mgcc_dist import serve, shards
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.serving import server
from mgcc_dist.serving.corrections import Corrections

C = os.fsdecode(b"malignant/c\xe9.png")


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
    assert client.get(f"/api/items/{item}/image").content == blob().tobytes()
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
    assert "not read" not in capsys.readouterr().err
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
    (folder / "malignant" / "c.png").rename(folder / "malignant" / os.fsdecode(b"c\xe9.png"))  # not UTF-8

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
        assert list(order) == ["benign/b.png", C, "malignant/d.png", "benign/a.png"]
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
        assert list(order) == [C, "malignant/d.png", "benign/a.png"]
        assert scored == ["benign/a"]  # the others are in scores.jsonl
        found = client.get(f"/api/items/{order['benign/a.png']}").json()
        correct(client, order["benign/a.png"], MASK, found["revision"])
        correct(client, order[C], MASK)
        correct(client, order["malignant/d.png"], MASK)
        assert client.get("/api/next").json()["id"] is None
    assert open_session(out, [folder]).queue.progress()["corrected"] == 4
    shards.main(["folder", "--root", str(out), "--out", str(tmp_path / "shards"), "--groups", "none"])
    assert len(ShardFolder.open(tmp_path / "shards")) == 4


def test_without_scores_the_images_come_by_name(tmp_path, monkeypatch):
    """As when the disk is full: a page that waits for scores would wait for ever."""
    (tmp_path / "images").mkdir()
    for name, level in {"a": 250, "b": 129}.items():
        (tmp_path / "images" / f"{name}.png").write_bytes(png(blob(level)))
    monkeypatch.setattr("mgcc_dist.serving.queue.append_line", lambda *_: (tmp_path / "none" / "x").write_text(""))
    session = open_session(tmp_path / "out", [tmp_path / "images"], "uncertainty")
    session.queue.start()
    session.queue._thread.join()
    assert [session.queue.next(), session.queue.next()] == [0, 1]


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


def test_a_page_from_before_a_restart_does_not_save_its_mask_as_another_image(client, tmp_path):
    (item,) = drop(client, png(blob()))
    answer = correct(client, item, MASK, key="another")
    message = "the image of this page is another one since a restart. Open it again."
    assert (answer.status_code, answer.json()["error"]) == (404, message)
    assert not (tmp_path / "out" / "masks").exists()


def test_a_full_disk_is_answered_in_one_line(client, monkeypatch):
    (item,) = drop(client, png(blob()))
    full = OSError(28, "No space left on device", "/out/masks/a.png")

    def write(path, content):
        raise full

    monkeypatch.setattr("mgcc_dist.serving.corrections.write_bytes", write)
    answer = correct(client, item, MASK)
    expected = "No space left on device. Free some space and try again; nothing on this page is lost."
    assert (answer.status_code, answer.json()["error"]) == (507, expected)


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
