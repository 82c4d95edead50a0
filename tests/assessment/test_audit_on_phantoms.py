"""The audit on phantoms: settings that are checked before training, and its pictures."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mgcc_dist.assessment import audit
from mgcc_dist.assessment.config import AuditConfig
from mgcc_dist.assessment.features import FeatureExtractor
from mgcc_dist.assessment.pair_audit import PairSimilarity
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.readers.phantoms import Phantoms
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData


def images_of(folder, phantom_shards, groups):
    samples = [Sample(f"k{i}", phantom_shards[i].image, None, {"group": group}) for i, group in enumerate(groups)]
    write_index(folder, "toy", [write_shard(folder / "a.tar", samples)])
    shards = ShardFolder.open(folder)
    return ImageData(DataConfig(image_size=32), shards, Split("s", (), ("k0", "k1"), ("k2",)))


def test_images_of_one_group_are_refused_before_training(tmp_path, phantom_shards):
    images = images_of(tmp_path, phantom_shards, "aaa")
    with pytest.raises(UserError, match=r"audit: all images belong to one group.* Pass --audit\.enabled false"):
        audit.check_config(AuditConfig(), images)
    audit.check_config(AuditConfig(enabled=False), images)


def test_two_groups_are_enough(tmp_path, phantom_shards):
    audit.check_config(AuditConfig(), images_of(tmp_path, phantom_shards, "aab"))


def test_red_titles_of_both_pictures_are_the_listed_near_copies(tmp_path, phantom_shards, monkeypatch):
    """Also where only the features decide."""
    keys = phantom_shards.keys()
    images = ImageData(DataConfig(image_size=32), phantom_shards, Split("s", (), tuple(keys[:16]), tuple(keys[16:])))
    others = ShardFolder.open(write_shards(Phantoms(count=12, seed=9, size=32), tmp_path / "others").folder)
    samples = tmp_path / "samples"
    shard = write_shard(samples / "a.tar", [Sample(f"synthetic-{i}", others[i].image, None, {}) for i in range(12)])
    write_index(samples, "synthetic", [shard], request={"seed": 0})
    network = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(3), torch.nn.Flatten())
    extractor = FeatureExtractor(network, 32, {"kind": "mean", "file": "f", "sha256": "s", "image_size": 32})
    figures = []
    monkeypatch.setattr(
        audit, "draw_pairs", lambda *words, draw=audit.draw_pairs: figures.append(draw(*words)) or figures[-1]
    )
    config = AuditConfig(false_alarms=0.5)
    report = audit.audit(config, extractor, images, samples, tmp_path / "audit", Accelerator(cpu=True))
    by_features = [
        row["key"] for row in report["images"] if row["near_copy"] and row["similarity"] <= report["threshold"]
    ]
    assert by_features
    assert len(report["near_copies"]) < 12
    for figure in figures:
        titles = [axis.title for axis in figure.axes]
        red = {f"synthetic-{t.get_text().split(':')[0]}" for t in titles if t.get_color() == audit.NEAR_COPY_COLOR}
        assert red == set(report["near_copies"])
    assert len(figures) == 2


def test_copied_masks_and_pairs_are_found_wherever_they_lie(tmp_path, phantom_shards):
    """A copied shape with another image, an image copied so badly that only the pair tells it, and new pairs."""
    keys = phantom_shards.keys()
    split = Split("s", tuple(keys[:16]), (), tuple(keys[16:]))
    images = ImageData(DataConfig(image_size=32), phantom_shards, split)
    similarity = PairSimilarity(images, Accelerator(cpu=True))
    train = [sample for sample in images.train if sample.mask.any()]
    others = list(ShardFolder.open(write_shards(Phantoms(count=8, seed=9, size=32), tmp_path / "others").folder))
    pairs = {
        "moved": (others[0].image, np.roll(train[0].mask[:, ::-1], 3, axis=1)),
        "copied": (train[1].image, train[1].mask),
        "normal": (others[2].image, np.zeros_like(train[0].mask)),
    }
    samples = [Sample(key, image, np.ascontiguousarray(mask), {}) for key, (image, mask) in pairs.items()]
    samples += [Sample(f"new-{i}", sample.image, sample.mask, {}) for i, sample in enumerate(others)]
    folder = tmp_path / "samples"
    write_index(folder, "synthetic", [write_shard(folder / "a.tar", samples)], request={"seed": 0})
    report = audit.audit(AuditConfig(false_alarms=0.2), None, images, folder, tmp_path / "audit", Accelerator(cpu=True))

    rows = {row["key"]: row for row in report["images"]}
    assert (rows["moved"]["masks"]["nearest"], rows["moved"]["masks"]["similarity"]) == (train[0].key, 1.0)
    assert rows["moved"]["masks"]["alignment"] == "mirrored"
    assert rows["copied"]["pairs"]["nearest"] == train[1].key
    assert rows["copied"]["pairs"]["similarity"] == pytest.approx(1, abs=0.01)
    assert {"moved", "copied"} <= set(report["near_copies"])
    assert not {"masks", "pairs"} & rows["normal"].keys()
    assert report["masks"]["synthetic"]["images"] == sum(sample.mask.any() for sample in samples)
    assert {path.name for path in (tmp_path / "audit").glob("*.png")} == {
        *("closest.png", "closest_masks.png", "closest_pairs.png")
    }
    lesions = [i for i in range(24) if phantom_shards[i].mask.any()]
    for i, matches in zip(lesions, similarity.highest_across_groups(lesions), strict=True):
        assert matches["masks"].similarity < 1, f"{keys[i]} was compared with itself"
