"""`mgcc shards`: conversion, reruns, bad files, errors."""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.convert import UNFINISHED, write_shards
from mgcc_dist.data.readers.folder import folder
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.readers.registry import READERS
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.shards import main


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


def test_folder_keeps_original_sizes_by_default(image_folder, tmp_path, capsys):
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out"), "--per-shard", "4"])
    assert f"{tmp_path / 'out'}: 6 records (6 unknown)" in capsys.readouterr().out
    shards = ShardFolder.open(tmp_path / "out")
    assert [shard["name"] for shard in shards.index["shards"]] == ["out-000000.tar", "out-000001.tar"]
    sample = shards[shards.index_of("4")]
    assert sample.image.shape == sample.mask.shape == (30, 40)
    assert [shards.records[i].group for i in range(6)] == ["0", "1", "2", "3", "4", "3"]


def test_size_stretches_image_and_mask_and_keeps_the_original_size_in_meta(image_folder, tmp_path):
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out"), "--size", "20"])
    shards = ShardFolder.open(tmp_path / "out")
    for i in range(6):
        sample = shards[i]
        assert sample.image.shape == sample.mask.shape == (20, 20)
        assert set(np.unique(sample.mask)) == {0, 255}
        assert sample.meta["original_size"] == [40, 30]


def test_unlabeled_folder_gives_unlabeled_records(image_folder, tmp_path, capsys):
    for mask in (image_folder / "masks").iterdir():
        mask.unlink()
    (image_folder / "masks").rmdir()
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")])
    assert "6 without a mask" in capsys.readouterr().out
    assert ShardFolder.open(tmp_path / "out").index["labeled"] == 0


def test_phantoms_have_three_classes_and_reproducible_bytes(tmp_path):
    for out in ("a", "b"):
        main(["phantom", "--count", "30", "--seed", "5", "--size", "32", "--out", str(tmp_path / out)])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert set(ShardFolder.open(tmp_path / "a").index["classes"]) == {"benign", "malignant", "normal"}


def add_bad_files(image_folder):
    """Add one unusable file of each kind; return their names."""
    (image_folder / "images" / "0.png").write_bytes(b"no image")
    Image.new("L", (41, 30)).save(image_folder / "masks" / "1.png")
    (image_folder / "masks" / "2.png").rename(image_folder / "masks" / "2_.png")
    (image_folder / "images" / "more").mkdir()
    (image_folder / "masks" / "more").mkdir()
    Image.new("L", (40, 30)).save(image_folder / "images" / "more" / "3.png")
    Image.new("L", (40, 30)).save(image_folder / "masks" / "more" / "3.png")
    return {"images/0.png", "masks/1.png", "images/2.png", "masks/2_.png", "images/more/3.png"}


def test_bad_file_is_an_error_with_its_name_and_advice(image_folder, tmp_path):
    add_bad_files(image_folder)
    with pytest.raises(
        UserError, match=r"2_\.png: has no image \(the nearest name is '2'\) \(2 more bad files\)\. Fix"
    ):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")])
    (image_folder / "masks" / "2_.png").rename(image_folder / "masks" / "2.png")
    (image_folder / "images" / "more" / "3.png").unlink()
    (image_folder / "masks" / "more" / "3.png").unlink()
    with pytest.raises(UserError, match=r"0\.png: not a readable image.*\. Fix it or pass --skip-bad"):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")])
    (image_folder / "images" / "0.png").unlink()
    (image_folder / "masks" / "0.png").unlink()
    with pytest.raises(UserError, match=r"masks/1\.png: is 41x30 but its image is 40x30\. Fix it or pass --skip-bad"):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")])
    with pytest.raises(UserError, match="incomplete"):
        ShardFolder.open(tmp_path / "out")


