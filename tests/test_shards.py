import json
import multiprocessing
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.folder import folder
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import leaks, read_split
from mgcc_dist.shards import main


@pytest.fixture
def images(tmp_path):
    """Six images of 40x30 with masks; two differ only in brightness."""
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (tmp_path / "data" / name).mkdir(parents=True)
    for i in range(5):
        coarse = rng.integers(0, 200, (6, 8), dtype=np.uint8)
        Image.fromarray(coarse).resize((40, 30)).save(tmp_path / "data" / "images" / f"{i}.png")
    brighter = np.asarray(Image.open(tmp_path / "data" / "images" / "3.png")) + np.uint8(20)
    Image.fromarray(brighter).save(tmp_path / "data" / "images" / "5.png")
    for i in range(6):
        mask = Image.new("L", (40, 30))
        mask.paste(255, (10, 10, 20 + i, 20))
        mask.save(tmp_path / "data" / "masks" / f"{i}.png")
    return tmp_path / "data"


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_busi_gives_780_records(busi_root, busi_shards, capsys):
    # The fixture has converted them; the same arguments reuse the folder.
    main(["busi", "--root", str(busi_root), "--out", str(busi_shards.folder), "--size", "16"])
    printed = capsys.readouterr().out
    assert "780 records (437 benign, 210 malignant, 133 normal), already exists" in printed
    assert busi_shards.index["classes"] == {"benign": 437, "malignant": 210, "normal": 133}
    assert busi_shards.index["labeled"] == 780
    groups = {record.key: record.group for record in busi_shards.records}
    assert groups["malignant (145)"] == groups["benign (433)"] == "benign (433)"


def test_folder_keeps_original_sizes_by_default(images, tmp_path, capsys):
    main(["folder", "--root", str(images), "--out", str(tmp_path / "out"), "--per-shard", "4"])
    assert f"{tmp_path / 'out'}: 6 records (6 unknown)" in capsys.readouterr().out
    shards = ShardFolder.open(tmp_path / "out")
    assert [shard["name"] for shard in shards.index["shards"]] == ["out-000000.tar", "out-000001.tar"]
    sample = shards[shards.index_of("4")]
    assert sample.image.shape == sample.mask.shape == (30, 40)
    assert [shards.records[i].group for i in range(6)] == ["0", "1", "2", "3", "4", "3"]


def test_size_stretches_image_and_mask_and_keeps_the_original_size_in_meta(images, tmp_path):
    main(["folder", "--root", str(images), "--out", str(tmp_path / "out"), "--size", "20"])
    shards = ShardFolder.open(tmp_path / "out")
    for i in range(6):
        sample = shards[i]
        assert sample.image.shape == sample.mask.shape == (20, 20)
        assert set(np.unique(sample.mask)) == {0, 255}
        assert sample.meta["original_size"] == [40, 30]


def test_unlabeled_folder_gives_unlabeled_records(images, tmp_path, capsys):
    for mask in (images / "masks").iterdir():
        mask.unlink()
    (images / "masks").rmdir()
    main(["folder", "--root", str(images), "--out", str(tmp_path / "out")])
    assert "6 without a mask" in capsys.readouterr().out
    assert ShardFolder.open(tmp_path / "out").index["labeled"] == 0


def test_phantoms_have_three_classes_and_reproducible_bytes(tmp_path):
    for out in ("a", "b"):
        main(["phantom", "--count", "30", "--seed", "5", "--size", "32", "--out", str(tmp_path / out)])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(ShardFolder.open(tmp_path / "a").index["classes"]) == {"benign", "malignant", "normal"}


def test_every_conversion_ends_with_the_counts_of_its_masks(images, tmp_path, capsys):
    save_mask = Image.fromarray(np.full((30, 40), 255, np.uint8)).save
    save_mask(images / "masks" / "0.png")
    Image.open(images / "masks" / "1.png").save(images / "1.jpg", quality=60)
    (images / "1.jpg").rename(images / "masks" / "1.png")  # JPEG bytes under another suffix
    Image.new("L", (40, 30)).save(images / "masks" / "2.png")
    for _ in range(2):  # also if it already exists
        main(["folder", "--root", str(images), "--out", str(tmp_path / "out")])
        printed = capsys.readouterr()
        assert "\n6 masks: 1 empty, 1 full, 1 ambiguous, median lesion area 11.67% of the image\n" in printed.out
        assert "1 masks are all lesion. Check that the background is 0: '0'" in printed.err
    shards = ShardFolder.open(tmp_path / "out")
    assert (shards[shards.index_of("1")].mask > 0).sum() == 110


