"""`mgcc shards split`."""

import json
import shutil

import pytest

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import leaks, read_split
from mgcc_dist.shards import main


def test_grouped_split_of_a_shard_folder_keeps_groups_together(image_folder, tmp_path, capsys):
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "shards")])
    command = ["split", "--root", str(tmp_path / "shards"), "--validation", "0.34", "--labeled", "0.5"]
    for seed in range(6):
        out = tmp_path / f"split-{seed}.json"
        main([*command, "--seed", str(seed), "--out", str(out), "--grouped"])
        split = read_split(out)
        assert (len(split.labeled), len(split.unlabeled), len(split.validation)) == (2, 2, 2)
        assert leaks(split, ShardFolder.open(tmp_path / "shards").records) == []
    assert split.name == "split-5"
    assert "2 labeled, 2 unlabeled, 2 validation" in capsys.readouterr().out


def test_split_of_a_partly_labeled_folder_uses_images_without_masks_as_unlabeled(image_folder, tmp_path, capsys):
    for i in range(1, 5):
        (image_folder / "masks" / f"{i}.png").unlink()
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "shards")])
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


def test_split_of_images_without_masks_is_for_a_generative_model(image_folder, tmp_path, capsys):
    shutil.rmtree(image_folder / "masks")
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "shards")])
    main(["split", "--root", str(tmp_path / "shards"), "--out", str(tmp_path / "s.json"), "--validation", "0.34"])
    printed = capsys.readouterr()
    assert "0 labeled, 4 unlabeled, 2 validation" in printed.out
    assert "no record has a mask. The split is for `mgcc ldm`; `mgcc segment` needs masks" in printed.err
    assert len(read_split(tmp_path / "s.json").validation) == 2


def test_split_file_documents_its_command_and_its_leaks(image_folder, tmp_path, capsys):
    (image_folder / "images" / "0.png").write_bytes((image_folder / "images" / "1.png").read_bytes())
    (image_folder / "images" / "2.png").write_bytes((image_folder / "images" / "1.png").read_bytes())
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "shards")])
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--root {data}", "data: not a shard folder, it has no index.json. Convert its images with `mgcc shards`."),
        ("--root {shards}/index.json", "index.json: is a file. Pass the shard folder."),
        ("--root nowhere", "nowhere: does not exist. Create it with `mgcc shards`"),
        ("--root {shards} --out {data}", "data: is a folder. Set --out to a JSON file."),
        ("--root {shards} --out {shards}/index.json", "index.json: already exists and is not a split file"),
        ("--root {shards} --validation 0", "x: cannot take 0 validation and 12 labeled training records from 24"),
        ("--root {shards} --validation 1", "x: cannot take 24 validation and 1 labeled training records from 24"),
        ("--root {shards} --labeled 0", "x: cannot take 7 validation and 0 labeled training records from 24"),
        ("{shards}", "shards: unexpected argument. Options begin with --."),
        ("--root {shards} --validation", "--validation: a value is missing. Give a number from 0 to 1."),
        ("--root {shards} --labelled 1", "--labelled: unknown option. Did you mean --labeled?"),
    ],
)
def test_misuse_of_split_is_one_line_that_says_what_to_do(phantom_shards, image_folder, tmp_path, words, message):
    words = words.format(data=image_folder, shards=phantom_shards.folder).split()
    out = [] if "--out" in words else ["--out", str(tmp_path / "x.json")]
    with pytest.raises(UserError) as error:
        main(["split", *words, *out])
    assert message in str(error.value)
    assert not (tmp_path / "x.json").exists()


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
    ("out", "line"),
    [
        ("file/split.json", r"--out .*file: is a file\. Give a folder\."),
        ("file", r"file: already exists and is not a split file\. Choose another --out\."),
    ],
)
def test_out_that_is_another_file_is_kept_and_named(phantom_shards, tmp_path, out, line):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=line):
        main(["split", "--root", str(phantom_shards.folder), "--out", str(tmp_path / out)])
    assert (tmp_path / "file").read_text() == "mine"