def test_skip_bad_lists_bad_files_and_converts_the_others(image_folder, tmp_path, capsys):
    bad = add_bad_files(image_folder)
    main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out"), "--skip-bad"])
    listed = json.loads((tmp_path / "out" / "skipped.json").read_text())
    assert {os.path.relpath(entry["file"], image_folder) for entry in listed} == bad
    assert all(entry["problem"] for entry in listed)
    assert "5 files skipped" in capsys.readouterr().err
    # Image 3 stays: the later file of the same key is the bad one.
    assert ShardFolder.open(tmp_path / "out").keys() == ["3", "4", "5"]


def test_no_usable_file_is_an_error_and_writes_no_index(image_folder, tmp_path):
    for path in (image_folder / "images").iterdir():
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"none of the 6 files is usable\. The first error is .*0\.png: not a readable"):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out"), "--skip-bad"])
    assert not (tmp_path / "out" / "index.json").exists()


def test_rerun_keeps_a_complete_folder(image_folder, tmp_path, capsys):
    command = ["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")]
    main(command)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    main(command)
    assert "already exists" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_other_arguments_or_files_never_overwrite_a_complete_folder(image_folder, tmp_path):
    command = ["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")]
    main(command)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="made with size null, not 16"):
        main([*command, "--size", "16"])
    with pytest.raises(UserError, match='made with reader "folder", not "phantom"'):
        main(["phantom", "--out", str(tmp_path / "out")])
    Image.new("L", (40, 30)).save(image_folder / "images" / "6.png")
    Image.new("L", (40, 30)).save(image_folder / "masks" / "6.png")
    with pytest.raises(UserError, match=r"stale, files .* have changed since it was made \(12 files then, 14 now\)"):
        main(command)
    assert contents(tmp_path / "out") == before


def test_an_edited_mask_makes_the_folder_stale(image_folder, tmp_path):
    command = ["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")]
    main(command)
    before = contents(tmp_path / "out")
    mask = image_folder / "masks" / "3.png"
    size = mask.stat().st_size
    edited = bytearray(Image.open(mask).tobytes())
    edited[0] = 255
    Image.frombytes("L", (40, 30), bytes(edited)).save(mask)
    mask.write_bytes(mask.read_bytes().ljust(size, b"\0"))  # the size may stay
    with pytest.raises(UserError, match="out: stale, files of the data set have changed"):
        main(command)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("masks", [{}, [], {"keys": 3, "masks": 6, "median_lesion_area": None}], ids=str)
def test_a_damaged_summary_of_masks_is_one_line(image_folder, tmp_path, masks):
    command = ["folder", "--root", str(image_folder), "--out", str(tmp_path / "out"), "--groups", "none"]
    main(command)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    del index["skipped"]
    (tmp_path / "out" / "index.json").write_text(json.dumps(index | {"masks": masks}))
    with pytest.raises(UserError, match=r"index\.json: its 'masks' are damaged .*\. Choose another --out\.$"):
        main(command)


def test_a_folder_of_version_0_1_is_not_kept(image_folder, tmp_path):
    command = ["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")]
    main(command)
    index = tmp_path / "out" / "index.json"
    index.write_text(index.read_text().replace("contents_sha256", "names_and_sizes_sha256"))
    with pytest.raises(UserError, match=r"out: made by version 0\.1, which read and resized masks in another way"):
        main(command)


