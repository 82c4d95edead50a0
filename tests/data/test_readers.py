import os

import numpy as np
import pytest
from image_files import bad_file_messages, write_box_mask, write_image
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.phantom import draw
from mgcc_dist.data.readers.busi import busi
from mgcc_dist.data.readers.folder import folder
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.readers.registry import READERS


@pytest.fixture
def small_busi(tmp_path):
    for seed, key in enumerate(("benign (1)", "benign (2)", "malignant (1)", "normal (1)")):
        class_folder = tmp_path / key.split()[0]
        write_image(class_folder / f"{key}.png", seed=seed)
        write_image(class_folder / f"{key}_mask.png", value=0)
    return tmp_path


@pytest.fixture
def small_folder(tmp_path):
    write_image(tmp_path / "images" / "a.png", seed=1)
    write_image(tmp_path / "images" / "b.jpg", seed=2)
    write_image(tmp_path / "masks" / "a.bmp", value=0)
    write_image(tmp_path / "masks" / "b.png", value=255)
    return tmp_path


def test_busi_keys_and_classes_match_the_published_names(small_busi):
    reader = busi(small_busi)
    assert [item.key for item in reader.items] == ["benign (1)", "benign (2)", "malignant (1)", "normal (1)"]
    assert [reader[i].meta["class"] for i in range(4)] == ["benign", "benign", "malignant", "normal"]
    sample = reader[1]
    assert sample.image.shape == sample.mask.shape == (20, 30)
    assert sample.meta == {"dataset": "busi", "class": "benign", "original_size": [30, 20]}
    assert reader.bad_files == []


def test_busi_mask_is_the_union_of_its_mask_files(small_busi):
    write_box_mask(small_busi / "benign" / "benign (2)_mask.png", (0, 0, 5, 5))
    write_box_mask(small_busi / "benign" / "benign (2)_mask_1.png", (3, 3, 9, 9))
    write_box_mask(small_busi / "benign" / "benign (2)_mask_2.png", (20, 10, 22, 11))
    mask = busi(small_busi)[1].mask
    assert set(np.unique(mask)) == {0, 255}
    assert (mask > 0).sum() == 25 + 36 - 4 + 2


def test_real_busi_has_780_images_of_which_17_have_several_masks(busi_root):
    reader = busi(busi_root)
    assert len(reader) == 780
    assert sum(len(item.masks) > 1 for item in reader.items) == 17
    assert reader.bad_files == []
    sample = reader[[item.key for item in reader.items].index("benign (195)")]
    assert len(reader.items[[item.key for item in reader.items].index("benign (195)")].masks) == 3
    assert sample.mask.shape == sample.image.shape


def test_error_for_mask_size_mismatch_names_both_sizes(small_busi):
    write_image(small_busi / "benign" / "benign (2)_mask.png", size=(31, 20), value=0)
    with pytest.raises(BadFile, match=r"benign \(2\)_mask\.png: is 31x20 but its image is 30x20"):
        busi(small_busi)[1]


def test_unreadable_image_fails_on_access_but_not_in_grouping(small_busi):
    (small_busi / "benign" / "benign (1).png").write_bytes(b"no image")
    reader = busi(small_busi)
    assert reader.groups() == [item.key for item in reader.items]
    with pytest.raises(BadFile, match=r"benign \(1\)\.png: not a readable image"):
        reader[0]


def test_unmatched_images_and_masks_and_unexpected_names_are_bad_files(small_busi):
    (small_busi / "benign" / "benign (1)_mask.png").unlink()
    (small_busi / "malignant" / "malignant (1).png").unlink()
    write_image(small_busi / "normal" / "normal (1) copy.png")
    write_image(small_busi / "normal" / "benign (7).png")
    reader = busi(small_busi)
    assert [item.key for item in reader.items] == ["benign (2)", "normal (1)"]
    assert sorted(bad_file_messages(reader)) == [
        "benign (1).png: has no mask",
        "benign (7).png: is not named like this data set's files, 'normal (1).png'",
        "malignant (1)_mask.png: has no image",
        "normal (1) copy.png: is not named like this data set's files, 'normal (1).png'",
    ]


