"""The memorization audit finds transformed copies of real images, and does not list other images."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from mgcc_dist.assessment import audit as audit_module
from mgcc_dist.assessment.audit import audit
from mgcc_dist.assessment.config import AuditConfig
from mgcc_dist.assessment.features import FeatureExtractor, _GlobalAveragePool
from mgcc_dist.assessment.similarity import FeatureSimilarity, apply_alignment, describe_alignment, pixel_similarity
from mgcc_dist.assessment.stages import drop_copies
from mgcc_dist.data.duplicates import groups, thumbnail
from mgcc_dist.data.images import read_grey, resize_image
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.selection import drop_records, restore_dropped
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.models.config import UNetConfig
from mgcc_dist.models.network import build_network

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


TRANSFORMS = {
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
    """Write a folder of samples, like sampling does."""
    folder.mkdir(parents=True)
    (folder / "request.json").write_text("{}")
    samples = [Sample(key, np.ascontiguousarray(image), None, {}) for key, image in pictures.items()]
    return shard_folder(folder, "synthetic", samples, request={"seed": 0})


@pytest.fixture(scope="module")
def real(busi_root):
    """60 training and 30 validation images of BUSI, and 30 further images of other groups."""
    files = sorted(path for path in busi_root.glob("*/*.png") if "_mask" not in path.stem)
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))[:140]]
    keys = [path.stem for path in files]
    pictures = [resize_image(read_grey(path), SIDE, SIDE) for path in files]
    names = groups((key, thumbnail(picture)) for key, picture in zip(keys, pictures, strict=True))
    samples = [Sample(key, picture, None, {"group": names[key]}) for key, picture in zip(keys, pictures, strict=True)]
    used_groups = {names[key] for key in keys[:90]}
    others = [sample for sample in samples[90:] if sample.meta["group"] not in used_groups][:30]
    return samples[:90], {sample.key: sample.image for sample in others}


@pytest.fixture(scope="module")
def train_images(real, tmp_path_factory):
    data = shard_folder(tmp_path_factory.mktemp("real"), "BUSI", real[0])
    split = Split("audit", (), tuple(data.keys()[:60]), tuple(data.keys()[60:]))
    return ImageData(DataConfig(image_size=SIDE), data, split), real[1]


def test_transformed_copies_of_busi_are_listed_and_other_images_are_not(train_images, tmp_path):
    images, others = train_images
    planted, source = {}, {}
    for number, (name, change) in enumerate(TRANSFORMS.items()):
        for i in range(3 * number, 3 * number + 3):
            original = images.train[i]
            planted[f"{name} {i}"] = change(original.image)
            source[f"{name} {i}"] = original.meta["group"]
    shards = synthetic(tmp_path / "samples", planted | others)
    report = audit(AuditConfig(), None, images, shards.folder, tmp_path / "audit", Accelerator(cpu=True))

    found = set(report["near_copies"])
    assert planted.keys() - found == set()  # recall 1
    assert len(found & planted.keys()) / len(found) > 0.95  # precision
    group = {record.key: record.group for record in images.shards.records}
    for row in report["images"]:
        if row["key"] in planted:
            assert group[row["nearest"]] == source[row["key"]], row
    assert json.loads((tmp_path / "audit" / "audit.json").read_text()) == report
    assert np.ptp(np.asarray(Image.open(tmp_path / "audit" / "closest.png"))) > 0


@pytest.fixture(scope="module")
def encoder():
    """The encoder of a U-Net with random weights."""
    torch.manual_seed(0)
    network = build_network(UNetConfig(widths=(8, 16, 32, 64, 64)))
    return FeatureExtractor(
        _GlobalAveragePool(network.encoder).eval(),
        SIDE,
        {"kind": "test", "file": "none", "sha256": "0", "image_size": SIDE},
    )


def test_copies_are_found_in_features(train_images, encoder, tmp_path):
    """Exact, mirrored and rotated copies are found even with the features of an untrained network."""
    images, others = train_images
    exact = {f"{name} {i}": (i, TRANSFORMS[name]) for name in ("exact", "mirrored", "quarter turn") for i in range(5)}
    planted = {key: change(images.train[i].image) for key, (i, change) in exact.items()}
    shards = synthetic(tmp_path / "samples", planted | others)
    report = audit(AuditConfig(), encoder, images, shards.folder, tmp_path / "audit", Accelerator(cpu=True))
    threshold = report["features"]["threshold"]
    by_features = {row["key"] for row in report["images"] if row["features"]["similarity"] > threshold}
    assert planted.keys() - by_features == set()
    assert len(by_features & others.keys()) <= 1
    by_pixels = {row["key"] for row in report["images"] if row["similarity"] > report["threshold"]}
    assert set(report["near_copies"]) == by_features | by_pixels
    for row in report["images"]:
        if row["key"] in planted:
            assert row["features"]["nearest"] == images.train[exact[row["key"]][0]].key
    assert np.ptp(np.asarray(Image.open(tmp_path / "audit" / "closest_features.png"))) > 0


@pytest.fixture(scope="module")
def few_images(train_images):
    """30 of the training and validation images, and six others: for tests that do not count near-copies."""
    images, others = train_images
    keys = images.shards.keys()
    split = Split("few", (), tuple(keys[:20]), tuple(keys[60:70]))
    return ImageData(DataConfig(image_size=SIDE), images.shards, split), few_of(others)


def few_of(pictures):
    return dict(list(pictures.items())[:6])


@pytest.fixture
def no_pictures(monkeypatch):
    """Leave out the pictures, which take most of the time of an audit of few images."""
    monkeypatch.setattr(audit_module, "draw_pairs", lambda pairs, rule: None)
    monkeypatch.setattr(audit_module, "_save", lambda figure, path: None)


@pytest.mark.usefixtures("no_pictures")
def test_false_alarms_are_divided_between_pixels_and_features(few_images, encoder, tmp_path):
    images, others = few_images
    shards = synthetic(tmp_path / "samples", others)
    config, accelerator = AuditConfig(false_alarms=0.2), Accelerator(cpu=True)
    both = audit(config, encoder, images, shards.folder, tmp_path / "both", accelerator)
    pixels_only = audit(
        AuditConfig(false_alarms=0.1), None, images, shards.folder, tmp_path / "pixels_only", accelerator
    )
    assert both["threshold"] == pixels_only["threshold"]


def test_noisy_copies_are_nearest_to_their_originals_in_whitened_features(train_images, encoder):
    images, _ = train_images
    similarity = FeatureSimilarity(encoder, images.train, Accelerator(cpu=True))
    changed = [replace(images.train[i], image=noisy(images.train[i].image, 5)) for i in range(20)]
    values, _ = similarity.compare(ListSource(changed))
    assert values.shape == (20, 60)
    assert (values.argmax(axis=1) == np.arange(20)).mean() > 0.8


@dataclass
class ListSource:
    samples: list[Sample]

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index]


@pytest.mark.usefixtures("no_pictures")
def test_threshold_is_the_quantile_given_by_false_alarms(train_images, tmp_path):
    images, others = train_images
    shards = synthetic(tmp_path / "samples", others)
    accelerator = Accelerator(cpu=True)
    half = audit(AuditConfig(false_alarms=0.5), None, images, shards.folder, tmp_path / "half", accelerator)
    assert half["threshold"] == half["real"]["median"]
    assert 7 < len(half["near_copies"]) < 23
    none = audit(AuditConfig(false_alarms=0.0), None, images, shards.folder, tmp_path / "none", accelerator)
    assert none["threshold"] == none["real"]["highest"]
    assert half["real"]["images"] == 90


@pytest.mark.usefixtures("no_pictures")
def test_drop_copies_removes_near_copies_from_the_shards(train_images, tmp_path):
    images, others = train_images
    copy = images.train[3].image[:, ::-1]
    few = few_of(others)
    shards = synthetic(tmp_path / "samples", {"copy": copy} | few)
    audit(AuditConfig(), None, images, shards.folder, tmp_path / "audit", Accelerator(cpu=True))
    assert len(ShardFolder.open(shards.folder)) == 7
    drop_copies(shards.folder, tmp_path / "audit" / "audit.json", Accelerator(cpu=True))
    left = ShardFolder.open(shards.folder)
    assert left.keys() == list(few)
    assert left.index["dropped"] == ["copy"]
    assert left.index["request"] == {"seed": 0}


def test_dropping_keeps_the_other_records_unchanged_and_leaves_no_empty_shard(tmp_path):
    pictures = [Sample(f"k{i}", np.full((4, 4), i, np.uint8), None, {"seed": i}) for i in range(5)]
    folder = tmp_path / "samples"
    folder.mkdir()
    (folder / "request.json").write_text("{}")
    entries = [write_shard(folder / f"{start}.tar", pictures[start : start + 2]) for start in (0, 2, 4)]
    write_index(folder, "synthetic", entries, request={})
    unchanged = (folder / "0.tar").read_bytes()
    drop_records(folder, {"k4", "k2"})
    left = ShardFolder.open(folder)
    assert left.keys() == ["k0", "k1", "k3"]
    assert [int(left[i].image[0, 0]) for i in range(3)] == [0, 1, 3]
    assert sorted(path.name for path in folder.glob("*.tar")) == ["0.tar", "2.tar"]
    assert (folder / "0.tar").read_bytes() == unchanged
    assert (folder / "request.json").is_file()
    drop_records(folder, {"k0"})
    assert ShardFolder.open(folder).index["dropped"] == ["k0", "k2", "k4"]
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_a_kill_between_the_renames_of_dropping_loses_no_sample(tmp_path, monkeypatch):
    folder = tmp_path / "samples"
    folder.mkdir()
    for name in ("request.json", "index-1.json"):
        (folder / name).write_text("{}")
    picture = [Sample(f"k{i}", np.full((4, 4), i, np.uint8), None, {"seed": i}) for i in range(2)]
    write_index(folder, "synthetic", [write_shard(folder / "0.tar", picture)], request={})
    rename = Path.rename

    def killed(path, target):
        if path.name.endswith(".selecting"):
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        drop_records(folder, {"k1"})
    monkeypatch.undo()
    assert not folder.exists()
    restore_dropped(folder)
    assert ShardFolder.open(folder).keys() == ["k0", "k1"]
    drop_records(folder, {"k1"})
    restore_dropped(folder)
    assert ShardFolder.open(folder).keys() == ["k0"]
    assert (folder / "index-1.json").is_file()


@pytest.mark.parametrize("name", ["exact", "mirrored", "upside down", "quarter turn"])
def test_alignment_restores_the_original_orientation(train_images, name):
    images = train_images[0]
    originals = [images.train[i].image for i in range(4)]
    thumbnails = torch.from_numpy(np.stack([thumbnail(image) for image in originals]))
    copies = [np.ascontiguousarray(TRANSFORMS[name](image)) for image in originals]
    similarity, alignment = pixel_similarity(copies, thumbnails)
    # Not exactly 1, because the pixels of a thumbnail cover areas of different sizes.
    assert similarity.diagonal().tolist() == pytest.approx([1] * 4, abs=0.05)
    for i, original in enumerate(originals):
        assert np.array_equal(apply_alignment(copies[i], int(alignment[i, i])), original)
    words = {"exact": "unchanged", "mirrored": "mirrored"}.get(name)
    assert words is None or describe_alignment(int(alignment[0, 0])) == words