def test_masks_of_several_labels_need_label_values(images, tmp_path, capsys):
    labels = np.zeros((30, 40), np.uint8)
    labels[5:10, 5:10], labels[15:20, 15:25] = 1, 2
    Image.fromarray(labels).save(images / "masks" / "4.png")
    command = ["folder", "--root", str(images), "--out", str(tmp_path / "out")]
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
def test_patients_by_pattern_or_list_group_the_images(images, tmp_path, how):
    source = "([0-9])"
    expected = [f"patient-{i}" for i in range(6)]
    if how == "csv":
        source, expected = str(tmp_path / "who.csv"), ["patient-anna"] * 3 + ["patient-ben"] * 3
        rows = [f"{i}{'.png' * (i % 2)},{'anna' if i < 3 else 'ben'}" for i in range(6)]
        (tmp_path / "who.csv").write_text("\n".join(["image,patient", *rows]))
    command = ["folder", "--root", str(images), "--groups", "patient", "--patient", source]
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
def test_images_without_a_patient_are_named(images, tmp_path, source, expected):
    with pytest.raises(UserError, match=expected):
        main(
            ["folder", "--root", str(images), "--out", str(tmp_path / "o"), "--groups", "patient", "--patient", source]
        )


def test_groups_none_does_not_search_near_duplicates(images, tmp_path, capsys):
    main(["folder", "--root", str(images), "--out", str(tmp_path / "out"), "--groups", "none"])
    assert [record.group for record in ShardFolder.open(tmp_path / "out").records] == list("012345")
    assert "near-duplicates" not in capsys.readouterr().err


def test_own_datasets_are_named_after_their_output_or_by_name(images, tmp_path):
    main(["folder", "--root", str(images), "--out", str(tmp_path / "clinic.a")])
    main(["folder", "--root", str(images), "--out", str(tmp_path / "x"), "--name", "clinic-b"])
    first, second = ShardFolder.open(tmp_path / "clinic.a"), ShardFolder.open(tmp_path / "x")
    assert (first.dataset, first[0].meta["dataset"]) == ("clinic_a", "clinic_a")
    assert (second.dataset, second[0].meta["dataset"]) == ("clinic-b", "clinic-b")
    assert second.index["shards"][0]["name"] == "clinic-b-000000.tar"
    with pytest.raises(UserError, match="--name a/b: use only letters, digits"):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "y"), "--name", "a/b"])
    with pytest.raises(UserError, match='made with name "clinic-b", not "other"'):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "x"), "--name", "other"])


def add_bad_files(images):
    """Add one unusable file of each kind; return their names."""
    (images / "images" / "0.png").write_bytes(b"no image")
    Image.new("L", (41, 30)).save(images / "masks" / "1.png")
    (images / "masks" / "2.png").rename(images / "masks" / "2_.png")
    (images / "images" / "more").mkdir()
    (images / "masks" / "more").mkdir()
    Image.new("L", (40, 30)).save(images / "images" / "more" / "3.png")
    Image.new("L", (40, 30)).save(images / "masks" / "more" / "3.png")
    return {"images/0.png", "masks/1.png", "images/2.png", "masks/2_.png", "images/more/3.png"}


def test_bad_file_is_an_error_with_its_name_and_advice(images, tmp_path):
    add_bad_files(images)
    with pytest.raises(
        UserError, match=r"2_\.png: has no image \(the nearest name is '2'\) \(2 more bad files\)\. Fix"
    ):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "out")])
    (images / "masks" / "2_.png").rename(images / "masks" / "2.png")
    (images / "images" / "more" / "3.png").unlink()
    (images / "masks" / "more" / "3.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: not a readable image .*\. Fix it or pass --skip-bad"):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "out")])
    (images / "images" / "0.png").unlink()
    (images / "masks" / "0.png").unlink()
    with pytest.raises(UserError, match=r"masks/1\.png: is 41x30 but its image is 40x30\. Fix it or pass --skip-bad"):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="incomplete"):
        ShardFolder.open(tmp_path / "out")


def test_skip_bad_lists_bad_files_and_converts_the_others(images, tmp_path, capsys):
    bad = add_bad_files(images)
    main(["folder", "--root", str(images), "--out", str(tmp_path / "out"), "--skip-bad"])
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {os.path.relpath(entry["file"], images) for entry in listed} == bad
    assert all(entry["problem"] for entry in listed)
    assert "5 files skipped" in capsys.readouterr().err
    # Image 3 stays: the later file of the same key is the bad one.
    assert ShardFolder.open(tmp_path / "out").keys() == ["3", "4", "5"]


