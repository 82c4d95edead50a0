"""`mgcc predict`: images of every kind, masks at their own size, tables, overlays, errors."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from predict_runs import SIZE, Threshold, bytes_in, files_in, noise, predict, read_csv, save_run

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.dicom_regions import Region
from mgcc_dist.evaluation.temperature import calibrate
from mgcc_dist.inference import predictor
from mgcc_dist.inference.loading import load_predictor
from mgcc_dist.inference.overlay import overlay
from mgcc_dist.inference.predictor import NetworkInput, Predictor
from mgcc_dist.inference.results import restore_region
from mgcc_dist.inference.sources import output_names
from mgcc_dist.inference.uncertainty import Members, agreement, disagreement
from mgcc_dist.predict import main


@pytest.fixture
def run(tmp_path):
    return save_run(tmp_path / "run")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def network(monkeypatch):
    """Replace the run's network."""

    def use(module):
        monkeypatch.setattr(predictor, "load_network", lambda path: (module, SIZE))

    return use


KINDS = {
    "grey.png": lambda: Image.fromarray(noise(40, 30)),
    "rgb.png": lambda: Image.fromarray(noise(31, 47, 3)),
    "rgba.png": lambda: Image.fromarray(noise(33, 20, 4)),
    "palette.png": lambda: Image.fromarray(noise(64, 48, 3)).convert("P"),
    "bits16.png": lambda: Image.fromarray(noise(50, 21).astype(np.uint16) * 257),
    "bilevel.png": lambda: Image.fromarray(noise(20, 22)).convert("1"),
    "grey.jpg": lambda: Image.fromarray(noise(41, 30)),
    "rgb.jpeg": lambda: Image.fromarray(noise(42, 30, 3)),
    "rgb.bmp": lambda: Image.fromarray(noise(43, 30, 3)),
    "grey.tif": lambda: Image.fromarray(noise(44, 30)),
    "bits16.tiff": lambda: Image.fromarray(noise(45, 30).astype(np.uint16) * 257),
    "LOUD.PNG": lambda: Image.fromarray(noise(46, 30)),
    "one pixel.png": lambda: Image.fromarray(noise(1, 1)),
    "large.png": lambda: Image.fromarray(noise(301, 203)),
}


def test_every_kind_of_image_gives_a_mask_and_an_overlay_of_its_own_size(run, images):
    for name, make in KINDS.items():
        make().save(images / name)
    rows = {row["file"]: row for row in read_csv(predict(run, images, "--batch", "3") / "predictions.csv")}
    assert sorted(rows) == sorted(KINDS)
    for name, make in KINDS.items():
        row = rows[name]
        with Image.open(run.parent / "out" / row["mask"]) as mask:
            assert (mask.format, mask.mode, mask.size) == ("PNG", "L", make().size)
            assert set(np.unique(np.asarray(mask))) <= {0, 255}
            assert int(row["area_pixels"]) == np.count_nonzero(np.asarray(mask))
        with Image.open(run.parent / "out" / row["mask"].replace("masks", "overlays", 1)) as drawn:
            assert (drawn.format, drawn.mode, drawn.size) == ("PNG", "RGB", make().size)
        assert (int(row["width"]), int(row["height"])) == make().size


