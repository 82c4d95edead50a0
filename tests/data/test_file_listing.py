import os
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_files import bad_file_messages, write_box_mask, write_image
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.file_listing import readable_name, walk_files
from mgcc_dist.data.images import read_grey
from mgcc_dist.data.readers.busi import busi
from mgcc_dist.data.readers.folder import folder
from mgcc_dist.inference.sources import list_sources

IGNORED = (".ipynb_checkpoints", "@eaDir", ".hidden", ".Trash-1000", "$RECYCLE.BIN", "#recycle", "__MACOSX", "Trash")
FOLDERS = st.lists(st.sampled_from(["benign", "left", "Été", *IGNORED]), max_size=3)
FILES = st.sampled_from(["a.png", "b.PNG", "c.jfif", "d.dcm", ".e.png", "Thumbs.db", "notes"])


@settings(max_examples=60, deadline=None)
@given(tree=st.lists(st.tuples(FOLDERS, FILES), min_size=1, max_size=12))
def test_every_file_is_listed_unless_it_is_hidden_or_in_an_ignored_folder(tmp_path_factory, tree):
    root = tmp_path_factory.mktemp("tree")
    for parts, name in tree:
        (root.joinpath(*parts)).mkdir(parents=True, exist_ok=True)
        root.joinpath(*parts, name).touch()
    expected = {
        root.joinpath(*parts, name)
        for parts, name in tree
        if not set(parts) & set(IGNORED) and name not in (".e.png", "Thumbs.db")
    }
    found = list(walk_files(root))
    assert set(found) == expected
    assert len(found) == len(expected)


def test_shards_and_predict_list_the_same_images(tmp_path):
    for name in ("a.png", "more/b.png", ".ipynb_checkpoints/c.png", "@eaDir/d.png", "more/.e.png"):
        write_image(tmp_path / "images" / name)
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "images" / "more")
    expected = ["a.png", "linked/b.png", "more/b.png"]
    assert [source.file for source in list_sources([tmp_path / "images"], tmp_path / "out")] == expected
    reader = folder(tmp_path)
    listed = [item.image for item in reader.items] + [bad.path for bad in reader.bad_files]
    assert sorted(path.relative_to(tmp_path / "images").as_posix() for path in listed) == expected


def test_linked_class_folders_are_read(tmp_path):
    write_image(tmp_path / "store" / "x.png")
    write_image(tmp_path / "store" / "y.png")
    write_image(tmp_path / "data" / "images" / "malignant" / "z.png")
    (tmp_path / "data" / "images" / "benign").symlink_to(tmp_path / "store")
    items = folder(tmp_path / "data").items
    assert [(item.key, item.category) for item in items] == [("x", "benign"), ("y", "benign"), ("z", "malignant")]


def test_link_loops_are_an_error_that_names_the_link(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "again").symlink_to(tmp_path / "images")
    with pytest.raises(UserError, match=r"again: links to .*images, a folder that it lies in"):
        folder(tmp_path)


def test_files_that_are_not_read_are_counted_and_named(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    for name in ("images/b.dcm", "images/c.dcm", "README", ".DS_Store", "images/Thumbs.db"):
        (tmp_path / name).touch()
    expected = f"3 other files in {tmp_path} are not read: 2 .dcm, 1 without a suffix (the first is 'README')"
    assert folder(tmp_path).unread == [expected]


def test_a_link_to_a_missing_image_is_an_image_that_cannot_be_read(tmp_path):
    write_image(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "broken.png").symlink_to(tmp_path / "nowhere.png")
    samples = folder(tmp_path)
    assert (len(samples), samples.unread) == (1, [])
    assert [bad.path.name for bad in samples.bad_files] == ["broken.png"]


@pytest.mark.parametrize("suffix", ["webp", "gif", "jfif", "jp2", "pgm", "tga"])
def test_other_kinds_of_images_are_read(tmp_path, suffix):
    (tmp_path / "images").mkdir()
    kind = {"jfif": "JPEG"}.get(suffix)
    Image.new("L", (30, 20), 90).save(tmp_path / "images" / f"a.{suffix}", kind)
    (sample,) = [folder(tmp_path)[0]]
    assert sample.image.shape == (20, 30)
    assert abs(sample.image.astype(int) - 90).max() <= 2


def test_first_picture_of_a_phone_jpeg_is_read(tmp_path):
    first, second = (Image.new("L", (30, 20), value) for value in (200, 10))
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[second])
    assert abs(read_grey(tmp_path / "a.jpg").astype(int) - 200).max() <= 2


def test_busi_reads_upper_case_suffixes(tmp_path):
    for category in ("benign", "malignant", "normal"):
        write_image(tmp_path / category / f"{category} (1).PNG")
        write_image(tmp_path / category / f"{category} (1)_mask.PNG", value=0)
    assert len(busi(tmp_path)) == 3
    assert busi(tmp_path).bad_files == []


def test_names_that_are_not_utf8_are_read_as_windows_1252(tmp_path):
    name = os.fsdecode(b"b\xe9nigne")
    write_image(tmp_path / "images" / name / f"{name} 1.png")
    write_box_mask(tmp_path / "masks" / name / f"{name} 1.png", (0, 0, 5, 5))
    reader = folder(tmp_path)
    assert reader.bad_files == []
    assert (reader[0].key, reader[0].meta["class"]) == ("bénigne 1", "bénigne")
    assert np.count_nonzero(reader[0].mask) == 25


def test_images_and_masks_match_in_different_unicode_normal_forms(tmp_path):
    write_image(tmp_path / "images" / unicodedata.normalize("NFD", "Zoë.png"))
    write_box_mask(tmp_path / "masks" / unicodedata.normalize("NFC", "Zoë.png"), (0, 0, 5, 5))
    assert [item.key for item in folder(tmp_path).items] == [unicodedata.normalize("NFC", "Zoë")]
    write_image(tmp_path / "images" / unicodedata.normalize("NFC", "Zoë.png"))
    (message,) = bad_file_messages(folder(tmp_path))
    assert "has the same key" in message


@given(name=st.binary(min_size=1, max_size=20).filter(lambda name: b"/" not in name and b"\0" not in name))
def test_readable_names_are_always_valid_text(name):
    text = readable_name(os.fsdecode(name))
    assert text.encode().decode() == text
    assert readable_name(text) == text
