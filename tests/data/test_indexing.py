"""WebDataset tars of other programs: an index is all that it takes to train on them."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.data import remote
from mgcc_dist.data.indexing import Layout, index_shards
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.shard_cache import ShardCache
from mgcc_dist.shards import main
from tests.data.http_folder import serving

LAYOUT = Layout(("png", "jpg"), ("mask.png", "seg.png"), ("cls", "json"), "label", "patient")
GREY = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5
MASK = np.where(GREY > 100, 1, 0).astype(np.uint8)  # 0 and 1, as others write them


def encoded(array, kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path, files, mode="w") -> None:
    path.parent.mkdir(exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    """Two shards: colour JPEG and 16-bit PNG images, masks under two names, classes in text and JSON."""
    write_tar(
        tmp_path / "others" / "x-000.tar",
        {
            "./train/a.jpg": encoded(np.stack([GREY] * 3, axis=2), "JPEG"),
            "./train/a.seg.png": encoded(MASK),
            "./train/a.json": json.dumps({"label": "benign", "patient": 7}).encode(),
            "train/b.PNG": encoded(GREY.astype(np.uint16) * 16),
            "train/b.cls": b"malignant\n",
            "train/b.notes.txt": b"not read",
        },
    )
    write_tar(tmp_path / "others" / "x-001.tar", {"c.png": encoded(GREY), "c.mask.png": encoded(MASK * 255)})
    return tmp_path / "others"


def test_records_are_read_from_the_tars_as_they_are(folder, caplog):
    shards = index_shards(str(folder), None, "others", LAYOUT)
    assert [(r.key, r.category, r.group, r.labeled) for r in shards.records] == [
        ("train_a", "benign", "7", True),
        ("train_b", "malignant", "train_b", False),
        ("c", "unknown", "c", True),
    ]
    assert shards.index["read"] == {"bits": 12, "label_values": []}
    assert "files with the extensions notes.txt" in caplog.text
    for i, tolerance in ((0, 6), (1, 0), (2, 0)):  # JPEG; 12 bits become 8
        sample = ShardFolder.open(folder)[i]
        assert np.abs(sample.image.astype(int) - GREY).max() <= tolerance
        assert sample.meta["original_size"] == [8, 6]
        if sample.mask is not None:
            np.testing.assert_array_equal(sample.mask, MASK * 255)
    assert index_shards(str(folder), None, "others", LAYOUT).index == shards.index  # which may exist


def test_command_line_indexes_a_folder_and_makes_a_split_of_it(folder, tmp_path, capsys):
    main(["index", str(folder), "--class-key", "label", "--group-key", "patient"])
    assert "3 records (1 benign, 1 malignant, 1 unknown), 2 with a mask, 1 without a mask" in capsys.readouterr().out
    main(["split", "--root", str(folder), "--out", str(tmp_path / "split.json"), "--validation", "0.5"])
    assert json.loads((tmp_path / "split.json").read_text())["unlabeled"] == ["train_b"]


def test_shards_at_a_url_get_an_index_elsewhere(folder, tmp_path):
    remote.fetch_index.cache_clear()
    with serving(folder) as server:
        root = server.url + "/x-{000..001}.tar"
        with pytest.raises(UserError, match=r"--out: where to write index\.json"):
            index_shards(root, None, "others", LAYOUT)
        index_shards(root, tmp_path / "index", "others", LAYOUT)
        shards = ShardFolder.open(tmp_path / "index", cache=ShardCache(tmp_path / "cache"))
        np.testing.assert_array_equal(shards[2].image, GREY)
    here = index_shards(str(folder / "x-{000..001}.tar"), tmp_path / "local", "others", LAYOUT)
    assert here.index == shards.index
    assert (tmp_path / "local" / "location.txt").read_text().strip() == str(folder)
    np.testing.assert_array_equal(here[2].image, GREY)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": b"no image"}, r"x-000\.tar: a\.png: not a readable image"),
        ({"a.png": encoded(GREY), "a.mask.png": encoded(MASK[:3])}, r"a\.mask\.png: is 8x3 but its image is 8x6"),
        ({"a.mask.png": encoded(MASK)}, r"a\.mask\.png: has no image"),
        ({"a.png": encoded(GREY), "a.json": b"{"}, r"a\.json: is not JSON"),
        ({"a.png": encoded(GREY), "a.json": b'{"label": ["x"]}'}, r"a\.json: its class is \['x'\], not a word"),
        ({"a.png": encoded(GREY), "a.cls": b"x\ny"}, r"a\.cls: its class is 'x\\ny', not a word"),
        (
            {"a.png": encoded(GREY), "a.mask.png": encoded(MASK * (1 + GREY // 200))},
            r"a\.mask\.png: has 3 values, not two",
        ),
    ],
)
def test_unusable_records_are_named_or_skipped(tmp_path, files, message):
    write_tar(tmp_path / "t" / "x-000.tar", {**files, "good.png": encoded(GREY)})
    with pytest.raises(UserError, match=message):
        index_shards(str(tmp_path / "t"), None, "t", LAYOUT)
    shards = index_shards(str(tmp_path / "t"), None, "t", LAYOUT, skip_bad=True)
    assert (shards.keys(), shards.index["skipped"]) == (["good"], 1)


def test_wrong_roots_are_named(folder, tmp_path):
    for root, message in (
        (tmp_path, "has no .tar files"),
        (folder / "x-{000..", "unbalanced braces"),
        (folder / "x-{000..001}.zip", "is not a .tar file"),
        (f"{tmp_path}/{{a,b}}/x.tar", "several folders"),
        (folder / "x-{000..002}.tar", r"x-002\.tar: can't be read \(No such file"),
        (tmp_path / "nowhere", "nowhere: does not exist"),
        ("http://[::1/x.tar", "is not a valid URL"),
        ("pipe:cat x.tar", "behind a command can't be listed"),
    ):
        with pytest.raises(UserError, match=message):
            index_shards(str(root), None, "t", LAYOUT)
    write_tar(tmp_path / "gz" / "x.tar", {"a.png": encoded(GREY)}, "w:gz")
    with pytest.raises(UserError, match="is not an uncompressed tar file"):
        index_shards(str(tmp_path / "gz"), None, "t", LAYOUT)
    with pytest.raises(UserError, match=r"no record has an image. Its extensions are .*png"):
        index_shards(str(folder), None, "t", replace(LAYOUT, images=("bmp",), masks=()))


def test_changed_files_and_other_layouts_are_refused(folder, caplog):
    index_shards(str(folder), None, "others", LAYOUT)
    with pytest.raises(UserError, match="already exists, of other shards or with other options"):
        index_shards(str(folder), None, "others", replace(LAYOUT, class_key="class"))
    assert "--class-key: no json file has the key 'class'. Keys: label, patient" in caplog.text
    content = (folder / "x-001.tar").read_bytes()
    (folder / "x-001.tar").write_bytes(content.replace(encoded(GREY)[-30:-20], bytes(10)))
    with pytest.raises(UserError, match=r"the sha256 of c\.png does not match"):
        ShardFolder.open(folder, verify=False)[2]
    (folder / "x-001.tar").write_bytes(content + bytes(512))  # other bytes, the same records
    with pytest.raises(UserError, match="already exists, of other shards"):
        index_shards(str(folder), None, "others", LAYOUT)
    (folder / "x\\2.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"can't be the name of a shard"):
        index_shards(str(folder), None, "others", LAYOUT)


def test_members_are_never_written_to_their_paths(tmp_path):
    write_tar(tmp_path / "t" / "x.tar", {"../../evil.png": encoded(GREY)})
    shards = index_shards(str(tmp_path / "t"), None, "t", LAYOUT, skip_bad=True)
    np.testing.assert_array_equal(shards[0].image, GREY)
    assert not (tmp_path.parent / "evil.png").exists()
