"""Data sets of images, masks and a list, on tiny made-up copies of their published layouts."""

import json
import zipfile
from dataclasses import dataclass

import numpy as np
import pytest
from image_files import problems, put, put_box

from mgcc_dist.common.errors import UserError
from mgcc_dist.data import duplicates
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.shards import main


@dataclass(frozen=True)
class Layout:
    """A published layout with three images, benign, benign and malignant, by their names."""

    image: str
    mask: str
    names: tuple[str, str, str]
    keys: tuple[str, str, str]
    list_file: str
    title: str | None  # the list's first line
    rows: tuple[str, str, str]
    unknown_row: str  # the second image with a class that does not exist
    patients: tuple[str, ...] = ()


LAYOUTS = {
    "busbra": Layout(
        image="Images/bus_{}.png",
        mask="Masks/mask_{}.png",
        names=("0001-l", "0001-r", "0002-s"),
        keys=("bus_0001-l", "bus_0001-r", "bus_0002-s"),
        list_file="bus_data.csv",
        title="ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX",
        rows=(
            'bus_0001-l,1,fibroadenoma,benign,2,GE Logiq 7,30,20,left,"[1,2,3,4]"',
            'bus_0001-r,1,fibroadenoma,benign,2,GE Logiq 7,30,20,right,"[1,2,3,4]"',
            'bus_0002-s,2,carcinoma,malignant,5,GE Logiq 7,30,20,single,"[1,2,3,4]"',
        ),
        unknown_row='bus_0001-r,1,fibroadenoma,odd,2,GE Logiq 7,30,20,right,"[1,2,3,4]"',
        patients=("patient-1", "patient-1", "patient-2"),
    ),
    "bus": Layout(
        image="Original/case{}.bmp",
        mask="GT/case{}_GT.bmp",
        names=("1", "2", "10"),
        keys=("case1", "case10", "case2"),
        list_file="BUSIS562.csv",
        title="img name,Ground Truth Name,tumor type",
        rows=("case001,case001_GT,B", "case002,case002_GT,B", "case010,case010_GT,M"),
        unknown_row="case002,case002_GT,odd",
    ),
    "datasetb": Layout(
        image="original/{}.png",
        mask="GT/{}.png",
        names=("000001", "000002", "000003"),
        keys=("000001", "000002", "000003"),
        list_file="DatasetB.csv",
        title="Image,Type,Diagnosis",
        rows=("1,Benign,Cyst", "2,Benign,Fibroadenoma", "3,Malignant,Ductal carcinoma"),
        unknown_row="2,odd,Cyst",
    ),
    "tnscui2020": Layout(
        image="image/{}.PNG",
        mask="mask/{}.PNG",
        names=("2", "4", "31"),
        keys=("2", "31", "4"),
        list_file="train.csv",
        title="ID,CATE",
        rows=("2.PNG,0", "4.PNG,0", "31.PNG,1"),
        unknown_row="4.PNG,odd",
    ),
    "tn3k": Layout(
        image="trainval-image/{}.jpg",
        mask="trainval-mask/{}.jpg",
        names=("0000", "0001", "0002"),
        keys=("trainval-0000", "trainval-0001", "trainval-0002"),
        list_file="label4trainval.csv",
        title=None,
        rows=("0000.jpg,0", "0001.jpg,0", "0002.jpg,1"),
        unknown_row="0001.jpg,odd",
    ),
}


def write_list(root, layout, rows):
    (root / layout.list_file).write_text("".join(f"{line}\n" for line in (layout.title, *rows) if line is not None))


def write_layout(root, name):
    layout = LAYOUTS[name]
    for seed, image in enumerate(layout.names):
        put(root / layout.image.format(image), seed=seed)
        put_box(root / layout.mask.format(image), (3, 4, 13, 14))
    write_list(root, layout, layout.rows)
    if name == "tn3k":
        for folder in ("test-image", "test-mask"):
            put(root / folder / "0000.jpg", seed=7)
        (root / "tn3k-trainval-fold0.json").write_text(json.dumps({"train": [0, 1], "val": [2]}))
    return layout


@pytest.fixture(params=LAYOUTS)
def copy(request, tmp_path):
    """Name, root and Layout of a made-up copy."""
    return request.param, tmp_path / "data", write_layout(tmp_path / "data", request.param)


def of_layout(reader):
    """The items that `Layout` tells of: not TN3K's test images."""
    return [item for item in reader.items if not item.key.startswith("test-")]


