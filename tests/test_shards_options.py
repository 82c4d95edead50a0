"""`mgcc shards`: mask labels, 16-bit images, patients, groups, names of data sets."""

import numpy as np
import pytest
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import read_split
from mgcc_dist.shards import main


def test_every_conversion_ends_with_the_counts_of_its_masks(image_folder, tmp_path, capsys):
    save_mask = Image.fromarray(np.full((30, 40), 255, np.uint8)).save
    save_mask(image_folder / "masks" / "0.png")
    Image.open(image_folder / "masks" / "1.png").save(image_folder / "1.jpg", quality=60)
    (image_folder / "1.jpg").rename(image_folder / "masks" / "1.png")  # JPEG bytes under another suffix
    Image.new("L", (40, 30)).save(image_folder / "masks" / "2.png")
    for _ in range(2):  # also if it already exists
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")])
        printed = capsys.readouterr()
        counts = "6 masks: 1 empty, 1 full, 0 more than 90% lesion, 1 ambiguous, median lesion area 11.67% of the image"
        assert f"\n{counts}\n" in printed.out
        assert "1 masks are all lesion. Check that the background is 0: '0'" in printed.err
    shards = ShardFolder.open(tmp_path / "out")
    assert (shards[shards.index_of("1")].mask > 0).sum() == 110


