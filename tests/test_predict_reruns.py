"""`mgcc predict` again into the same folder: nothing that somebody else wrote or changed is lost."""

import json

import pytest
from PIL import Image
from predict_runs import bytes_in, files_in, noise, predict, read_csv, save_run

from mgcc_dist.common.errors import UserError


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


def test_rerun_of_an_interrupted_prediction_completes_it(run, images):
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    out = predict(run, images)
    first = bytes_in(out)
    (out / "predictions.csv").unlink()  # as a run leaves it that was killed
    (out / "masks" / "a.png").unlink()
    predict(run, images)
    assert bytes_in(out) == first


def test_interrupted_prediction_has_no_table(run, images):
    """The table of an earlier, finished prediction is removed too."""
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    out = predict(run, images)
    (images / "b.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"b\.png"):
        predict(run, images)
    assert not (out / "predictions.csv").exists()


def test_an_image_that_was_changed_is_predicted_again_and_an_edited_mask_is_kept(run, images):
    for name in ("a.png", "b.png"):
        Image.fromarray(noise(20, 20)).save(images / name)
    out = predict(run, images)
    (out / "masks" / "b.png").write_bytes(b"corrected by hand")
    Image.fromarray(noise(30, 10)).save(images / "a.png")
    predict(run, images)
    assert {row["file"]: row["width"] for row in read_csv(out / "predictions.csv")} == {"a.png": "30", "b.png": "20"}
    assert Image.open(out / "masks" / "a.png").size == (30, 10)
    assert (out / "masks" / "b.png").read_bytes() == b"corrected by hand"


def test_masks_do_not_pass_for_images(run, images, tmp_path):
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    out = predict(run, images)
    for folder in (out, out / "masks"):
        with pytest.raises(UserError, match=rf"--images {folder}: {out} holds predictions\. Give the folder of the"):
            predict(run, folder, "--out", str(tmp_path / "again"))
    assert not (tmp_path / "again").exists()


def test_what_a_kill_leaves_of_a_file_does_not_count_as_changed_by_hand(run, images, caplog):
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    out = predict(run, images)
    (out / "predictions.csv").unlink()
    (out / "masks" / ".a.png.123.tmp").write_bytes(b"half a ma")
    predict(run, images)
    assert "kept" not in caplog.text


def test_links_to_missing_images_are_unreadable_images(run, images):
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    (images / "b.png").symlink_to("nowhere.png")
    with pytest.raises(UserError, match=r"b\.png: links to a file that does not exist\. Fix it or pass --skip-bad"):
        predict(run, images)
    out = predict(run, images, "--skip-bad")
    assert [row["file"] for row in read_csv(out / "predictions.csv")] == ["a.png"]


def test_predictions_of_other_weights_or_images_need_overwrite(run, images, tmp_path):
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    out = predict(run, images)
    before = bytes_in(out)
    others = tmp_path / "others"
    others.mkdir()
    Image.fromarray(noise(21, 20)).save(others / "b.png")
    save_run(tmp_path / "run", seed=1)
    for folder, differing in ((images, "weights_sha256"), (others, "images and weights_sha256")):
        with pytest.raises(UserError, match=rf"holds predictions with other {differing} \(see its predict\.json\)"):
            predict(run, folder)
    assert bytes_in(out) == before
    predict(run, others, "--overwrite")
    outputs = ["masks/b.png", "overlays/b.png", "predict.json", "predictions.csv", "written.jsonl"]
    assert files_in(out) == sorted([".lock", "images.jsonl", *outputs])
    assert json.loads((out / "predict.json").read_text())["images"] == str(others)


def test_the_same_weights_in_another_folder_are_the_same_prediction(run, images, capsys):
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    before = bytes_in(predict(run, images))
    run.rename(run.with_name("moved"))
    assert bytes_in(predict(run.with_name("moved"), images)) == before
    assert "nothing to do" in capsys.readouterr().err


def test_finished_prediction_is_left_as_it_is_with_its_corrections(run, images, capsys):
    for name in ("a.png", "b.png"):
        Image.fromarray(noise(20, 20)).save(images / name)
    out = predict(run, images)
    (out / "masks" / "a.png").write_bytes(b"corrected by hand")
    (out / "predictions.csv").write_text("file,reader\na.png,me\nb.png,me\n")
    (out / "masks" / "notes.txt").write_text("mine")
    before = bytes_in(out)
    predict(run, images)
    assert f"{out}/predictions.csv already exists; nothing to do" in capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"--overwrite: 3 files .*: masks/a\.png, masks/notes\.txt, predictions\.csv\. M"
    ):
        predict(run, images, "--overwrite")
    assert bytes_in(out) == before


