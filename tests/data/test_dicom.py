"""DICOM images: every photometric interpretation, regions, frames, compressed and damaged files."""

import io
import os
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from dicom_files import region, save, ultrasound
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.encaps import encapsulate
from pydicom.uid import HTJ2K, MPEG4HP41, DeflatedExplicitVRLittleEndian, JPEGBaseline8Bit

from mgcc_dist.data.dicom import NoImage, is_dicom, read_frames, read_header
from mgcc_dist.data.images import BadFile

RAMP = np.arange(48, dtype=np.uint8).reshape(6, 8) * 5


@pytest.fixture
def path(tmp_path):
    return tmp_path / "image.dcm"


def frames_of(path):
    header = read_header(path)
    return list(read_frames(header, range(header.frames)))


def shipped(name):
    """A file that pydicom brings for its own tests."""
    return Path(get_testdata_file(f"{name}.dcm", download=False))


def grey_of(colour):
    return np.asarray(Image.fromarray(colour).convert("L"))


def test_monochrome1_is_inverted(path):
    save(ultrasound(RAMP, "MONOCHROME1"), path)
    np.testing.assert_array_equal(frames_of(path), [255 - RAMP])


def test_colour_becomes_luminance(path):
    colour = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    save(ultrasound(colour, "RGB"), path)
    np.testing.assert_array_equal(frames_of(path), [grey_of(colour)])


def test_ybr_is_converted_before_it_becomes_grey(path):
    ybr = np.asarray(Image.fromarray(np.full((6, 8, 3), (200, 80, 20), np.uint8)).convert("YCbCr"))
    save(ultrasound(ybr, "YBR_FULL"), path)
    assert frames_of(path)[0] == pytest.approx(grey_of(np.full((6, 8, 3), (200, 80, 20), np.uint8)).astype(int), abs=1)


def test_palette_colours_become_luminance(path):
    table = np.random.default_rng(0).integers(0, 256, (3, 256), dtype=np.uint8)
    luts = {}
    for name, lut in zip(("Red", "Green", "Blue"), table, strict=True):
        luts[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 8]
        luts[f"{name}PaletteColorLookupTableData"] = lut.tobytes()
    save(ultrasound(RAMP, "PALETTE COLOR", **luts), path)
    np.testing.assert_array_equal(frames_of(path), [grey_of(table.T[RAMP])])


def test_deep_grey_is_scaled_by_the_bits_stored_or_by_the_window(path):
    deep = RAMP.astype(np.uint16) * 16
    save(ultrasound(deep, bits=12), path)
    np.testing.assert_array_equal(frames_of(path), [RAMP])
    save(ultrasound(deep, bits=12, WindowCenter=1000, WindowWidth=101), path)
    windowed = frames_of(path)[0]
    assert windowed[deep < 949].max() == 0
    assert windowed[deep > 1051].min() == 255


@pytest.mark.parametrize(
    "name", ["SC_rgb_rle_2frame", "SC_ybr_full_422_uncompressed", "JPEGLSNearLossless_08", "JPEG2000", "image_dfl"]
)
def test_files_of_other_programs_are_read(name):
    frames = frames_of(shipped(name))
    assert len(frames) == (2 if "2frame" in name else 1)
    assert all(isinstance(frame, np.ndarray) and frame.std() > 0 for frame in frames)


def test_two_dimensional_regions_give_boxes_and_millimetres(path):
    """Without the spectrum, the colour box inside the image, and the deltas that are not lengths."""
    regions = [
        region(0, 0, 3, 5, delta=(0.01, 0.02)),
        region(4, 1, 99, 4, units=0),
        region(0, 0, 7, 5, spatial=3),
        region(1, 1, 2, 2, kind=2),
    ]
    save(ultrasound(RAMP, regions=regions), path)
    assert read_header(path).regions == (
        (slice(0, 6), slice(0, 4), pytest.approx((0.1, 0.2))),
        (slice(1, 5), slice(4, 8), None),
    )


def test_without_regions_the_image_is_seen_with_its_pixel_spacing(path):
    save(ultrasound(RAMP, PixelSpacing=[0.5, 0.25]), path)
    assert read_header(path).regions == ((slice(0, 6), slice(0, 8), (0.25, 0.5)),)
    save(ultrasound(RAMP), path)
    assert read_header(path).regions == ((slice(0, 6), slice(0, 8), None),)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ({"PhysicalDeltaX": -0.01}, (slice(0, 6), slice(0, 4), pytest.approx((0.1, 0.2)))),
        ({"PhysicalDeltaX": 0.0}, (slice(0, 6), slice(0, 4), None)),
        ({"PhysicalDeltaX": 1e300}, (slice(0, 6), slice(0, 4), None)),
        ({"PhysicalDeltaX": 1e-310}, (slice(0, 6), slice(0, 4), None)),
        ({"PhysicalDeltaX": None}, (slice(0, 6), slice(0, 4), None)),
        ({"RegionDataType": None}, (slice(0, 6), slice(0, 4), pytest.approx((0.1, 0.2)))),
        ({"RegionSpatialFormat": None}, (slice(0, 6), slice(0, 8), None)),
        ({"RegionLocationMinX0": None}, (slice(0, 6), slice(0, 8), None)),
        ({"RegionLocationMinX0": 8, "RegionLocationMaxX1": 20}, (slice(0, 6), slice(0, 8), None)),
    ],
)
def test_odd_regions_and_empty_attributes_do_not_hide_the_image(path, item, expected):
    odd = region(0, 0, 3, 5)
    for name, value in item.items():
        setattr(odd, name, value)
    save(ultrasound(RAMP, regions=[odd], PixelSpacing=[0.5], RescaleSlope=None), path)
    assert read_header(path).regions == (expected,)
    np.testing.assert_array_equal(frames_of(path), [RAMP])