def test_masks_of_several_labels_need_label_values(image_folder, tmp_path, capsys):
    labels = np.zeros((30, 40), np.uint8)
    labels[5:10, 5:10], labels[15:20, 15:25] = 1, 2
    Image.fromarray(labels).save(image_folder / "masks" / "4.png")
    command = ["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=r"4\.png: has 3 values, not two: 0, 1, 2\. Pass --label-values"):
        main(command)
    main([*command, "--label-values", "2", "255"])
    shards = ShardFolder.open(tmp_path / "out")
    np.testing.assert_array_equal(shards[shards.index_of("4")].mask > 0, labels == 2)
    with pytest.raises(UserError, match=r"made with label_values \[2, 255\], not \[1\]"):
        main([*command, "--label-values", "1"])


def test_16_bit_images_of_a_folder_are_scaled_alike(tmp_path, capsys):
    scene = np.random.default_rng(3).integers(0, 4000, (30, 40), dtype=np.uint16)
    (tmp_path / "images").mkdir()
    for name, brightest in (("a", 4095), ("b", 4096)):  # their own maxima would need 12 and 14 bits
        scene[0, 0] = brightest
        Image.fromarray(scene).save(tmp_path / "images" / f"{name}.png")
    main(["folder", "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "16-bit images are scaled to 8 bits as images of 14 bits" in capsys.readouterr().err
    first, second = (ShardFolder.open(tmp_path / "out")[i].image for i in range(2))
    np.testing.assert_array_equal(first.ravel()[1:], second.ravel()[1:])
    np.testing.assert_array_equal(first, np.where(scene == 4096, 4095, scene) >> 6)
    with pytest.raises(UserError, match=r"b\.png: has pixels up to 4096, more than 12 bits hold"):
        main(["folder", "--root", str(tmp_path), "--out", str(tmp_path / "more"), "--bits", "12"])
    main(["folder", "--root", str(tmp_path), "--out", str(tmp_path / "other"), "--bits", "16"])
    np.testing.assert_array_equal(ShardFolder.open(tmp_path / "other")[1].image, scene >> 8)


def write_patients(root):
    """Write two images of each of three patients, in the layout images/PATIENT/frame_N.png."""
    for patient in range(3):
        for frame in range(2):
            noise = np.random.default_rng((patient, frame)).integers(0, 256, (30, 40), dtype=np.uint8)
            for name, pixels in (("images", noise), ("masks", (noise > 250) * np.uint8(255))):
                path = root / name / f"p{patient}" / f"frame_{frame}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


def test_patients_in_subfolders_are_converted_and_split_by_patient(tmp_path, capsys):
    write_patients(tmp_path)
    with pytest.raises(
        UserError,
        match=r"p1/frame_0\.png: has the same key .* If subfolders are patients, use --groups patient; .* \(3 more",
    ):
        main(["folder", "--root", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "not read" not in capsys.readouterr().err
    main(["folder", "--root", str(tmp_path), "--out", str(tmp_path / "out"), "--groups", "patient"])
    records = ShardFolder.open(tmp_path / "out").records
    assert [(r.key, r.group, r.category) for r in records][:3] == [
        ("p0_frame_0", "patient-p0", "unknown"),
        ("p0_frame_1", "patient-p0", "unknown"),
        ("p1_frame_0", "patient-p1", "unknown"),
    ]
    for seed in range(3):
        out = tmp_path / f"{seed}.json"
        command = ["split", "--root", str(tmp_path / "out"), "--out", str(out), "--validation", "0.34", "--grouped"]
        main([*command, "--seed", str(seed)])
        assert len({key[:2] for key in read_split(out).validation}) == 1
        assert len(read_split(out).validation) == 2


@pytest.mark.parametrize("how", ["pattern", "csv"])
def test_patients_by_pattern_or_list_group_the_images(image_folder, tmp_path, how):
    source = "([0-9])"
    expected = [f"patient-{i}" for i in range(6)]
    if how == "csv":
        source, expected = str(tmp_path / "who.csv"), ["patient-anna"] * 3 + ["patient-ben"] * 3
        rows = [f"{i}{'.png' * (i % 2)},{'anna' if i < 3 else 'ben'}" for i in range(6)]
        (tmp_path / "who.csv").write_text("\n".join(["image,patient", *rows]))
    command = ["folder", "--root", str(image_folder), "--groups", "patient", "--patient", source]
    main([*command, "--out", str(tmp_path / "out")])
    assert [record.group for record in ShardFolder.open(tmp_path / "out").records] == expected


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("subfolder", r"0\.png: is not in the folder of a patient \(5 more bad files\)"),
        ("(x+)", r"0\.png: its name does not match --patient \(x\+\)"),
        ("[0-9]", r"--patient \[0-9\]: has no group\. Put the patient into parentheses"),
        ("(", r"--patient \(: not a regular expression"),
        ("nowhere.csv", r"--patient nowhere\.csv: does not exist"),
    ],
)
def test_images_without_a_patient_are_named(image_folder, tmp_path, source, expected):
    with pytest.raises(UserError, match=expected):
        main(
            [
                "folder",
                "--root",
                str(image_folder),
                "--out",
                str(tmp_path / "o"),
                "--groups",
                "patient",
                "--patient",
                source,
            ]
        )


def test_groups_none_does_not_search_near_duplicates(image_folder, tmp_path, capsys):
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out"), "--groups", "none"])
    assert [record.group for record in ShardFolder.open(tmp_path / "out").records] == list("012345")
    assert "near-duplicates" not in capsys.readouterr().err


@pytest.mark.parametrize("name", READERS.names())
def test_every_reader_that_groups_by_similarity_can_leave_it_out(name, capsys):
    main([name, "--help"])
    assert ("--groups" in capsys.readouterr().out) == (name not in ("busbra", "ddti"))


def test_groups_none_of_a_public_data_set_does_not_search(tmp_path, capsys):
    for category in ("benign", "malignant", "normal"):
        (tmp_path / "busi" / category).mkdir(parents=True)
        for name in ("", "_mask"):
            Image.new("L", (40, 30)).save(tmp_path / "busi" / category / f"{category} (1){name}.png")
    main(["busi", "--root", str(tmp_path / "busi"), "--out", str(tmp_path / "out"), "--groups", "none"])
    records = ShardFolder.open(tmp_path / "out").records
    assert [record.group for record in records] == ["benign (1)", "malignant (1)", "normal (1)"]
    assert "near-duplicates" not in capsys.readouterr().err
    with pytest.raises(UserError, match='made with groups "none", not null'):
        main(["busi", "--root", str(tmp_path / "busi"), "--out", str(tmp_path / "out")])


def test_own_datasets_are_named_after_their_output_or_by_name(image_folder, tmp_path):
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "clinic.a")])
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "x"), "--name", "clinic-b"])
    first, second = ShardFolder.open(tmp_path / "clinic.a"), ShardFolder.open(tmp_path / "x")
    assert (first.dataset, first[0].meta["dataset"]) == ("clinic_a", "clinic_a")
    assert (second.dataset, second[0].meta["dataset"]) == ("clinic-b", "clinic-b")
    assert second.index["shards"][0]["name"] == "clinic-b-000000.tar"
    with pytest.raises(UserError, match="--name a/b: use only letters, digits"):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "y"), "--name", "a/b"])
    with pytest.raises(UserError, match='made with name "clinic-b", not "other"'):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "x"), "--name", "other"])