def test_no_usable_file_is_an_error_and_writes_no_index(images, tmp_path):
    for path in (images / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the 6 files is usable\. The first error is .*0\.png: not a readable"):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "out"), "--skip-bad"])
    assert not (tmp_path / "out" / "index.json").exists()


def test_rerun_keeps_a_complete_folder(images, tmp_path, capsys):
    command = ["folder", "--root", str(images), "--out", str(tmp_path / "out")]
    main(command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    main(command)
    assert "already exists" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_arguments_or_files_never_overwrite_a_complete_folder(images, tmp_path):
    command = ["folder", "--root", str(images), "--out", str(tmp_path / "out")]
    main(command)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="made with size null, not 16"):
        main([*command, "--size", "16"])
    with pytest.raises(UserError, match='made with reader "folder", not "phantom"'):
        main(["phantom", "--out", str(tmp_path / "out")])
    Image.new("L", (40, 30)).save(images / "images" / "6.png")
    Image.new("L", (40, 30)).save(images / "masks" / "6.png")
    with pytest.raises(UserError, match="made with files 12, not 14"):
        main(command)
    assert contents(tmp_path / "out") == before


def test_an_edited_mask_makes_the_folder_stale(images, tmp_path):
    command = ["folder", "--root", str(images), "--out", str(tmp_path / "out")]
    main(command)
    before = contents(tmp_path / "out")
    mask = images / "masks" / "3.png"
    size = mask.stat().st_size
    edited = bytearray(Image.open(mask).tobytes())
    edited[0] = 255
    Image.frombytes("L", (40, 30), bytes(edited)).save(mask)
    mask.write_bytes(mask.read_bytes().ljust(size, b"\0"))  # the size may stay
    with pytest.raises(UserError, match="out: stale, files of the dataset have changed"):
        main(command)
    assert contents(tmp_path / "out") == before


def test_a_folder_of_version_0_1_is_not_kept(images, tmp_path):
    command = ["folder", "--root", str(images), "--out", str(tmp_path / "out")]
    main(command)
    index = tmp_path / "out" / "index.json"
    index.write_text(index.read_text().replace("contents_sha256", "names_and_sizes_sha256"))
    with pytest.raises(UserError, match=r"out: made by version 0\.1, which read and resized masks in another way"):
        main(command)


def test_folder_with_foreign_files_is_not_touched(images, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    (tmp_path / "out" / "out-000000.tar").write_text("x")
    with pytest.raises(UserError, match=r"out: contains 'thesis\.tex'"):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == {"thesis.tex": b"x", "out-000000.tar": b"x"}


class KillingPhantoms(Phantoms):
    """Phantoms that kill the process with SIGKILL when sample `kill_at` is read."""

    kill_at = -1

    def __getitem__(self, index):
        if index == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def convert_until_killed(out, kill_at):
    reader = KillingPhantoms(count=20, seed=1, size=16)
    reader.kill_at = kill_at
    if kill_at == 20:  # between the last shard and index.json
        import mgcc_dist.data.convert as convert

        convert.write_index = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    write_shards(reader, out, per_shard=6)


@pytest.mark.parametrize("kill_at", [0, 3, 6, 19, 20])
def test_killed_run_is_incomplete_and_a_rerun_completes_it(tmp_path, kill_at):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=convert_until_killed, args=(out, kill_at))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"incomplete, .* Rerun the command that creates it"):
        ShardFolder.open(out)
    (out / ".phantom-000003.tar.999.tmp").write_bytes(b"what a kill in the middle of a shard leaves")
    (out / "phantom-000009.tar").write_bytes(b"a shard of a run with fewer records per shard")
    write_shards(Phantoms(count=20, seed=1, size=16), out, per_shard=6)
    expected = write_shards(Phantoms(count=20, seed=1, size=16), tmp_path / "expected", per_shard=6)
    assert contents(out) == contents(expected.folder)


def test_grouped_split_of_a_shard_folder_keeps_groups_together(images, tmp_path, capsys):
    main(["folder", "--root", str(images), "--out", str(tmp_path / "shards")])
    command = ["split", "--root", str(tmp_path / "shards"), "--validation", "0.34", "--labeled", "0.5"]
    for seed in range(6):
        out = tmp_path / f"split-{seed}.json"
        main([*command, "--seed", str(seed), "--out", str(out), "--grouped"])
        split = read_split(out)
        assert (len(split.labeled), len(split.unlabeled), len(split.validation)) == (2, 2, 2)
        assert leaks(split, ShardFolder.open(tmp_path / "shards").records) == []
    assert split.name == "split-5"
    assert "2 labeled, 2 unlabeled, 2 validation" in capsys.readouterr().out