def test_images_masks_classes_and_keys_are_found(copy):
    name, root, layout = copy
    reader = READERS[name](root)
    assert problems(reader) == []
    assert reader.notes == []
    assert tuple(item.key for item in of_layout(reader)) == layout.keys
    classes = {item.image.stem: item.category for item in of_layout(reader)}
    images = [(root / layout.image.format(image)).stem for image in layout.names]
    assert [classes[image] for image in images] == ["benign", "benign", "malignant"]
    for i, item in enumerate(reader.items):
        if item in of_layout(reader):
            sample = reader[i]
            assert (sample.key, sample.image.shape) == (item.key, (20, 30))
            assert set(np.unique(sample.mask)) == {0, 255}
            assert abs(int((sample.mask > 0).sum()) - 100) <= 8  # TN3K's masks are JPEG
            assert sample.meta == {"dataset": name, "class": item.category, "original_size": [30, 20]}


def test_patients_are_the_groups_without_a_search_and_else_near_duplicates(copy, monkeypatch):
    name, root, layout = copy
    searched = []
    monkeypatch.setattr(duplicates, "similar_pairs", lambda thumbnails: searched.append(len(thumbnails)) or [])
    groups = READERS[name](root).groups()
    if layout.patients:
        assert tuple(groups) == layout.patients
        assert searched == []
    else:
        assert searched == [len(groups)]


def test_an_image_without_mask_and_a_mask_without_image_are_named(copy):
    name, root, layout = copy
    mask, image = root / layout.mask.format(layout.names[0]), root / layout.image.format(layout.names[1])
    mask.unlink()
    image.unlink()
    reader = READERS[name](root)
    first = (root / layout.image.format(layout.names[0])).name
    second = (root / layout.mask.format(layout.names[1])).name
    assert problems(reader) == [f"{first} has no mask", f"{second} has no image"]
    assert len(of_layout(reader)) == 1


def test_an_image_without_row_is_named_with_the_list(copy):
    name, root, layout = copy
    write_list(root, layout, layout.rows[:1] + layout.rows[2:])
    reader = READERS[name](root)
    image = (root / layout.image.format(layout.names[1])).name
    assert problems(reader) == [f"{image} has no row in {layout.list_file}"]
    assert len(of_layout(reader)) == 2


def test_rows_without_image_are_a_note_so_that_a_part_can_be_converted(copy):
    name, root, layout = copy
    for place in (layout.image, layout.mask):
        (root / place.format(layout.names[1])).unlink()
    reader = READERS[name](root)
    assert problems(reader) == []
    assert len(of_layout(reader)) == 2
    (note,) = reader.notes
    assert note.startswith(f"1 of the 3 images in {layout.list_file} are not there")


def test_an_unknown_class_is_named_with_image_and_list(copy):
    name, root, layout = copy
    write_list(root, layout, (layout.rows[0], layout.unknown_row, layout.rows[2]))
    reader = READERS[name](root)
    (problem,) = problems(reader)
    assert problem.startswith((root / layout.image.format(layout.names[1])).name)
    assert f"'odd' in {layout.list_file}, not " in problem


def test_a_row_twice_is_named_and_the_first_counts(copy):
    name, root, layout = copy
    write_list(root, layout, (*layout.rows, layout.unknown_row))
    reader = READERS[name](root)
    (problem,) = problems(reader)
    assert problem.startswith(f"{layout.list_file} lists ")
    assert problem.endswith(" twice")
    assert {item.category for item in of_layout(reader)} == {"benign", "malignant"}


def test_two_images_of_a_name_are_named(copy):
    name, root, layout = copy
    image = root / layout.image.format(layout.names[1])
    put(image.with_suffix(".tif"), seed=9)
    (problem,) = problems(READERS[name](root))
    assert "has the same name as" in problem
    assert image.stem in problem


def test_a_mask_of_another_size_names_both_sizes(copy):
    name, root, layout = copy
    mask = root / layout.mask.format(layout.names[0])
    put_box(mask, (0, 0, 5, 5), size=(31, 20))
    reader = READERS[name](root)
    with pytest.raises(BadFile, match=f"{mask.name} is 31x20 but its image is 30x20"):
        reader[[item.key for item in reader.items].index(layout.keys[0])]


def test_a_file_of_another_name_is_named(copy):
    name, root, layout = copy
    put((root / layout.image).with_name("Kopie von (1).png"))
    (problem,) = problems(READERS[name](root))
    assert problem.startswith("Kopie von (1).png is not named like the data set's files, ")


def test_another_layout_is_one_error_that_says_what_is_expected(copy):
    name, root, layout = copy
    for place in (layout.image, layout.mask):
        folder = (root / place).parent
        folder.rename(root / "away")
        with pytest.raises(UserError, match=f"has no folder '{folder.name}'; --root is the folder that holds .*/"):
            READERS[name](root)
        (root / "away").rename(folder)
    for file in (root / layout.image).parent.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=f"{(root / layout.image).parent.name} holds no image"):
        READERS[name](root)


