"""The DDTI reader on small synthetic copies of the published layout."""

import json
import sys

import numpy as np
import pytest
from image_files import bad_file_messages, write_image

from mgcc_dist.common.errors import UserError
from mgcc_dist.data import duplicates
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.shards import main

ddti = READERS.get("ddti").load()


def region(*points):
    return {"points": [{"x": x, "y": y} for x, y in points], "annotation": {}, "regionType": "freehand"}


def box(left, top, right, bottom):
    return region((left, top), (right, top), (right, bottom), (left, bottom))


def mark(image, svg):
    return f"<mark>\n<image>{image}</image>\n<svg>{svg}</svg>\n</mark>"


def write_case(root, number, tirads, *marks):
    text = f'<?xml version="1.0" encoding="UTF-8"?>\n<case>\n<number>{number}</number>\n<age>49</age>\n<sex>F</sex>\n'
    text += f"<tirads>{tirads}</tirads>\n<reportbacaf/>\n{''.join(marks)}\n</case>\n"
    (root / f"{number}.xml").write_text(text)


@pytest.fixture
def small_ddti(tmp_path):
    """Case 1 has two images, the first with two nodules, the second with two marks; case 12 has one."""
    root = tmp_path / "DDTI"
    for seed, name in enumerate(("1_1", "1_2", "12_1")):
        write_image(root / f"{name}.jpg", seed=seed)
    first = mark(1, json.dumps([box(2, 3, 5, 6), box(20, 10, 22, 11)]))
    second = mark(2, json.dumps([box(0, 0, 1, 1)])) + mark(2, json.dumps([box(5, 0, 8, 1)]))
    write_case(root, 1, "4a", first, second)
    write_case(root, 12, "", mark(1, json.dumps([region((5, 5), (15, 5), (5, 15))])))
    return root


def test_masks_classes_and_patients_are_read_from_the_xml(small_ddti):
    reader = ddti(small_ddti)
    assert (reader.bad_files, reader.notes) == ([], [])
    assert [(item.key, item.category) for item in reader.items] == [
        ("12_1", "unknown"),
        ("1_1", "tirads_4a"),
        ("1_2", "tirads_4a"),
    ]
    assert reader.groups() == ["patient-12", "patient-1", "patient-1"]
    masks = [reader[i].mask for i in range(3)]
    assert all(mask.shape == (20, 30) and set(np.unique(mask)) == {0, 255} for mask in masks)
    assert masks[0][6, 6] == masks[0][5, 13] == 255
    assert masks[0][14, 14] == 0
    two_boxes = np.zeros((20, 30), dtype=bool)
    two_boxes[3:7, 2:6] = two_boxes[10:12, 20:23] = True
    np.testing.assert_array_equal(masks[1] > 0, two_boxes)
    assert (masks[2] > 0).sum() == 2 * 2 + 4 * 2


def test_near_duplicates_are_not_searched_if_patients_are_known(small_ddti, monkeypatch):
    monkeypatch.setattr(duplicates, "thumbnail", lambda image: pytest.fail("searched"))
    assert len(ddti(small_ddti).groups()) == 3


def test_regions_of_fewer_than_three_points_and_points_outside_the_image_are_accepted(small_ddti):
    regions = [region(), region((4, 4)), region((4, 4), (9, 9)), box(28, 18, 40, 30)]
    write_case(small_ddti, 12, "5", mark("", ""), mark(1, json.dumps(regions)))
    reader = ddti(small_ddti)
    assert bad_file_messages(reader) == []
    assert (reader[0].mask > 0).sum() == 4


VALID = json.dumps([box(2, 3, 5, 6)])