def test_mask_aligns_with_the_lesion_at_any_image_size(run, images, network):
    """A bright rectangle, off centre, in wide and high, small and large images."""
    network(Threshold())
    for width, height in ((300, 100), (100, 300), (16, 24), (32, 32)):
        image = np.zeros((height, width), np.uint8)
        image[height // 8 : height // 2, width // 4 : width * 7 // 8] = 255
        Image.fromarray(image).save(images / f"{width}.png")
    out = predict(run, images)
    for path in images.iterdir():
        truth = np.asarray(Image.open(path)) > 0
        mask = np.asarray(Image.open(out / "masks" / path.name)) > 0
        assert (truth & mask).sum() / (truth | mask).sum() > 0.9, path.name


def test_probability_is_smooth_between_the_networks_pixels():
    """Resizing the mask instead, or picking the nearest pixel, would give stairs."""
    ramp = np.repeat(np.arange(0, 8 * SIZE, 8, dtype=np.uint8)[None], SIZE, axis=0)
    image = NetworkInput(np.zeros((50, 7 * SIZE), np.uint8), ramp)
    (probability,) = Predictor(Threshold(gain=1.0), SIZE, precision="no").probabilities([image])
    assert probability.shape == (50, 7 * SIZE)
    assert (np.diff(probability[25, 4:-4]) > 0).all()


def test_csv_says_area_fraction_confidence_and_lesion(run, images, network):
    network(Threshold(gain=1.0))  # white has the probability 1 / (1 + 1/e), black 1 / (1 + e)
    half = np.zeros((SIZE, SIZE), np.uint8)
    half[:, : SIZE // 2] = 255
    Image.fromarray(half).save(images / "half.png")
    Image.fromarray(np.zeros((8, 10), np.uint8)).save(images / "black.png")
    black, half = read_csv(predict(run, images) / "predictions.csv")
    assert list(half)[:8] == ["file", "mask", "width", "height", "area_pixels", "area_fraction", "confidence", "lesion"]
    assert half["area_pixels"] == str(SIZE * SIZE // 2)
    assert half["area_fraction"] == "0.500000"
    assert half["confidence"] == "0.7311"
    assert half["lesion"] == "yes"
    assert {name: black[name] for name in list(black)[:8]} == {
        "file": "black.png",
        "mask": "masks/black.png",
        "width": "10",
        "height": "8",
        "area_pixels": "0",
        "area_fraction": "0.000000",
        "confidence": "0.7311",  # 1 - 1 / (1 + e)
        "lesion": "no",
    }


def test_confidence_is_the_mean_only_inside_the_mask():
    square = torch.tensor([[0.9, 0.7], [0.1, 0.5]])
    result = restore_region(square, Region(slice(0, 2), slice(0, 2), None), np.zeros((2, 2), np.uint8), None, "stretch")
    assert result.confidence == pytest.approx(0.8)


@pytest.mark.parametrize("weights", ["best", "last"])
def test_saved_best_and_last_weights_are_used(run, images, weights):
    """Its own forward pass, done by hand at the training size, gives the same mask."""
    Image.fromarray(noise(SIZE, SIZE)).save(images / "a.png")
    module, size = load_predictor(run, weights)
    assert size == SIZE
    with torch.no_grad():
        logits = module(torch.from_numpy(noise(SIZE, SIZE))[None, None] / 127.5 - 1)
    out = predict(run, images, "--weights", weights, "--precision", "no")
    mask = np.asarray(Image.open(out / "masks" / "a.png")) > 0
    np.testing.assert_array_equal(mask, logits[0, 0].numpy() > 0)
    assert 0 < mask.mean() < 1


def test_batch_size_and_workers_do_not_change_the_result(run, images, network):
    network(Threshold(gain=3.0))
    for i in range(7):
        Image.fromarray(noise(20 + i, 30)).save(images / f"{i}.png")
    contents = []
    for batch, workers in ((1, 0), (3, 2), (50, 1)):
        out = predict(run, images, "--batch", str(batch), "--overwrite", workers=workers)
        contents.append(bytes_in(out))
    assert contents[0] == contents[1] == contents[2]


def test_nested_folders_keep_their_structure_and_other_files_are_left_alone(run, images):
    (images / "patient 1" / "left").mkdir(parents=True)
    (images / ".cache").mkdir()
    for name in ("a.png", "patient 1/a.png", "patient 1/left/b.jpg", ".cache/c.png", "._a.png"):
        Image.fromarray(noise(20, 20)).save(images / name)
    (images / "notes.txt").write_text("not an image")
    out = predict(run, images)
    assert files_in(out / "masks") == ["a.png", "patient 1/a.png", "patient 1/left/b.png"]
    assert files_in(out / "overlays") == files_in(out / "masks")
    assert [row["file"] for row in read_csv(out / "predictions.csv")] == [
        "a.png",
        "patient 1/a.png",
        "patient 1/left/b.jpg",
    ]


def test_images_that_differ_only_in_suffix_get_separate_masks(run, images):
    for name in ("a.png", "a.jpg", "b.png"):
        Image.fromarray(noise(20, 20)).save(images / name)
    rows = read_csv(predict(run, images) / "predictions.csv")
    assert {row["file"]: row["mask"] for row in rows} == {
        "a.jpg": "masks/a.jpg.png",
        "a.png": "masks/a.png.png",
        "b.png": "masks/b.png",
    }


def test_images_that_would_share_a_mask_file_are_refused():
    with pytest.raises(UserError, match=r"masks of .* would both be a\.jpg\.png\. Rename"):
        output_names([Path("a.bmp"), Path("a.jpg"), Path("a.jpg.tif")])


@pytest.mark.parametrize("workers", [0, 1])
def test_error_names_the_unreadable_image(run, images, workers):
    Image.fromarray(noise(20, 20)).save(images / "good.png")
    (images / "bad.png").write_bytes((images / "good.png").read_bytes()[:60])
    with pytest.raises(UserError, match=r"images/bad\.png: .*\. Fix it or pass --skip-bad"):
        predict(run, images, workers=workers)
    assert not (run.parent / "out" / "predictions.csv").exists()


def test_skip_bad_lists_unreadable_images_and_predicts_the_others(run, images):
    Image.fromarray(noise(20, 20)).save(images / "good.png")
    (images / "bad.png").write_bytes(b"nothing")
    (images / "empty.jpg").touch()
    out = predict(run, images, "--skip-bad", "--batch", "1")
    assert [row["file"] for row in read_csv(out / "predictions.csv")] == ["good.png"]
    skipped = read_csv(out / "skipped.csv")
    assert [row["file"] for row in skipped] == ["bad.png", "empty.jpg"]
    assert all("not a readable image" in row["problem"] for row in skipped)


def test_only_unreadable_images_is_an_error_even_with_skip_bad(run, images):
    (images / "bad.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"of 1 image none can be read\. The first error is bad\.png: not a readable"):
        predict(run, images, "--skip-bad")


class Broken(Threshold):
    """Its output for images that are brighter than middle grey is NaN."""

    def forward(self, x):
        return super().forward(x) + torch.where(x.mean(dim=(1, 2, 3), keepdim=True) > 0, torch.nan, 0.0)


def test_output_that_is_not_finite_is_an_error_that_names_the_image(run, images, network):
    network(Broken())
    for name, grey in (("a.png", 10), ("b.png", 250), ("c.png", 10)):
        Image.fromarray(np.full((9, 9), grey, np.uint8)).save(images / name)
    with pytest.raises(UserError, match=r"^network: the result for 'b\.png' is not finite \(NaN or infinity\)\. Use"):
        predict(run, images)
    assert not (run.parent / "out" / "predictions.csv").exists()


def test_out_inside_images_and_images_inside_out_are_refused(run, images, tmp_path):
    Image.fromarray(noise(20, 20)).save(images / "a.png")
    for out in (images, images / "masks", tmp_path):
        with pytest.raises(UserError, match=r"contains --images|is in --images"):
            main(["--run", str(run), "--images", str(images), "--out", str(out)])
    assert files_in(images) == ["a.png"]


def test_error_names_an_empty_and_a_missing_folder(run, images):
    with pytest.raises(UserError, match=r"images: no images \(\.png, .*\)"):
        predict(run, images)
    with pytest.raises(UserError, match="nowhere: no such file or folder"):
        predict(run, images / "nowhere")
    assert not (run.parent / "out").exists()


def test_error_names_a_folder_that_is_not_a_run(images, tmp_path):
    with pytest.raises(UserError, match=r"does not exist. Name the folder"):
        predict(tmp_path / "no run", images)


def test_overlay_draws_the_border_of_the_mask_and_nothing_else():
    image = noise(40, 30)
    mask = np.zeros((30, 40), bool)
    mask[5:20, 10:30] = True
    drawn = overlay(image, mask)
    changed = (drawn != image[:, :, None]).any(axis=2)
    border = mask.copy()
    border[6:19, 11:29] = False
    np.testing.assert_array_equal(changed, border)
    np.testing.assert_array_equal(overlay(image, np.zeros_like(mask)), np.repeat(image[:, :, None], 3, axis=2))


def test_file_names_that_are_not_utf8_survive(run, images):
    name = os.fsdecode(b"caf\xe9.png")
    Image.fromarray(noise(20, 20)).save(images / name)
    out = predict(run, images)
    assert [row["file"] for row in read_csv(out / "predictions.csv")] == [name]
    assert (out / "masks" / name).is_file()


def test_command_reports_an_error_in_one_line(tmp_path):
    command = [sys.executable, "-m", "mgcc_dist.predict", "--run", str(tmp_path), "--images", ".", "--out", "x"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("predict: ")
    assert done.stderr.count("\n") == 1


def test_help_says_what_the_confidence_is(capsys):
    main(["--help"])
    assert "probability inside the mask, or for an empty mask 1 - the highest" in capsys.readouterr().out


def test_a_temperature_changes_probabilities_and_no_mask():
    square = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    region = Region(slice(0, 40), slice(0, 50), None)
    (mask, raw), (same, scaled) = ((np.zeros((40, 50), np.uint8), np.zeros((40, 50), np.uint16)) for _ in range(2))
    before = restore_region(square, region, mask, raw, "stretch")
    after = restore_region(square, region, same, scaled, "stretch", temperature=2.0)
    np.testing.assert_array_equal(mask, same)
    np.testing.assert_allclose(scaled / 65535, calibrate(raw / 65535, 2.0), atol=0.01)
    assert 0.5 < after.confidence < before.confidence


def test_uncertainty_marks_images_for_review_and_changes_no_mask(run, images):
    other = save_run(run.parent / "other", seed=1)
    for width in (32, 40, 61):
        Image.fromarray(noise(width, 32)).save(images / f"{width}.png")
    plain = bytes_in(predict(run, images, "--precision", "no") / "masks")
    predictors = [predictor.load(each, "best", "cpu", "no") for each in (run, other)]
    members = Members(predictors).squares([predictors[0].prepare(noise(width, 32)).square for width in (32, 40, 61)])
    scores = list(map(agreement, members))
    limit = sorted(scores)[1]
    options = ("--uncertainty", "ensemble", "--members", str(other), "--reject-below", str(limit), "--uncertainty-maps")
    with pytest.raises(UserError, match="with other uncertainty and members and uncertainty_maps and reject_below"):
        predict(run, images, "--precision", "no", *options)
    out = predict(run, images, "--precision", "no", "--overwrite", *options)
    rows = read_csv(out / "predictions.csv")
    assert [row["score"] for row in rows] == [f"{score:.4f}" for score in scores]
    assert [row["review"] for row in rows] == ["yes" if score < limit else "no" for score in scores]
    assert bytes_in(out / "masks") == plain
    pixels = np.asarray(Image.open(out / "uncertainty" / "32.png"))
    assert pixels.dtype == np.uint16
    np.testing.assert_allclose(pixels / 65535, disagreement(members[0]), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--reject-below", "0.5"), "--reject-below: needs a score"),
        (("--uncertainty-maps",), "--uncertainty-maps: needs a score"),
        (("--uncertainty", "ensemble"), "needs two or more runs"),
        (("--uncertainty", "decoders"), "was trained by supervised, which has no auxiliary decoders"),
        (("--calibrated",), r"calibration\.json does not exist"),
    ],
)
def test_uncertainty_that_cannot_be_computed_is_refused(run, images, options, message):
    Image.fromarray(noise(32, 32)).save(images / "a.png")
    with pytest.raises(UserError, match=message):
        predict(run, images, *options)
    assert not (run.parent / "out").exists()