@pytest.mark.parametrize("name", ["busbra", "datasetb", "tnscui2020"])
def test_a_missing_list_is_one_error_that_says_what_is_expected(name, tmp_path):
    layout = write_layout(tmp_path, name)
    (tmp_path / layout.list_file).unlink()
    stem = layout.list_file.removesuffix(".csv")
    with pytest.raises(UserError, match=rf"has no {stem}\.csv or {stem}\.xlsx; --root is the folder that holds"):
        READERS[name](tmp_path)


@pytest.mark.parametrize("name", ["bus", "tn3k"])
def test_a_list_that_not_all_copies_have_may_be_missing(name, tmp_path):
    layout = write_layout(tmp_path, name)
    (tmp_path / layout.list_file).unlink()
    reader = READERS[name](tmp_path)
    assert problems(reader) == []
    assert {item.category for item in reader.items} == {"unknown"}


def test_tn3k_test_images_have_other_keys_than_training_images_of_the_same_name(tmp_path):
    write_layout(tmp_path, "tn3k")
    (tmp_path / "label4test.csv").write_text("0000.jpg,1\n")
    reader = READERS["tn3k"](tmp_path)
    assert reader.items[0].key == "test-0000"
    assert reader.items[0].category == "malignant"
    assert reader.items[1].key == "trainval-0000"


def test_busbra_needs_the_patient(tmp_path):
    layout = write_layout(tmp_path, "busbra")
    write_list(tmp_path, layout, (layout.rows[0].replace(",1,", ",,", 1), *layout.rows[1:]))
    assert problems(READERS["busbra"](tmp_path)) == ["bus_0001-l.png has no 'Case' in bus_data.csv"]


def test_another_list_of_the_same_length_is_another_argument_wherever_the_data_lies(copy):
    name, root, layout = copy
    before = READERS[name](root).arguments
    moved = root.rename(root.with_name("moved"))
    assert READERS[name](moved).arguments == before
    write_list(moved, layout, layout.rows[::-1])
    assert READERS[name](moved).arguments != before


def test_the_command_writes_shards_and_skip_bad_lists_what_it_left_out(copy, tmp_path, capsys):
    name, root, layout = copy
    command = [name, "--root", str(root), "--out", str(tmp_path / "out"), "--size", "16"]
    (root / layout.mask.format(layout.names[0])).unlink()
    put_box(root / layout.mask.format(layout.names[1]), (0, 0, 5, 5), size=(31, 20))
    with pytest.raises(UserError, match="has no mask; fix it or pass --skip-bad"):
        main(command)
    main([*command, "--skip-bad"])
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["file"] for entry in listed] == [
        str(root / layout.image.format(layout.names[0])),
        str(root / layout.mask.format(layout.names[1])),
    ]
    assert "1 malignant" in capsys.readouterr().out


def test_the_command_tells_of_rows_without_image(tmp_path, capsys):
    layout = write_layout(tmp_path / "data", "busbra")
    for place in (layout.image, layout.mask):
        (tmp_path / "data" / place.format(layout.names[0])).unlink()
    main(["busbra", "--root", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert "1 of the 3 images in bus_data.csv are not there, 'bus_0001-l' first" in capsys.readouterr().out


def test_dataset_b_reads_the_published_workbook(tmp_path):
    write_layout(tmp_path, "datasetb")
    (tmp_path / "DatasetB.csv").unlink()
    sheet = "<row r='1'><c r='A1' t='s'><v>0</v></c><c r='B1' t='s'><v>1</v></c></row>"
    for i, kind in ((1, 2), (2, 2), (3, 3)):
        sheet += f"<row r='{i + 1}'><c r='A{i + 1}'><v>{i}</v></c><c r='B{i + 1}' t='s'><v>{kind}</v></c></row>"
    names = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    with zipfile.ZipFile(tmp_path / "DatasetB.xlsx", "w") as book:
        book.writestr(
            "xl/worksheets/sheet1.xml", f"<worksheet xmlns='{names}'><sheetData>{sheet}</sheetData></worksheet>"
        )
        shared = "".join(f"<si><t>{text}</t></si>" for text in ("Image", "Type", "Benign", "Malignant"))
        book.writestr("xl/sharedStrings.xml", f"<sst xmlns='{names}'>{shared}</sst>")
    reader = READERS["datasetb"](tmp_path)
    assert problems(reader) == []
    assert [item.category for item in reader.items] == ["benign", "benign", "malignant"]
