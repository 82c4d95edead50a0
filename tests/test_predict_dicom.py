"""`mgcc predict` on DICOM: what it writes, in which geometry, and that it names nobody."""

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import highdicom
import nibabel
import numpy as np
import pydicom
import pytest
import torch
from dicom_files import region, save, ultrasound
from PIL import Image
from predict_runs import SIZE, Threshold, files_in, noise, predict, read_csv, save_run

from mgcc_dist.common.errors import UserError
from mgcc_dist.data.dicom_regions import Region
from mgcc_dist.inference import predictor, reading
from mgcc_dist.inference.nifti import NiftiWriter
from mgcc_dist.inference.output_folder import OutputFolder
from mgcc_dist.inference.reading import Frame
from mgcc_dist.inference.results import OutputOptions, SourceWriter
from mgcc_dist.inference.sources import Source, output_names

IDENTIFIERS = (b"DOE", b"JANE", b"-4711", b"19700102", b"Jane_Doe")


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run whose network finds what is brighter than middle grey."""
    monkeypatch.setattr(predictor, "load_network", lambda path: (Threshold(), SIZE))
    return save_run(tmp_path / "run")


@pytest.fixture
def images(tmp_path):
    return tmp_path / "Jane_Doe"


def cine(frames=3):
    """A bright box in the left region in all frames but the second, and one between the regions that nobody sees."""
    pixels = np.zeros((frames, 40, 100), np.uint8)
    pixels[:, 12:22, 14:24] = 255
    pixels[1:2] = 0
    pixels[:, 4:36, 46:50] = 255
    return ultrasound(pixels, regions=[region(2, 4, 33, 35, delta=(0.01, 0.02)), region(60, 4, 91, 35)])


def test_a_cine_becomes_masks_of_every_format_in_its_own_geometry(run, images, capfd):
    source = save(cine(), images / "IM1")
    options = ("--masks", "png", "nifti", "dicom-seg", "--contours", "--probabilities", "--batch", "2")
    out = predict(run, images, *options)
    uid = str(source.SOPInstanceUID)
    truth = np.zeros((3, 40, 100), bool)
    truth[0::2, 12:22, 14:24] = True

    masks = [np.asarray(Image.open(out / "masks" / uid / f"{frame:04d}.png")) > 0 for frame in (1, 2, 3)]
    np.testing.assert_array_equal(masks, truth)
    volume = nibabel.load(out / "masks" / f"{uid}.nii.gz")
    np.testing.assert_array_equal(np.asarray(volume.dataobj).transpose(2, 1, 0), truth)
    probability = np.asarray(Image.open(out / "probabilities" / uid / "0001.png"))
    np.testing.assert_array_equal(probability > 32768, truth[0])

    segmentation = highdicom.seg.segread(out / "masks" / f"{uid}.dcm")
    read = segmentation.get_pixels_by_source_frame(source.SOPInstanceUID, [1, 2, 3], ignore_spatial_locations=True)
    np.testing.assert_array_equal(read[..., 0], truth)
    assert segmentation.StudyInstanceUID == source.StudyInstanceUID
    (reference,) = segmentation.ReferencedSeriesSequence
    assert reference.SeriesInstanceUID == source.SeriesInstanceUID
    assert segmentation.get_segment_description(1).segment_label == "Lesion"

    rows = read_csv(out / "predictions.csv")
    assert [(row["frame"], row["region"], row["lesion"]) for row in rows[:3]] == [
        ("1", "1", "yes"),
        ("1", "2", "no"),
        ("2", "1", "no"),
    ]
    first = rows[0]
    assert first["file"] == uid
    assert (first["area_pixels"], first["area_mm2"], first["area_fraction"]) == ("100", "2.000", f"{100 / 1024:.6f}")
    assert float(first["longest_diameter_mm"]) == pytest.approx(np.hypot(1, 2), abs=0.2)
    contours = json.loads((out / "contours" / uid / "0001.json").read_text())
    (lesion,) = contours["regions"][0]["lesions"]
    assert np.mean(lesion["contours"][0], axis=0) == pytest.approx([19, 17], abs=0.5)

    written = b"".join((out / name).read_bytes() + name.encode() for name in files_in(out))
    logged = "".join(capfd.readouterr()).replace(str(images.parent), "").encode()
    assert not [word for word in IDENTIFIERS if word in written + logged]


def test_identifiers_are_kept_if_asked_for(run, images):
    save(cine(1), images / "IM1")
    out = predict(run, images, "--masks", "dicom-seg", "--keep-identifiers")
    assert [row["mask"] for row in read_csv(out / "predictions.csv")] == ["masks/IM1.dcm"] * 2
    assert output_names([Path("1.2.840")])[Path("1.2.840")] == "1.2.840"
    assert pydicom.dcmread(out / "masks" / "IM1.dcm").PatientName == "DOE^JANE"


def test_copies_are_left_out_and_other_files_of_one_uid_are_told_apart(run, images):
    source = save(ultrasound(noise(SIZE, SIZE)), images / "a.dcm")
    save(source, images / "copy.dcm")
    source.PixelData = bytes(SIZE * SIZE)
    save(source, images / "changed.dcm")
    files = [row["file"] for row in read_csv(predict(run, images) / "predictions.csv")]
    assert len(files) == 2
    assert all(file.startswith(str(source.SOPInstanceUID)) for file in files)


def test_bad_files_and_frames_are_named_or_skipped(run, images):
    source = save(cine(3), images / "IM1")
    content = (images / "IM1").read_bytes()
    (images / "IM1").write_bytes(content[:-1000])  # within the last frame
    (images / "empty.dcm").touch()
    with pytest.raises(UserError, match=r"IM1: the pixels of frame 3 can't be decoded .*\. Fix it or pass --skip-bad"):
        predict(run, images)
    out = predict(run, images, "--skip-bad", "--masks", "nifti", "--overwrite")
    skipped = {row["file"]: row["problem"] for row in read_csv(out / "skipped.csv")}
    assert "frame 3" in skipped.pop(str(source.SOPInstanceUID))
    ((name, problem),) = skipped.items()
    assert name.startswith("sha256-")
    assert "the file is empty" in problem
    (mask,) = (out / "masks").glob("*.nii.gz")
    assert [frame.any() for frame in np.asarray(nibabel.load(mask).dataobj).transpose(2, 0, 1)] == [True, False, False]
    assert len(read_csv(out / "predictions.csv")) == 4


def test_files_and_a_list_on_standard_input(run, images, monkeypatch):
    for name in ("a.png", "b/a.png", "b/c.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(SIZE, SIZE)).save(images / name)
    out = predict(run, [images / "a.png", images / "b"], "--spacing", "0.5")
    assert files_in(out / "masks") == ["a.png", "b/a.png", "b/c.png"]
    row = read_csv(out / "predictions.csv")[0]
    assert float(row["area_mm2"]) == int(row["area_pixels"]) / 4
    (images / "notes.txt").write_text("neither an image nor DICOM")
    listed = "\n".join(str(images / name) for name in ("a.png", "b/c.png", "notes.txt", "gone.dcm")).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
    predict(run, "-", "--overwrite", "--skip-bad")
    assert files_in(out / "masks") == ["a.png", "b/c.png"]
    ((name, problem),) = [row.values() for row in read_csv(out / "skipped.csv")]
    assert name.startswith("sha256-")
    assert problem == "does not exist"


def test_relative_paths_stay_in_the_output_folder(run, images, monkeypatch):
    for name in ("a/1.png", "b/2.png"):
        (images / name).parent.mkdir(parents=True)
        Image.fromarray(noise(SIZE, SIZE)).save(images / name)
    monkeypatch.chdir(images / "a")
    out = predict(run, [Path("1.png"), Path("../b/2.png")])
    assert files_in(out / "masks") == ["a/1.png", "b/2.png"]


def test_an_image_that_dicom_seg_cannot_refer_to_is_skipped(run, images):
    save(cine(1), images / "a.dcm")
    unreferenced = cine(1)
    del unreferenced.SeriesInstanceUID
    save(unreferenced, images / "b.dcm")
    out = predict(run, images, "--masks", "dicom-seg", "--skip-bad")
    assert len(files_in(out / "masks")) == 1
    assert "has no SeriesInstanceUID" in read_csv(out / "skipped.csv")[0]["problem"]


def test_a_folder_of_damaged_dicom_is_not_named(run, images):
    images.mkdir()
    (images / "a.dcm").write_bytes(b"damaged")
    with pytest.raises(UserError, match="of 1 image none can be read"):
        predict(run, images, "--skip-bad")
    assert "Jane" not in (run.parent / "out" / "predict.json").read_text()


def writer(out, frames=1, **options):
    """A writer of a DICOM source of 4x6 pixels with two regions that overlap, and its first frame."""
    image = SimpleNamespace(frames=frames)
    regions = (Region(slice(0, 4), slice(0, 4), None), Region(slice(0, 4), slice(2, 6), None))
    frame = Frame(0, 0, (4, 6), regions, (), np.zeros((4, 6), np.uint8))
    out.mkdir(exist_ok=True)
    source = Source(Path("a.dcm"), "a", "a", image)
    return SourceWriter(OutputFolder(out, {}), source, 1, frame, OutputOptions(**options), ""), frame


def test_where_regions_overlap_the_higher_probability_counts(tmp_path):
    files, frame = writer(tmp_path / "out", probabilities=True)
    with files:
        files.write(frame, [torch.ones(4, 4), torch.zeros(4, 4)], "stretch")
    for kind, highest in (("masks", 255), ("probabilities", 65535)):
        pixels = np.asarray(Image.open(tmp_path / "out" / kind / "a.png"))
        np.testing.assert_array_equal(pixels, [[highest] * 4 + [0] * 2] * 4)


def test_a_cine_that_the_disk_cannot_hold_is_an_error_and_leaves_nothing(small_disk):
    """Writing to a memory map on a full disk would kill the process."""
    small_disk.resize("100k")
    files, _ = writer(small_disk.folder, frames=30_000, masks=("nifti", "dicom-seg"))
    with pytest.raises(OSError, match="No space left"), files:
        pass
    assert files_in(small_disk.folder) == []


def test_nifti_refuses_what_its_header_cannot_say(tmp_path):
    with pytest.raises(UserError, match="--masks nifti: holds at most 32767 pixels per side and frames"):
        NiftiWriter(tmp_path / "a.nii.gz", (1, 2**15), 1, None)


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("clip.mp4", [], r"clip\.mp4: is a video\. Save its frames as images first"),
        ("notes.txt", [], r"notes\.txt: neither an image .* nor DICOM"),
        ("a.png", ["--masks", "dicom-seg"], r"--masks dicom-seg: refers to the DICOM file"),
        ("a.png", ["--spacing", "1e-30"], r"--spacing 1e-30: is not from 1e-05 to 1000 mm per pixel"),
        ("a.png", ["--spacing", "1", "2", "3"], r"--spacing: got 3 numbers\. Give one, or one for x"),
    ],
)
def test_input_that_does_not_fit_is_refused_with_advice(run, tmp_path, name, options, problem):
    (tmp_path / name).write_bytes(b"content")
    with pytest.raises(UserError, match=problem):
        predict(run, tmp_path / name, *options)
    assert not (tmp_path / "out").exists()


def test_options_that_change_the_output_do_not_pass_for_finished(run, images):
    images.mkdir()
    Image.fromarray(noise(SIZE, SIZE)).save(images / "a.png")
    predict(run, images)
    with pytest.raises(UserError, match=r"with other contours \(see its predict\.json\)"):
        predict(run, images, "--contours")


def test_overlays_of_large_images_are_reduced_and_masks_are_not(run, images, monkeypatch):
    monkeypatch.setattr(reading, "MAX_OVERLAY", 40)
    images.mkdir()
    Image.fromarray(noise(100, 60)).save(images / "a.png")
    out = predict(run, images)
    assert Image.open(out / "overlays" / "a.png").size == (40, 24)
    assert Image.open(out / "masks" / "a.png").size == (100, 60)
