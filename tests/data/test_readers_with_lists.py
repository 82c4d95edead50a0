"""Readers of images, masks and a list, on small synthetic copies of the published layouts."""

import json
from dataclasses import dataclass

import numpy as np
import openpyxl
import pytest
from image_files import bad_file_messages, write_box_mask, write_image

from mgcc_dist.common.errors import UserError
from mgcc_dist.data import duplicates
from mgcc_dist.data.images import BadFile
from mgcc_dist.data.readers.reader import knows_patients
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.data.splits import read_split
from mgcc_dist.shards import main


@dataclass(frozen=True)
class Layout:
    """A published layout with three images: benign, benign and malignant."""

    image: str
    mask: str
    names: tuple[str, str, str]
    keys: tuple[str, str, str]
    list_file: str
    header: str | None  # the list's first line
    rows: tuple[str, str, str]
    unknown_row: str  # the second image with an unknown class
    patients: tuple[str, ...] = ()


LAYOUTS = {
    "busbra": Layout(
        image="Images/bus_{}.png",
        mask="Masks/mask_{}.png",
        names=("0001-l", "0001-r", "0002-s"),
        keys=("bus_0001-l", "bus_0001-r", "bus_0002-s"),
        list_file="bus_data.csv",
        header="ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX",
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
        header="img name,Ground Truth Name,tumor type",
        rows=("case001,case001_GT,B", "case002,case002_GT,B", "case010,case010_GT,M"),
        unknown_row="case002,case002_GT,odd",
    ),
    "datasetb": Layout(
        image="original/{}.png",
        mask="GT/{}.png",
        names=("000001", "000002", "000003"),
        keys=("000001", "000002", "000003"),
        list_file="DatasetB.csv",
        header="Image,Type,Diagnosis",
        rows=("1,Benign,Cyst", "2,Benign,Fibroadenoma", "3,Malignant,Ductal carcinoma"),
        unknown_row="2,odd,Cyst",
    ),
    "tnscui2020": Layout(
        image="image/{}.PNG",
        mask="mask/{}.PNG",
        names=("2", "4", "31"),
        keys=("2", "31", "4"),
        list_file="train.csv",
        header="ID,CATE",
        rows=("2.PNG,0", "4.PNG,0", "31.PNG,1"),
        unknown_row="4.PNG,odd",
    ),
    "tn3k": Layout(
        image="trainval-image/{}.jpg",
        mask="trainval-mask/{}.jpg",
        names=("0000", "0001", "0002"),
        keys=("trainval-0000", "trainval-0001", "trainval-0002"),
        list_file="label4trainval.csv",
        header=None,
        rows=("0000.jpg,0", "0001.jpg,0", "0002.jpg,1"),
        unknown_row="0001.jpg,odd",
    ),
}


def write_list(root, layout, rows):
    (root / layout.list_file).write_text("".join(f"{line}\n" for line in (layout.header, *rows) if line is not None))


def write_layout(root, name):
    layout = LAYOUTS[name]
    for seed, image in enumerate(layout.names):
        write_image(root / layout.image.format(image), seed=seed)
        write_box_mask(root / layout.mask.format(image), (3, 4, 13, 14))
    write_list(root, layout, layout.rows)
    if name == "tn3k":
        write_image(root / "test-image" / "0000.jpg", seed=7)
        write_box_mask(root / "test-mask" / "0000.jpg", (3, 4, 13, 14))
    return layout


@pytest.fixture(params=LAYOUTS)
def synthetic(request, tmp_path):
    """Name, root and Layout of a synthetic copy."""
    return request.param, tmp_path / "data", write_layout(tmp_path / "data", request.param)


def layout_items(reader):
    """The items that `Layout` describes, without TN3K's test images."""
    return [item for item in reader.items if not item.key.startswith("test-")]