def test_split_of_a_partly_labeled_folder_uses_images_without_masks_as_unlabeled(images, tmp_path, capsys):
    for i in range(1, 5):
        (images / "masks" / f"{i}.png").unlink()
    main(["folder", "--root", str(images), "--out", str(tmp_path / "shards")])
    assert "6 records (6 unknown), 2 with a mask, 4 without a mask" in capsys.readouterr().out
    command = ["split", "--root", str(tmp_path / "shards"), "--validation", "0.5", "--labeled", "1"]
    main([*command, "--out", str(tmp_path / "random.json")])
    split = read_split(tmp_path / "random.json")
    assert {*split.labeled, *split.validation} == {"0", "5"}
    assert split.unlabeled == ("1", "2", "3", "4")
    # Images 3 and 5 are near-duplicates: 3 is in training only if 5 is not in validation.
    for seed in range(4):
        out = tmp_path / f"{seed}.json"
        main([*command, "--grouped", "--seed", str(seed), "--out", str(out)])
        printed, grouped = capsys.readouterr().err, read_split(out)
        assert ("3" in grouped.unlabeled) == ("5" in grouped.labeled)
        assert ("1 records without a mask are in no subset" in printed) == ("5" in grouped.validation)


def test_split_file_documents_its_command_and_its_leaks(images, tmp_path, capsys):
    (images / "images" / "0.png").write_bytes((images / "images" / "1.png").read_bytes())
    (images / "images" / "2.png").write_bytes((images / "images" / "1.png").read_bytes())
    main(["folder", "--root", str(images), "--out", str(tmp_path / "shards")])
    leaking = set()
    for seed in range(5):
        out = tmp_path / f"{seed}.json"
        root = str(tmp_path / "shards")
        main(["split", "--root", root, "--validation", "0.34", "--seed", str(seed), "--out", str(out)])
        notes = json.loads(out.read_text())
        assert notes["made_by"].endswith(f"split --validation 0.34 --labeled 0.5 --seed {seed}")
        assert (notes["kind"], notes["seed"], notes["dataset"]) == ("random", seed, "shards")
        expected = len(leaks(read_split(out), ShardFolder.open(tmp_path / "shards").records))
        assert notes["validation_records_with_group_in_training"] == expected
        assert ("Use --grouped to avoid this" in capsys.readouterr().err) == (expected > 0)
        leaking.add(expected > 0)
    assert True in leaking


def test_different_split_is_never_overwritten(phantom_shards, tmp_path, capsys):
    command = ["split", "--root", str(phantom_shards.folder), "--out", str(tmp_path / "x.json")]
    main([*command, "--seed", "1"])
    before = (tmp_path / "x.json").read_bytes()
    main([*command, "--seed", "1"])
    assert "already exists" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"x\.json: already exists with a different split"):
        main([*command, "--seed", "2"])
    assert (tmp_path / "x.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["busii"], r"^busii: unknown command\. Did you mean busi\?"),
        (["busi", "--out", "x"], r"^--root \(folder\): required"),
        (["busi", "--root", "x", "--out", "y", "--sizes", "3"], "--sizes"),
        (["phantom", "--out", "x", "--size", "8"], "^size: expected an integer from 16, got '8'$"),
        (["phantom", "--out", "x", "--count", "many"], "^count: expected a positive integer, got 'many'$"),
        (["split", "--root", "nowhere", "--out", "x.json"], "nowhere: does not exist"),
        (
            ["split", "--root", "nowhere", "--out", "x.json", "--validation", "30"],
            "^validation: expected a number from 0 to 1, got '30'$",
        ),
    ],
)
def test_invalid_command_line_is_one_line_that_names_the_option(words, expected):
    with pytest.raises(UserError, match=expected) as error:
        main(words)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", READERS)
def test_every_dataset_is_a_command_with_its_layout_in_the_help(name, capsys):
    main([name, "--help"])
    printed = capsys.readouterr().out
    assert READERS[name].__doc__.partition("\n")[0] in printed
    assert "--skip-bad" in printed
    assert "Raises" not in printed


def run_program(*words):
    command = [sys.executable, "-m", "mgcc_dist.shards", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_program_exits_with_one_line_and_code_2_on_bad_input(tmp_path):
    bad = run_program("busi", "--root", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert bad.returncode == 2
    assert (
        bad.stderr.strip()
        == f"shards: {tmp_path / 'nowhere'}: does not exist. Set --root to the folder of the dataset."
    )
    assert not (tmp_path / "out").exists()
    helped = run_program("split", "--help")
    assert helped.returncode == 0
    assert "--grouped" in helped.stdout


def test_unwritable_output_is_one_line(images, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: is a file\. Set --out to a folder"):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "file")])
    with pytest.raises(UserError, match="Not a directory"):
        main(["folder", "--root", str(images), "--out", str(tmp_path / "file" / "out")])


def test_moved_dataset_reuses_the_shard_folder(images, tmp_path):
    first = write_shards(folder(images), tmp_path / "out", size=16)
    images.rename(tmp_path / "moved")
    rerun = write_shards(folder(tmp_path / "moved"), tmp_path / "out", size=16)
    assert rerun.index == first.index