def test_second_busi_image_with_the_same_name_is_a_bad_file(small_busi):
    write_image(small_busi / "benign" / "more" / "benign (1).png")
    (message,) = bad_file_messages(busi(small_busi))
    assert message.startswith("benign (1).png: has the same name as ")


def test_every_reader_reports_a_missing_root(tmp_path):
    for read in (each.load() for each in READERS.components()):
        with pytest.raises(UserError, match="nowhere: does not exist"):
            read(tmp_path / "nowhere")


def test_missing_and_empty_folders_are_reported(small_busi, tmp_path):
    for read in (busi, folder):
        with pytest.raises(UserError, match="nowhere: does not exist"):
            read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: has no folder 'benign'"):
        busi(tmp_path / "empty")
    with pytest.raises(UserError, match=r"empty: has no folder 'images'"):
        folder(tmp_path / "empty")
    (tmp_path / "empty" / "images").mkdir()
    with pytest.raises(UserError, match=r"images: no images found \(\.png"):
        folder(tmp_path / "empty")
    (tmp_path / "empty" / "images" / "IM1").write_bytes(bytes(128) + b"DICM")
    with pytest.raises(UserError, match="images: holds DICOM, which only `mgcc predict` reads"):
        folder(tmp_path / "empty")
    for file in (small_busi / "normal").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="normal: no images found"):
        busi(small_busi)


def test_folder_pairs_images_and_masks_with_any_suffix(small_folder):
    reader = folder(small_folder)
    assert [(item.key, item.category) for item in reader.items] == [("a", "unknown"), ("b", "unknown")]
    assert reader[0].mask.max() == 0
    assert reader[1].mask.min() == 255


def test_folder_without_masks_is_unlabeled(small_folder):
    for mask in (small_folder / "masks").iterdir():
        mask.unlink()
    (small_folder / "masks").rmdir()
    reader = folder(small_folder)
    assert [reader[i].mask for i in range(2)] == [None, None]


def test_images_without_a_mask_are_unlabeled_and_masks_without_an_image_are_bad_files(small_folder):
    write_image(small_folder / "images" / "c.png")
    write_image(small_folder / "masks" / "scan.png")
    reader = folder(small_folder)
    assert [(item.key, len(item.masks)) for item in reader.items] == [("a", 1), ("b", 1), ("c", 0)]
    assert bad_file_messages(reader) == ["scan.png: has no image"]


def test_a_typo_in_a_mask_s_name_is_a_bad_file_that_names_the_image(small_folder):
    for name in ("case_17", "case_18", "other"):
        write_image(small_folder / "images" / f"{name}.png")
    write_image(small_folder / "masks" / "csae_17.png")
    write_image(small_folder / "masks" / "case_18.png", value=0)
    reader = folder(small_folder)
    assert [item.key for item in reader.items] == ["a", "b", "case_18", "other"]
    assert bad_file_messages(reader) == [
        "csae_17.png: has no image (the nearest name is 'case_17')",
        "case_17.png: has no mask, but there is 'csae_17.png'",
    ]


@pytest.mark.parametrize("ending", ["_mask", "-mask", "_masks", "_GT", "_seg", " label", "_segmentation", "_mask_1"])
def test_masks_may_have_an_ending(tmp_path, ending):
    write_image(tmp_path / "images" / "cyst" / "1.png")
    write_box_mask(tmp_path / "masks" / "cyst" / f"1{ending}.png", (0, 0, 5, 5))
    reader = folder(tmp_path)
    assert reader.bad_files == []
    assert (reader[0].mask > 0).sum() == 25


def test_numbered_masks_are_united_and_an_image_named_like_a_mask_keeps_its_own(tmp_path):
    for name in ("1", "1_mask"):
        write_image(tmp_path / "images" / f"{name}.png")
    write_box_mask(tmp_path / "masks" / "1_mask.png", (0, 0, 9, 9))
    write_box_mask(tmp_path / "masks" / "1_mask_1.png", (0, 0, 5, 5))
    write_box_mask(tmp_path / "masks" / "1_mask_2.png", (10, 10, 15, 15))
    reader = folder(tmp_path)
    assert [(reader[i].key, (reader[i].mask > 0).sum()) for i in range(2)] == [("1", 50), ("1_mask", 81)]