def test_images_masks_classes_and_keys_are_read(synthetic):
    name, root, layout = synthetic
    reader = READERS.get(name).load()(root)
    assert bad_file_messages(reader) == []
    assert reader.notes == []
    assert tuple(item.key for item in layout_items(reader)) == layout.keys
    classes = {item.image.stem: item.category for item in layout_items(reader)}
    images = [(root / layout.image.format(image)).stem for image in layout.names]
    assert [classes[image] for image in images] == ["benign", "benign", "malignant"]
    for i, item in enumerate(reader.items):
        if item in layout_items(reader):
            sample = reader[i]
            assert (sample.key, sample.image.shape) == (item.key, (20, 30))
            assert set(np.unique(sample.mask)) == {0, 255}
            assert abs(int((sample.mask > 0).sum()) - 100) <= 8  # TN3K's masks are JPEG
            expected = {"dataset": name, "class": item.category, "original_size": [30, 20]}
            assert sample.meta == expected | ({"device": "GE Logiq 7"} if name == "busbra" else {})


def test_groups_are_patients_or_else_near_duplicates(synthetic, monkeypatch):
    name, root, layout = synthetic
    monkeypatch.setattr(duplicates, "groups", lambda images: {key: f"like {key}" for key, _ in images})
    read = READERS.get(name).load()
    reader = read(root)
    assert knows_patients(read) == bool(layout.patients)
    assert tuple(reader.groups()) == (layout.patients or tuple(f"like {item.key}" for item in reader.items))


def test_unmatched_image_and_mask_are_bad_files(synthetic):
    name, root, layout = synthetic
    mask, image = root / layout.mask.format(layout.names[0]), root / layout.image.format(layout.names[1])
    mask.unlink()
    image.unlink()
    reader = READERS.get(name).load()(root)
    first = (root / layout.image.format(layout.names[0])).name
    second = (root / layout.mask.format(layout.names[1])).name
    assert bad_file_messages(reader) == [f"{first}: has no mask", f"{second}: has no image"]
    assert len(layout_items(reader)) == 1


def test_image_without_row_is_a_bad_file(synthetic):
    name, root, layout = synthetic
    write_list(root, layout, layout.rows[:1] + layout.rows[2:])
    reader = READERS.get(name).load()(root)
    image = (root / layout.image.format(layout.names[1])).name
    assert bad_file_messages(reader) == [f"{image}: has no row in {layout.list_file}"]
    assert len(layout_items(reader)) == 2


def test_rows_without_image_are_only_noted(synthetic):
    name, root, layout = synthetic
    for pattern in (layout.image, layout.mask):
        (root / pattern.format(layout.names[1])).unlink()
    reader = READERS.get(name).load()(root)
    assert bad_file_messages(reader) == []
    assert len(layout_items(reader)) == 2
    (note,) = reader.notes
    assert note.startswith(f"{layout.list_file}: 1 of the 3 images are missing")


def test_unknown_class_is_a_bad_file(synthetic):
    name, root, layout = synthetic
    write_list(root, layout, (layout.rows[0], layout.unknown_row, layout.rows[2]))
    reader = READERS.get(name).load()(root)
    (message,) = bad_file_messages(reader)
    assert message.startswith((root / layout.image.format(layout.names[1])).name)
    assert f"'odd' in {layout.list_file}, not " in message


def test_repeated_row_is_a_bad_file_and_the_first_is_used(synthetic):
    name, root, layout = synthetic
    write_list(root, layout, (*layout.rows, layout.unknown_row))
    reader = READERS.get(name).load()(root)
    (message,) = bad_file_messages(reader)
    assert message.startswith(f"{layout.list_file}: lists ")
    assert message.endswith(" twice")
    assert {item.category for item in layout_items(reader)} == {"benign", "malignant"}


def test_second_image_with_the_same_name_is_a_bad_file(synthetic):
    name, root, layout = synthetic
    image = root / layout.image.format(layout.names[1])
    write_image(image.with_suffix(".tif"), seed=9)
    (message,) = bad_file_messages(READERS.get(name).load()(root))
    assert "has the same name as" in message
    assert image.stem in message


