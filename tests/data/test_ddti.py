"""DDTI on tiny made-up copies of its published layout."""

import json

import numpy as np
import pytest
from image_files import problems, put

from mgcc_dist.common.errors import UserError
from mgcc_dist.data import duplicates
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.shards import main

ddti = READERS["ddti"]


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
        put(root / f"{name}.jpg", seed=seed)
    first = mark(1, json.dumps([box(2, 3, 5, 6), box(20, 10, 22, 11)]))
    second = mark(2, json.dumps([box(0, 0, 1, 1)])) + mark(2, json.dumps([box(5, 0, 8, 1)]))
    write_case(root, 1, "4a", first, second)
    write_case(root, 12, "", mark(1, json.dumps([region((5, 5), (15, 5), (5, 15))])))
    return root


def test_outlines_become_masks_tirads_the_class_and_cases_the_patients(small_ddti):
    reader = ddti(small_ddti)
    assert (reader.problems, reader.notes) == ([], [])
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


def test_near_duplicates_are_not_searched_where_patients_are_known(small_ddti, monkeypatch):
    monkeypatch.setattr(duplicates, "thumbnail", lambda image: pytest.fail("searched"))
    assert len(ddti(small_ddti).groups()) == 3


def test_regions_of_fewer_than_three_points_and_points_outside_are_no_trouble(small_ddti):
    regions = [region(), region((4, 4)), region((4, 4), (9, 9)), box(28, 18, 40, 30)]
    write_case(small_ddti, 12, "5", mark("", ""), mark(1, json.dumps(regions)))
    reader = ddti(small_ddti)
    assert problems(reader) == []
    assert (reader[0].mask > 0).sum() == 4


WHOLE = json.dumps([box(2, 3, 5, 6)])


@pytest.mark.parametrize(
    ("marks", "says"),
    [
        ([], "it has no outline of this image"),
        ([mark(1, "")], "it has no outline of this image"),
        ([mark(2, WHOLE)], "it has no outline of this image"),
        ([mark(1, "[]")], "it has no outline of this image"),
        ([mark(1, json.dumps([region((1, 1), (2, 2))]))], "it has no outline of this image"),
        ([mark(1, WHOLE[:-9])], "an outline is cut off or not JSON"),
        ([mark(1, WHOLE[:-9]), mark(1, WHOLE)], "an outline is cut off or not JSON"),
        ([mark(1, WHOLE), mark(1, WHOLE[:-9])], "an outline is cut off or not JSON"),
        ([mark(1, '[{"regionType": "freehand"}]')], "an outline is no list of points"),
        ([mark(1, '[{"points": [{"x": 1}]}]')], "an outline is no list of points"),
        ([mark(1, '[{"points": [{"x": "left", "y": 1}]}]')], "an outline is no list of points"),
        ([mark(1, "7")], "an outline is no list of points"),
        ([mark(1, "[" * 100_000)], "an outline is "),
        ([mark(1, json.dumps([box(0, 0, float("nan"), 3)]))], "far outside of any image"),
        ([mark(1, json.dumps([box(0, 0, 1e300, 3)]))], "far outside of any image"),
        ([mark("", WHOLE)], "it has a mark that says no image"),
        ([mark(1, WHOLE), "<mark>"], "not well-formed XML: mismatched tag"),
    ],
)
def test_what_is_wrong_with_an_outline_is_said_of_image_and_xml(small_ddti, marks, says):
    write_case(small_ddti, 12, "3", *marks)
    reader = ddti(small_ddti)
    (problem,) = problems(reader)
    assert problem.startswith("12_1.jpg cannot get its mask from 12.xml: ")
    assert says in problem
    assert "\n" not in problem
    assert [item.key for item in reader.items] == ["1_1", "1_2"]


def test_an_unknown_tirads_is_named(small_ddti):
    write_case(small_ddti, 12, "9z", mark(1, WHOLE))
    (problem,) = problems(ddti(small_ddti))
    assert problem == "12_1.jpg cannot get its mask from 12.xml: its tirads is '9z', not 2, 3, 4a, 4b, 4c, 5 or empty"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_xml_with_entities_is_refused(small_ddti, encoding):
    bomb = '<!DOCTYPE case [<!ENTITY a "aaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><case><tirads>&b;</tirads></case>'
    (small_ddti / "12.xml").write_bytes(bomb.encode(encoding))
    assert problems(ddti(small_ddti)) == [
        "12_1.jpg cannot get its mask from 12.xml: it has a DOCTYPE, which this program does not read"
    ]


def test_images_without_xml_strange_names_and_second_copies_are_problems(small_ddti):
    (small_ddti / "12.xml").unlink()
    put(small_ddti / "notes.png")
    put(small_ddti / "1_1.png")
    assert sorted(text.partition(" as ")[0] for text in problems(ddti(small_ddti))) == [
        "12_1.jpg has no 12.xml beside it",
        "1_1.png has the same key '1_1'",
        "notes.png is not named like the data set's files, '1_1.jpg'",
    ]


def test_outlines_without_image_are_a_note_so_that_a_part_can_be_converted(small_ddti):
    (small_ddti / "1_2.jpg").unlink()
    reader = ddti(small_ddti)
    assert reader.problems == []
    assert reader.notes == ["1 outlined images are not there, 2 of 1.xml first: converted what is"]


def test_another_layout_is_one_error_that_says_what_is_expected(small_ddti):
    for path in small_ddti.glob("*.xml"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no XML file; --root is the folder that holds 1_1\.jpg, 1\.xml, \.\.\."):
        ddti(small_ddti)
    for path in small_ddti.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="DDTI holds no image"):
        ddti(small_ddti)


def test_another_outline_of_the_same_length_is_another_argument(small_ddti):
    before = ddti(small_ddti).arguments
    text = (small_ddti / "12.xml").read_text()
    (small_ddti / "12.xml").write_text(text.replace('"x": 15', '"x": 16'))
    assert ddti(small_ddti).arguments != before


def test_the_command_skips_and_lists_bad_outlines(small_ddti, tmp_path):
    write_case(small_ddti, 12, "3", mark(1, WHOLE[:-9]))
    command = ["ddti", "--root", str(small_ddti), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"12_1\.jpg cannot get its mask from 12\.xml.*; fix it or pass --skip-bad"):
        main(command)
    main([*command, "--skip-bad"])
    (entry,) = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert entry["file"].endswith("12_1.jpg")
    shards = ShardFolder.open(tmp_path / "out")
    assert shards.keys() == ["1_1", "1_2"]
    assert shards.index["labeled"] == 2