def test_corrected_mask_is_kept_and_named_while_a_prediction_is_completed(run, images, capsys):
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(noise(20, 20)).save(images / name)
    out = predict(run, images)
    written = bytes_in(out)
    (out / "masks" / "a.png").write_bytes(b"corrected by hand")
    (out / "masks" / "b.png").unlink()
    (images / "c.png").rename(images / "d.png")  # c's files are stale, d's do not exist
    (out / "masks" / "c.png").write_bytes(b"corrected by hand, too")
    predict(run, images)
    log = capsys.readouterr().err
    assert "kept 2 files changed since, or not written by `mgcc predict`: masks/c.png, masks/a.png." in log
    now = bytes_in(out)
    assert now["masks/a.png"] == b"corrected by hand"
    assert now["masks/c.png"] == b"corrected by hand, too"
    assert now["masks/b.png"] == written["masks/b.png"]
    assert now["masks/d.png"] == written["masks/c.png"]
    assert "overlays/c.png" not in now
    assert [row["file"] for row in read_csv(out / "predictions.csv")] == ["a.png", "b.png", "d.png"]


def test_outputs_of_an_image_that_can_no_longer_be_read_are_deleted_unless_they_were_corrected(run, images, capsys):
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(noise(20, 20)).save(images / name)
    out = predict(run, images)
    (out / "masks" / "b.png").write_bytes(b"corrected by hand")
    for name in ("a.png", "b.png"):
        (images / name).write_bytes(b"damaged")
    (out / "masks" / "c.png").write_bytes(b"")  # what a loss of power may leave
    predict(run, images, "--skip-bad")
    assert files_in(out / "masks") == ["b.png", "c.png"]
    assert files_in(out / "overlays") == ["c.png"]
    assert (out / "masks" / "c.png").stat().st_size
    assert "kept 1 file changed since, or not written by `mgcc predict`: masks/b.png." in capsys.readouterr().err


def test_changed_table_is_not_replaced_when_images_are_added(run, images):
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    out = predict(run, images)
    (out / "predictions.csv").write_text("file,reader\na.png,me\n")
    Image.fromarray(noise(20, 20)).save(images / "b.png")
    before = bytes_in(out)
    with pytest.raises(
        UserError, match=r"predictions\.csv: was changed, or not written by this version.* Move it else"
    ):
        predict(run, images)
    assert bytes_in(out) == before


def test_output_without_a_list_of_hashes_is_never_overwritten(run, images):
    """Of a version that wrote no list: any mask may have been corrected."""
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    out = predict(run, images)
    (out / "written.jsonl").unlink()
    before = bytes_in(out)
    predict(run, images)
    with pytest.raises(UserError, match="--overwrite: 3 files in"):
        predict(run, images, "--overwrite")
    assert bytes_in(out) == before


@pytest.mark.parametrize("options", [[], ["--overwrite"]])
def test_folder_with_other_files_is_never_written_to(run, images, options):
    """Ground truth in OUT/masks, say."""
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    truth = run.parent / "out" / "masks" / "a.png"
    truth.parent.mkdir(parents=True)
    truth.write_bytes(b"truth")
    with pytest.raises(UserError, match=r"holds 'masks' and is not a folder of predictions\. Choose another --out"):
        predict(run, images, *options)
    assert truth.read_bytes() == b"truth"
    assert files_in(run.parent / "out") == ["masks/a.png"]
