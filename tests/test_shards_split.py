"""`mgcc shards split`."""

import json

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


def test_different_split_is_never_overwritten(phantom_shards, tmp_path, capsys):
    command = ["split", "--root", str(phantom_shards.folder), "--out", str(tmp_path / "x.json")]
    main([*command, "--seed", "1"])
    before = (tmp_path / "x.json").read_bytes()
    main([*command, "--seed", "1"])
    assert "already exists" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"x\.json: already exists with a different split"):
        main([*command, "--seed", "2"])
    assert (tmp_path / "x.json").read_bytes() == before