def test_first_subfolder_is_the_class(small_folder):
    write_image(small_folder / "images" / "cyst" / "left" / "c.png")
    write_box_mask(small_folder / "masks" / "cyst" / "left" / "c.png", (0, 0, 4, 4))
    reader = folder(small_folder)
    assert [(item.key, item.category) for item in reader.items] == [("a", "unknown"), ("b", "unknown"), ("c", "cyst")]
    assert (reader[2].mask > 0).sum() == 16


@pytest.mark.parametrize("second", ["images/deeper/a.png", "images/a.tif"])
def test_duplicate_key_makes_the_later_file_a_bad_file(small_folder, second):
    write_image(small_folder / second, seed=3)
    write_image(small_folder / second.replace("images", "masks").replace(".tif", ".png"), value=0)
    reader = folder(small_folder)
    assert [item.key for item in reader.items] == ["a", "b"]
    (message,) = bad_file_messages(reader)
    assert "has the same key" in message
    hint = ". If subfolders are patients, use --groups patient; otherwise give each image a name of its own"
    assert message.endswith(f"/images/a.png{hint}" if "deeper" in second else "/images/a.png")


def test_dots_in_names_become_underscores_and_collisions_are_reported(small_folder):
    for name in ("a.1.png", "a_1.png"):
        write_image(small_folder / "images" / name)
        write_image(small_folder / "masks" / name)
    reader = folder(small_folder)
    assert [item.key for item in reader.items] == ["a", "a_1", "b"]
    assert "has the same key 'a_1' as" in bad_file_messages(reader)[0]


def test_invalid_keys_are_bad_files_and_hidden_or_other_files_are_ignored(small_folder):
    for name in ("a\nb.png", "._a.png"):
        write_image(small_folder / "images" / name)
        write_image(small_folder / "masks" / name)
    (small_folder / "images" / "Thumbs.db").write_text("x")
    reader = folder(small_folder)
    assert [item.key for item in reader.items] == ["a", "b"]
    (message,) = bad_file_messages(reader)
    assert "a\nb.png: its name has characters that cannot be printed" in message


def test_files_that_cannot_be_opened_are_bad_files_and_not_left_out(small_folder):
    """A link to nowhere among the masks would turn a labeled image into an unlabeled one."""
    for name in ("c", "d", "e"):
        write_image(small_folder / "images" / f"{name}.png")
    (small_folder / "masks" / "c.png").symlink_to("nowhere.png")
    os.mkfifo(small_folder / "masks" / "d.png")
    (small_folder / "masks" / "e.png").touch()
    reader = folder(small_folder)
    assert [item.key for item in reader.items] == ["a", "b"]
    assert bad_file_messages(reader) == [
        "c.png: links to a file that does not exist",
        "d.png: is not a file",
        "e.png: not a readable image (the file is empty)",
    ]
    assert reader.unread == []


def test_arguments_depend_on_the_files_but_not_on_their_location(small_folder):
    same = folder(small_folder).arguments
    moved = small_folder.parent / (small_folder.name + " moved")
    small_folder.rename(moved)
    assert folder(moved).arguments == same
    write_image(moved / "images" / "a.png", size=(30, 20), seed=9)
    write_image(moved / "images" / "c.png")
    write_image(moved / "masks" / "c.png")
    assert folder(moved).arguments != same


def test_near_duplicates_share_a_group_named_after_the_first_key(tmp_path):
    for i in range(3):
        write_phantom(tmp_path / "images" / f"p{i}.png", i, 128)
    write_phantom(tmp_path / "images" / "again.png", 1, 100)
    assert folder(tmp_path).groups() == ["again", "p0", "again", "p2"]


def write_phantom(path, index, size):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(21, index, 128).image).resize((size, size)).save(path)


def test_phantom_reader_returns_drawn_phantoms_with_one_group_each():
    reader = Phantoms(count=5, seed=8, size=24)
    sample = reader[3]
    drawn = draw(8, 3, 24)
    np.testing.assert_array_equal(sample.image, drawn.image)
    np.testing.assert_array_equal(sample.mask, drawn.mask)
    assert sample.meta == {
        "dataset": "phantom",
        "class": drawn.category,
        "original_size": [24, 24],
        "seed": 8,
        "index": 3,
    }
    assert len(reader) == len(set(reader.groups())) == 5