@pytest.mark.parametrize(
    ("marks", "expected"),
    [
        ([], "it has no outline of this image"),
        ([mark(1, "")], "it has no outline of this image"),
        ([mark(2, VALID)], "it has no outline of this image"),
        ([mark(1, "[]")], "it has no outline of this image"),
        ([mark(1, json.dumps([region((1, 1), (2, 2))]))], "it has no outline of this image"),
        ([mark(1, VALID[:-9])], "an outline is truncated or not JSON"),
        ([mark(1, VALID[:-9]), mark(1, VALID)], "an outline is truncated or not JSON"),
        ([mark(1, VALID), mark(1, VALID[:-9])], "an outline is truncated or not JSON"),
        ([mark(1, '[{"regionType": "freehand"}]')], "an outline is not a list of points"),
        ([mark(1, '[{"points": [{"x": 1}]}]')], "an outline is not a list of points"),
        ([mark(1, '[{"points": [{"x": "left", "y": 1}]}]')], "an outline is not a list of points"),
        ([mark(1, "7")], "an outline is not a list of points"),
        ([mark(1, "[" * 100_000)], "an outline is "),
        ([mark(1, json.dumps([box(0, 0, float("nan"), 3)]))], "far outside of any image"),
        ([mark(1, json.dumps([box(0, 0, 1e300, 3)]))], "far outside of any image"),
        ([mark("", VALID)], "it has a mark without an image number"),
        ([mark(1, VALID), "<mark>"], "not readable XML (mismatched tag"),
    ],
)
def test_error_for_an_outline_names_image_and_xml(small_ddti, marks, expected):
    write_case(small_ddti, 12, "3", *marks)
    reader = ddti(small_ddti)
    (message,) = bad_file_messages(reader)
    assert message.startswith("12_1.jpg: cannot read its outline from 12.xml: ")
    assert expected in message
    assert "\n" not in message
    assert [item.key for item in reader.items] == ["1_1", "1_2"]


def test_unknown_tirads_is_a_bad_file(small_ddti):
    write_case(small_ddti, 12, "9z", mark(1, VALID))
    (message,) = bad_file_messages(ddti(small_ddti))
    assert (
        message == "12_1.jpg: cannot read its outline from 12.xml: its tirads is '9z', not 2, 3, 4a, 4b, 4c, 5 or empty"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_with_entities_is_rejected(small_ddti, encoding):
    bomb = '<!DOCTYPE case [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><case><tirads>&b;</tirads></case>'
    (small_ddti / "12.xml").write_bytes(bomb.encode(encoding))
    (message,) = bad_file_messages(ddti(small_ddti))
    assert message.startswith("12_1.jpg: cannot read its outline from 12.xml: not readable XML (DTDForbidden")


def test_missing_xml_unexpected_names_and_second_copies_are_bad_files(small_ddti):
    (small_ddti / "12.xml").unlink()
    write_image(small_ddti / "notes.png")
    write_image(small_ddti / "1_1.png")
    assert sorted(text.partition(" as ")[0] for text in bad_file_messages(ddti(small_ddti))) == [
        "12_1.jpg: there is no 12.xml next to it",
        "1_1.png: has the same key '1_1'",
        "notes.png: is not named like this data set's files, '1_1.jpg'",
    ]


def test_outlines_without_image_are_only_noted(small_ddti):
    (small_ddti / "1_2.jpg").unlink()
    reader = ddti(small_ddti)
    assert reader.bad_files == []
    assert reader.notes == ["1 outlined images are missing (the first is 2 of 1.xml). Converted the others."]


def test_missing_images_or_xml_files_are_one_error_with_the_expected_layout(small_ddti):
    for path in small_ddti.glob("*.xml"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no XML files\. Set --root to the folder that contains 1_1\.jpg, 1\.xml"):
        ddti(small_ddti)
    for path in small_ddti.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="DDTI: no images found"):
        ddti(small_ddti)


def test_arguments_depend_on_the_outlines(small_ddti):
    before = ddti(small_ddti).arguments
    text = (small_ddti / "12.xml").read_text()
    (small_ddti / "12.xml").write_text(text.replace('"x": 15', '"x": 16'))
    assert ddti(small_ddti).arguments != before


def test_command_with_skip_bad_lists_bad_outlines(small_ddti, tmp_path):
    write_case(small_ddti, 12, "3", mark(1, VALID[:-9]))
    command = ["ddti", "--root", str(small_ddti), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"12_1\.jpg: cannot read its outline from 12\.xml.*\. Fix it or pass"):
        main(command)
    main([*command, "--skip-bad"])
    (entry,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert entry["file"].endswith("12_1.jpg")
    shards = ShardFolder.open(tmp_path / "out")
    assert shards.keys() == ["1_1", "1_2"]
    assert shards.index["labeled"] == 2


def test_missing_defusedxml_is_one_error_that_names_the_extra(small_ddti, monkeypatch):
    monkeypatch.setitem(sys.modules, "defusedxml.ElementTree", None)
    with pytest.raises(UserError, match=r"1\.xml: reading XML needs `pip install 'mgcc-dist\[readers\]'`"):
        ddti(small_ddti)