@pytest.mark.parametrize("compressed", [False, True])
def test_frames_of_a_cine_are_read_one_by_one(path, compressed):
    """In the order that is asked for, with the memory of a few frames, also without a table of offsets."""
    cine = np.repeat(np.arange(40, dtype=np.uint8)[:, None, None] * 6, 128 * 128, axis=1).reshape(40, 128, 128)
    dataset = ultrasound(cine)
    if compressed:
        fragments = [io.BytesIO() for _ in cine]
        for frame, fragment in zip(cine, fragments, strict=True):
            Image.fromarray(frame).save(fragment, "JPEG")
        dataset.PixelData = encapsulate([each.getvalue() for each in fragments], has_bot=False)
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    save(dataset, path)
    header = read_header(path)
    assert [frame[0, 0] for frame in read_frames(header, [39, 2, 3])] == [234, 12, 18]
    tracemalloc.start()
    assert sum(frame.shape == (128, 128) for frame in read_frames(header, range(40))) == 40
    assert tracemalloc.get_traced_memory()[1] < 20 * 128 * 128
    tracemalloc.stop()


def test_a_file_is_found_by_its_preamble(tmp_path):
    save(ultrasound(RAMP), tmp_path / "IM000001")
    (tmp_path / "notes").write_text("no image")
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for its writer
    names = ("IM000001", "notes", "missing", "pipe")
    assert [is_dicom(tmp_path / name) for name in names] == [True, False, False, False]


def test_a_file_that_vanishes_is_a_bad_file_without_its_path_in_the_reason(path):
    save(ultrasound(RAMP), path)
    header = read_header(path)
    path.unlink()
    (bad,) = read_frames(header, [0])
    assert bad.reason == "does not exist"


def test_reports_and_segmentations_are_no_images():
    for name in ("test-SR", "liver_1frame"):
        with pytest.raises(NoImage, match="not an image"):
            read_header(shipped(name))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"syntax": HTJ2K}, r"is compressed as High-Throughput JPEG 2000.*pip install 'pylibjpeg\[openjpeg\]'"),
        ({"syntax": MPEG4HP41}, r"is video \(MPEG-4 AVC/H.264 High Profile / Level 4.1\)\. Export it"),
        ({"syntax": "1.2.3"}, r"unknown transfer syntax 1\.2\.3, which pydicom can't decode\. Convert"),
        ({"PhotometricInterpretation": "ARGB"}, "the photometric interpretation ARGB with 1 samples"),
        ({"Rows": 65535, "Columns": 65535}, "is too large"),
        ({"BitsAllocated": 32}, "has 8 of 32 bits per value"),
        ({"NumberOfFrames": -1}, "has no pixels"),
        ({"NumberOfFrames": 2**31 - 1}, "says that it has 2147483647 frames, which is too many"),
        ({"SamplesPerPixel": 2}, "MONOCHROME2 with 2 samples per pixel"),
    ],
)
def test_what_cannot_be_read_is_named_with_what_to_do(path, changes, problem):
    syntax = changes.get("syntax")
    dataset = ultrasound(RAMP, **{name: value for name, value in changes.items() if name != "syntax"})
    if syntax:
        dataset.PixelData = encapsulate([b"\0" * 8])
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    dataset.save_as(path, implicit_vr=False, little_endian=True)
    with pytest.raises(BadFile, match=problem):
        read_header(path)


def test_without_pydicom_the_missing_package_is_named_not_the_file(path, monkeypatch):
    save(ultrasound(RAMP), path)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(ModuleNotFoundError, match="pydicom"):
        read_header(path)


def test_a_deflated_file_that_grows_too_large_is_refused(path, monkeypatch):
    dataset = ultrasound(np.zeros((200, 200), np.uint8))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    save(dataset, path)
    assert frames_of(path)[0].shape == (200, 200)
    monkeypatch.setattr("mgcc_dist.data.dicom.MAX_INFLATED", 10_000)
    with pytest.raises(BadFile, match="is deflated to more than 1 GB"):
        read_header(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cut=st.one_of(st.none(), st.integers(0, 1400)),
    flips=st.lists(st.tuples(st.integers(0, 1400), st.integers(0, 7)), max_size=6),
)
def test_damage_is_a_bad_file_that_quotes_no_identifier(tmp_path_factory, capfd, caplog, recwarn, cut, flips):
    path = tmp_path_factory.getbasetemp() / "damaged.dcm"
    content = _damaged(cut, flips)
    path.write_bytes(content)
    try:
        read = frames_of(path)
    except BadFile as bad:
        read = [bad]
    reasons = " ".join(each.reason for each in read if isinstance(each, BadFile))
    logged = "".join(capfd.readouterr()) + caplog.text + " ".join(str(warning.message) for warning in recwarn)
    assert not [word for word in ("DOE", "JANE", "4711") if word in reasons + logged]


def _damaged(cut, flips):
    buffer = io.BytesIO()
    ultrasound(np.stack([RAMP] * 3), regions=[region(0, 0, 3, 5)], SOPInstanceUID="1.2.3").save_as(
        buffer, enforce_file_format=True
    )
    content = bytearray(buffer.getvalue())
    for offset, bit in flips:
        content[offset % len(content)] ^= 1 << bit
    return bytes(content[:cut])