def test_error_for_mask_size_mismatch_names_both_sizes(synthetic):
    name, root, layout = synthetic
    mask = root / layout.mask.format(layout.names[0])
    write_box_mask(mask, (0, 0, 5, 5), size=(31, 20))
    reader = READERS.get(name).load()(root)
    with pytest.raises(BadFile, match=f"{mask.name}: is 31x20 but its image is 30x20"):
        reader[[item.key for item in reader.items].index(layout.keys[0])]


def test_file_with_unexpected_name_is_a_bad_file(synthetic):
    name, root, layout = synthetic
    write_image((root / layout.image).with_name("Kopie von (1).png"))
    (message,) = bad_file_messages(READERS.get(name).load()(root))
    assert message.startswith("Kopie von (1).png: is not named like this data set's files, ")


def test_missing_or_empty_folder_is_one_error_with_the_expected_layout(synthetic):
    name, root, layout = synthetic
    for pattern in (layout.image, layout.mask):
        folder = (root / pattern).parent
        folder.rename(root / "away")
        with pytest.raises(UserError, match=rf"has no folder '{folder.name}'\. Set --root to the folder that"):
            READERS.get(name).load()(root)
        (root / "away").rename(folder)
    for file in (root / layout.image).parent.iterdir():
        file.unlink()
    with pytest.raises(UserError, match=f"{(root / layout.image).parent.name}: no images found"):
        READERS.get(name).load()(root)


@pytest.mark.parametrize("name", ["busbra", "datasetb", "tnscui2020"])
def test_missing_required_list_is_one_error_with_the_expected_layout(name, tmp_path):
    layout = write_layout(tmp_path, name)
    (tmp_path / layout.list_file).unlink()
    stem = layout.list_file.removesuffix(".csv")
    with pytest.raises(UserError, match=rf"has no {stem}\.csv or {stem}\.xlsx\. Set --root to the folder"):
        READERS.get(name).load()(tmp_path)


@pytest.mark.parametrize("name", ["bus", "tn3k"])
def test_optional_list_may_be_missing(name, tmp_path):
    layout = write_layout(tmp_path, name)
    (tmp_path / layout.list_file).unlink()
    reader = READERS.get(name).load()(tmp_path)
    assert bad_file_messages(reader) == []
    assert {item.category for item in reader.items} == {"unknown"}


def test_tn3k_test_and_training_images_have_different_keys(tmp_path):
    write_layout(tmp_path, "tn3k")
    (tmp_path / "label4test.csv").write_text("0000.jpg,1\n")
    reader = READERS.get("tn3k").load()(tmp_path)
    assert reader.items[0].key == "test-0000"
    assert reader.items[0].category == "malignant"
    assert reader.items[1].key == "trainval-0000"


def test_published_folds_of_tn3k_and_busbra_are_read_where_present(tmp_path):
    write_layout(tmp_path / "tn3k", "tn3k")
    for fold, val in enumerate(([2], [0, 1])):
        (tmp_path / "tn3k" / f"tn3k-trainval-fold{fold}.json").write_text(json.dumps({"train": [], "val": val}))
    reader = READERS.get("tn3k").load()(tmp_path / "tn3k")
    folds = {"test-0000": "test", "trainval-0000": "1", "trainval-0001": "1", "trainval-0002": "0"}
    assert {item.key: item.fold for item in reader.items} == folds
    assert reader[0].meta["fold"] == "test"
    assert "lists_sha256" in reader.arguments
    (tmp_path / "tn3k" / "tn3k-trainval-fold1.json").write_text('{"train": []}')
    with pytest.raises(UserError, match=r"fold1\.json: not a fold of TN3K, with a list 'val' \(KeyError"):
        READERS.get("tn3k").load()(tmp_path / "tn3k")
    write_layout(tmp_path / "busbra", "busbra")
    rows = ("ID,Case,kFold", "bus_0001-l,1,3", "bus_0001-r,1,3")
    (tmp_path / "busbra" / "5-fold-cv.csv").write_text("\n".join(rows))
    reader = READERS.get("busbra").load()(tmp_path / "busbra")
    assert [item.fold for item in reader.items] == ["3", "3"]
    assert bad_file_messages(reader) == ["bus_0002-s.png: has no row in 5-fold-cv.csv"]