@pytest.mark.parametrize("name", ["thesis.tex", "out-000000.tar", "skipped.json", ".notes.tmp"])
def test_folder_with_foreign_files_is_not_touched(image_folder, tmp_path, name):
    """Also not one whose index.json was lost, or whose files have the names of a conversion's."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("x")
    with pytest.raises(
        UserError, match=rf"out: contains '{re.escape(name)}', which no interrupted conversion of 'out'"
    ):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "out")])
    assert contents(tmp_path / "out") == {name: b"x"}


def test_second_conversion_into_the_same_folder_is_refused_and_touches_nothing(image_folder, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in (UNFINISHED, "out-000000.tar"):
        (out / name).write_text("x")
    hold = f"""if True:
        import pathlib, time
        from mgcc_dist.common.lock import lock
        lock(pathlib.Path({str(out)!r}))
        print("locked", flush=True)
        time.sleep(600)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"out: is in use by another process .pid {holder.pid} "):
            main(["folder", "--root", str(image_folder), "--out", str(out)])
        assert (out / "out-000000.tar").read_text() == "x"
    finally:
        holder.kill()
        holder.communicate()


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


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["busii"], r"^busii: unknown command\. Did you mean busi\?"),
        (["busi", "--out", "x"], r"^--root \(folder\): required"),
        (["busi", "--root", "x", "--out", "y", "--sizes", "3"], "--sizes"),
        (["phantom", "--out", "x", "--size", "8"], "^--size: expected an integer from 16, got '8'$"),
        (["phantom", "--out", "x", "--count", "many"], "^--count: expected a positive integer, got 'many'$"),
        (["split", "--root", "nowhere", "--out", "x.json"], "nowhere: does not exist"),
        (
            ["split", "--root", "nowhere", "--out", "x.json", "--validation", "30"],
            "^--validation: expected a number from 0 to 1, got '30'$",
        ),
    ],
)
def test_invalid_command_line_is_one_line_that_names_the_option(words, expected):
    with pytest.raises(UserError, match=expected) as error:
        main(words)
    assert "\n" not in str(error.value)


def test_newlines_in_names_leave_every_message_on_one_line(image_folder, tmp_path, capsys):
    lines = "a\nb"
    (image_folder / "images" / lines).mkdir()
    (image_folder / "images" / "0.png").rename(image_folder / "images" / lines / "0.png")
    (image_folder / "masks" / "0.png").unlink()
    (image_folder / f"{lines}.txt").write_text("other file")
    (image_folder / "images" / "1.png").rename(image_folder / "images" / f"{lines}.png")
    (image_folder / "masks" / "1.png").rename(image_folder / "masks" / f"{lines}.png")
    out = tmp_path / f"out{lines}"
    command = ["folder", "--root", str(image_folder), "--out", str(out), "--skip-bad"]
    main(command)
    main(command)
    main(["split", "--root", str(out), "--out", str(tmp_path / f"{lines}.json"), "--labeled", "1"])
    printed = capsys.readouterr()
    assert r"5 records (1 a\nb, 4 unknown)" in printed.out
    assert len(printed.out.splitlines()) == 2 * 2 + 1
    assert all(re.match(r"20\d\d-\d\d-\d\d .* (INFO|WARNING) ", line) for line in printed.err.splitlines())
    assert r"1 .txt (the first is 'a\nb.txt')" in printed.err


@pytest.mark.parametrize("name", READERS.names())
def test_every_dataset_is_a_command_with_its_layout_in_the_help(name, capsys):
    main([name, "--help"])
    printed = capsys.readouterr().out
    assert READERS.get(name).load().__doc__.partition("\n")[0] in printed
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
        == f"shards: {tmp_path / 'nowhere'}: does not exist. Set --root to the folder of the data set."
    )
    assert not (tmp_path / "out").exists()
    helped = run_program("split", "--help")
    assert helped.returncode == 0
    assert "--grouped" in helped.stdout


def test_unwritable_output_is_one_line(image_folder, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"file: is a file\. Give a folder"):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "file")])
    with pytest.raises(UserError, match=r"out: can't be created \(Not a directory\)\. Choose another --out"):
        main(["folder", "--root", str(image_folder), "--out", str(tmp_path / "file" / "out")])


def test_moved_dataset_reuses_the_shard_folder(image_folder, tmp_path):
    first = write_shards(folder(image_folder), tmp_path / "out", size=16)
    image_folder.rename(tmp_path / "moved")
    rerun = write_shards(folder(tmp_path / "moved"), tmp_path / "out", size=16)
    assert rerun.index == first.index
