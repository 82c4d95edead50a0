"""The memorisation audit finds copies of real images, however they were changed, and no honest images."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mgcc_dist.data.duplicates import groups, similar_pairs, thumbnail
from mgcc_dist.data.images import read_grey, resize_image
from mgcc_dist.data.records import Sample, ShardFolder, write_index, write_shard
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.audit import AuditConfig, audit, is_finished
from mgcc_dist.diffusion.images import DataConfig, Images
from mgcc_dist.diffusion.likeness import align, describe, likenesses
from mgcc_dist.diffusion.selection import drop

SIDE = 96


def rotated(image, degrees):
    return np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BICUBIC))


def noisy(image, sigma):
    noise = np.random.default_rng(0).normal(0, sigma, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def as_jpeg(image, quality):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer))


PLANTED = {
    "exact": lambda image: image,
    "mirrored": lambda image: image[:, ::-1],
    "upside down": lambda image: image[::-1],
    "quarter turn": lambda image: np.rot90(image),
    "noisy": lambda image: noisy(image, 20),
    "rotated by 2": lambda image: rotated(image, 2),
    "rotated by -7": lambda image: rotated(image, -7),
    "rotated by 8": lambda image: rotated(image, 8),
    "JPEG": lambda image: as_jpeg(image, 20),
    "brighter": lambda image: np.clip(image * 1.3 + 10.0, 0, 255).astype(np.uint8),
    "all at once": lambda image: as_jpeg(rotated(noisy(image[:, ::-1], 10), 4), 40),
}


def shard_folder(folder: Path, dataset: str, samples: list[Sample], **extra) -> ShardFolder:
    write_index(folder, dataset, [write_shard(folder / "a-000000.tar", samples)], **extra)
    return ShardFolder.open(folder)


def synthetic(folder: Path, pictures: dict[str, np.ndarray]) -> ShardFolder:
    """A folder of samples as sampling leaves it."""
    folder.mkdir(parents=True)
    (folder / "request.json").write_text("{}")
    samples = [Sample(key, np.ascontiguousarray(image), None, {}) for key, image in pictures.items()]
    return shard_folder(folder, "synthetic", samples, request={"seed": 0})


@pytest.fixture(scope="module")
def real(busi_root):
    """60 training and 30 held-out images of BUSI, and 30 further ones of groups that are not among these."""
    files = sorted(path for path in busi_root.glob("*/*.png") if "_mask" not in path.stem)
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:140]]
    keys = [path.stem for path in files]
    pictures = [resize_image(read_grey(path), SIDE, SIDE) for path in files]
    names = groups(keys, similar_pairs([thumbnail(picture) for picture in pictures]))
    samples = [
        Sample(key, picture, None, {"group": name}) for key, picture, name in zip(keys, pictures, names, strict=True)
    ]
    used = set(names[:90])
    honest = [sample for sample in samples[90:] if sample.meta["group"] not in used][:30]
    return samples[:90], {sample.key: sample.image for sample in honest}


@pytest.fixture(scope="module")
def learned(real, tmp_path_factory):
    data = shard_folder(tmp_path_factory.mktemp("real"), "BUSI", real[0])
    split = Split("audit", (), tuple(data.keys()[:60]), tuple(data.keys()[60:]))
    return Images(DataConfig(image_size=SIDE), data, split), real[1]


def test_planted_copies_of_busi_are_found_and_honest_images_are_not(learned, tmp_path):
    images, honest = learned
    planted, source = {}, {}
    for number, (name, change) in enumerate(PLANTED.items()):
        for i in range(3 * number, 3 * number + 3):
            original = images.learned.read(i)
            planted[f"{name} {i}"] = change(original.image)
            source[f"{name} {i}"] = original.meta["group"]
    shards = synthetic(tmp_path / "samples", planted | honest)
    report = audit(AuditConfig(), images, shards.folder, tmp_path / "audit", Accelerator(cpu=True))

    found = set(report["near_copies"])
    assert planted.keys() - found == set()  # recall 1
    assert len(found & planted.keys()) / len(found) > 0.95  # precision
    group = {record.key: record.group for record in images.data.records}
    for row in report["images"]:
        if row["key"] in planted:
            assert group[row["nearest"]] == source[row["key"]], row
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == report
    assert np.ptp(np.asarray(Image.open(tmp_path / "audit" / "closest.png"))) > 0


def test_threshold_is_exceeded_by_the_share_of_false_alarms(learned, tmp_path):
    images, honest = learned
    shards = synthetic(tmp_path / "samples", honest)
    accelerator = Accelerator(cpu=True)
    half = audit(AuditConfig(false_alarms=0.5), images, shards.folder, tmp_path / "half", accelerator)
    assert half["threshold"] == half["real"]["median"]
    assert 7 < len(half["near_copies"]) < 23
    none = audit(AuditConfig(false_alarms=0.0), images, shards.folder, tmp_path / "none", accelerator)
    assert none["threshold"] == none["real"]["highest"]
    assert half["real"]["images"] == 90


def test_copies_are_dropped_from_the_shards_if_asked(learned, tmp_path):
    images, honest = learned
    copy = images.learned.read(3).image[:, ::-1]
    some = dict(list(honest.items())[:6])
    shards = synthetic(tmp_path / "samples", {"copy": copy} | some)
    config, accelerator = AuditConfig(), Accelerator(cpu=True)
    assert not is_finished(config, images, shards.folder, tmp_path / "audit")
    audit(config, images, shards.folder, tmp_path / "audit", accelerator)
    assert is_finished(config, images, shards.folder, tmp_path / "audit")
    assert len(ShardFolder.open(shards.folder)) == 7

    dropping = AuditConfig(drop_copies=True)
    assert not is_finished(dropping, images, shards.folder, tmp_path / "audit")
    audit(dropping, images, shards.folder, tmp_path / "audit", accelerator)
    left = ShardFolder.open(shards.folder)
    assert left.keys() == list(some)
    assert left.index["dropped"] == ["copy"]
    assert left.index["request"] == {"seed": 0}
    assert is_finished(dropping, images, shards.folder, tmp_path / "audit")
    assert not is_finished(AuditConfig(false_alarms=0.5), images, shards.folder, tmp_path / "audit")


def test_dropping_leaves_the_other_records_as_they_are_and_no_empty_shard(tmp_path):
    pictures = [Sample(f"k{i}", np.full((4, 4), i, np.uint8), None, {"seed": i}) for i in range(5)]
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "request.json").write_text("{}")
    entries = [write_shard(folder / f"{start}.tar", pictures[start : start + 2]) for start in (0, 2, 4)]
    write_index(folder, "synthetic", entries, request={})
    whole = (folder / "0.tar").read_bytes()
    drop(folder, {"k4", "k2"})
    left = ShardFolder.open(folder)
    assert left.keys() == ["k0", "k1", "k3"]
    assert [int(left.read(i).image[0, 0]) for i in range(3)] == [0, 1, 3]
    assert sorted(path.name for path in folder.glob("*.tar")) == ["0.tar", "2.tar"]
    assert (folder / "0.tar").read_bytes() == whole
    assert (folder / "request.json").is_file()
    drop(folder, {"k0"})
    assert ShardFolder.open(folder).index["dropped"] == ["k0", "k2", "k4"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


@pytest.mark.parametrize("name", ["exact", "mirrored", "upside down", "quarter turn"])
def test_alignment_turns_a_copy_back(learned, name):
    images = learned[0]
    originals = [images.learned.read(i).image for i in range(4)]
    thumbnails = torch.from_numpy(np.stack([thumbnail(image) for image in originals]))
    copies = [np.ascontiguousarray(PLANTED[name](image)) for image in originals]
    likeness, alignment = likenesses(copies, thumbnails)
    assert likeness.diagonal().tolist() == pytest.approx([1] * 4, abs=0.05)  # a thumbnail's pixels are not of one size
    for i, original in enumerate(originals):
        assert np.array_equal(align(copies[i], int(alignment[i, i])), original)
    words = {"exact": "as it is", "mirrored": "mirrored"}.get(name)
    assert words is None or describe(int(alignment[0, 0])) == words