def test_splits_by_published_folds_follow_the_authors(tmp_path):
    write_layout(tmp_path / "tn3k", "tn3k")
    for fold in range(3):
        (tmp_path / "tn3k" / f"tn3k-trainval-fold{fold}.json").write_text(json.dumps({"val": [fold]}))
    main(["tn3k", "--root", str(tmp_path / "tn3k"), "--out", str(tmp_path / "out"), "--groups", "none"])
    main(["split", "--root", str(tmp_path / "out"), "--out", str(tmp_path / "f.json"), "--published-folds"])
    splits = [read_split(tmp_path / f"f_{fold}.json") for fold in range(3)]
    assert [split.validation for split in splits] == [(f"trainval-000{fold}",) for fold in range(3)]
    assert {split.test for split in splits} == {("test-0000",)}
    assert all(len(split.train) == 2 for split in splits)


def test_busbra_image_without_patient_is_a_bad_file(tmp_path):
    layout = write_layout(tmp_path, "busbra")
    write_list(tmp_path, layout, (layout.rows[0].replace(",1,", ",,", 1), *layout.rows[1:]))
    assert bad_file_messages(READERS.get("busbra").load()(tmp_path)) == [
        "bus_0001-l.png: has no 'Case' in bus_data.csv"
    ]


def test_busbra_names_the_scanner_where_the_list_does(tmp_path):
    layout = write_layout(tmp_path, "busbra")
    write_list(tmp_path, layout, (layout.rows[0].replace("GE Logiq 7", ""), *layout.rows[1:]))
    reader = READERS.get("busbra").load()(tmp_path)
    assert [reader[index].meta.get("device") for index in range(3)] == [None, "GE Logiq 7", "GE Logiq 7"]


def test_arguments_depend_on_the_list_but_not_on_the_location(synthetic):
    name, root, layout = synthetic
    before = READERS.get(name).load()(root).arguments
    moved = root.rename(root.with_name("moved"))
    assert READERS.get(name).load()(moved).arguments == before
    write_list(moved, layout, layout.rows[::-1])
    assert READERS.get(name).load()(moved).arguments != before


def test_command_with_skip_bad_lists_the_skipped_files(synthetic, tmp_path, capsys):
    name, root, layout = synthetic
    command = [name, "--root", str(root), "--out", str(tmp_path / "out"), "--size", "16"]
    (root / layout.mask.format(layout.names[0])).unlink()
    write_box_mask(root / layout.mask.format(layout.names[1]), (0, 0, 5, 5), size=(31, 20))
    with pytest.raises(UserError, match=r"has no mask\. Fix it or pass --skip-bad"):
        main(command)
    main([*command, "--skip-bad"])
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert [entry["file"] for entry in listed] == [
        str(root / layout.image.format(layout.names[0])),
        str(root / layout.mask.format(layout.names[1])),
    ]
    assert "1 malignant" in capsys.readouterr().out


def test_command_warns_about_rows_without_image(tmp_path, capsys):
    layout = write_layout(tmp_path / "data", "busbra")
    for pattern in (layout.image, layout.mask):
        (tmp_path / "data" / pattern.format(layout.names[0])).unlink()
    main(["busbra", "--root", str(tmp_path / "data"), "--out", str(tmp_path / "out")])
    assert "bus_data.csv: 1 of the 3 images are missing (the first is 'bus_0001-l')" in capsys.readouterr().err


def test_dataset_b_reads_the_published_workbook(tmp_path):
    layout = write_layout(tmp_path, "datasetb")
    (tmp_path / "DatasetB.csv").unlink()
    book = openpyxl.Workbook()
    for line in (layout.header, *layout.rows):
        book.active.append([int(cell) if cell.isdecimal() else cell for cell in line.split(",")])
    book.save(tmp_path / "DatasetB.xlsx")
    reader = READERS.get("datasetb").load()(tmp_path)
    assert bad_file_messages(reader) == []
    assert [item.category for item in reader.items] == ["benign", "benign", "malignant"]
