"""The quality metrics compared with closed forms, hand calculation and torchmetrics."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from mgcc_dist.assessment import features, quality
from mgcc_dist.assessment.config import QualityConfig
from mgcc_dist.assessment.quality import ImageSet, fid, kid, metrics_with_intervals, prdc
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import write_index, write_shard
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.evaluation.sample_metrics import METRICS
from mgcc_dist.evaluation.statistics import grouped_permutation


class Identity(nn.Module):
    """Feature network for torchmetrics that returns its input, so that features can be passed as images."""

    def __init__(self, dimensions):
        super().__init__()
        self.num_features = dimensions

    def forward(self, x):
        return x


def gaussian(count, mean, deviations, seed):
    return np.random.default_rng(seed).normal(mean, deviations, (count, len(deviations)))


def image_set(count, mean, deviations, seed):
    """Features of Gaussian images, which have a spectrum like them."""
    return ImageSet(gaussian(count, mean, deviations, seed), gaussian(count, mean, np.ones(8), seed + 1000))


def test_fid_of_gaussians_matches_the_closed_form():
    """Axis-parallel Gaussians: the distance is the sum over axes of (difference of means)^2 + (of deviations)^2."""
    first, second = np.array([1.0, 2.0, 0.5]), np.array([2.0, 2.0, 1.5])
    shift = np.array([3.0, 0.0, -1.0])
    expected = (shift**2).sum() + ((first - second) ** 2).sum()
    assert fid(gaussian(200_000, 0, first, 0), gaussian(200_000, shift, second, 1)) == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("real", "synthetic", "dimensions"), [(60, 90, 8), (12, 9, 30)])
def test_fid_and_kid_match_torchmetrics(real, synthetic, dimensions):
    x = gaussian(real, 0, np.linspace(0.5, 2, dimensions), 0)
    y = gaussian(synthetic, 0.3, np.ones(dimensions), 1)
    reference = FrechetInceptionDistance(Identity(dimensions)).set_dtype(torch.float64)
    reference.update(torch.from_numpy(x), real=True)
    reference.update(torch.from_numpy(y), real=False)
    # With fewer images than dimensions torchmetrics takes roots of eigenvalues that are 0 up to rounding.
    assert fid(x, y) == pytest.approx(reference.compute().item(), rel=1e-9 if real > dimensions else 1e-5)

    n = min(real, synthetic)
    reference = KernelInceptionDistance(Identity(dimensions), subsets=1, subset_size=n).set_dtype(torch.float64)
    reference.update(torch.from_numpy(x[:n]), real=True)
    reference.update(torch.from_numpy(y[:n]), real=False)
    assert kid(x[:n], y[:n]) == pytest.approx(reference.compute()[0].item(), rel=1e-9)


def test_prdc_of_few_points_by_hand():
    """k = 1. Real balls: 0 +- 1, 1 +- 1, 4 +- 3. Synthetic balls: 0.5 +- 6.5, 7 +- 6.5, 20 +- 13."""
    real, synthetic = np.array([[0.0], [1.0], [4.0]]), np.array([[0.5], [7.0], [20.0]])
    # 0.5 lies in the balls of 0 and 1; 7 on the border of that of 4; 20 in none. All real points lie in that of 0.5.
    assert prdc(real, synthetic, 1) == {"precision": 2 / 3, "recall": 1, "density": 1, "coverage": 1}
    # With the sets swapped: 0, 1 and 4 lie in the ball of 0.5, and 1 and 4 in that of 7, and none in that of 20.
    swapped = prdc(synthetic, np.array([[0.0], [1.0], [4.0]]), 1)
    assert swapped == {"precision": 1, "recall": 2 / 3, "density": 5 / 3, "coverage": 2 / 3}


def test_block_size_does_not_change_the_metrics(monkeypatch):
    real, synthetic = gaussian(50, 0, np.ones(4), 0), gaussian(70, 0.5, np.ones(4), 1)
    full = prdc(real, synthetic, 3)
    monkeypatch.setattr(quality, "BLOCK_SIZE", 7)
    assert prdc(real, synthetic, 3) == full


def test_the_floor_is_reached_by_the_same_distribution_and_not_by_another():
    real, groups = image_set(200, 0, np.ones(6), 0), [str(i) for i in range(200)]
    same = metrics_with_intervals(real, image_set(300, 0, np.ones(6), 1), groups, k=5, halves=30)
    assert same["images"] == {"real": 200, "synthetic": 300, "half": 100}
    for name in METRICS:
        floor, halves = same["real_halves"][name], same["synthetic_halves"][name]
        assert halves["low"] < floor["value"] < halves["high"], name
    assert same["synthetic"]["kid"]["low"] < 0 < same["synthetic"]["kid"]["high"]

    shifted = metrics_with_intervals(real, image_set(300, 1.5, np.ones(6), 2), groups, k=5, halves=30)
    for name, better in zip(METRICS, (-1, -1, 1, 1, 1, 1, -1), strict=True):
        floor, halves = shifted["real_halves"][name], shifted["synthetic_halves"][name]
        assert better * halves["value"] < better * floor["value"], name
    assert shifted["synthetic"]["kid"]["low"] > 0


def test_fid_is_biased_upwards_for_few_images():
    """Hence the floor with equally few images. Both sets have the same distribution, so the true distance is 0."""
    few, many = (
        np.mean([fid(gaussian(n, 0, np.ones(6), s), gaussian(n, 0, np.ones(6), 100 + s)) for s in range(20)])
        for n in (50, 200)
    )
    assert few > 3 * many > 0.1


def test_intervals_match_the_standard_deviation_of_the_metric():
    """The half width of an interval is 1.96 times the standard deviation of KID over 200 new pairs of sets."""
    values = [kid(gaussian(80, 0, np.ones(3), s), gaussian(80, 0.5, np.ones(3), 10_000 + s)) for s in range(200)]
    groups = [str(i) for i in range(80)]
    widths = []
    for seed in range(8):
        real, synthetic = image_set(80, 0, np.ones(3), seed), image_set(80, 0.5, np.ones(3), 10_000 + seed)
        interval = metrics_with_intervals(real, synthetic, groups, k=3, halves=50)["synthetic"]["kid"]
        widths.append((interval["high"] - interval["low"]) / 2 / 1.96)
    assert np.mean(widths) == pytest.approx(np.std(values), rel=0.25)


@pytest.mark.parametrize("seed", range(5))
def test_intervals_stay_within_the_range_of_their_metric(seed):
    """With few images and a wide spread, 1.96 standard errors reach beyond 0 and 1."""
    groups = [str(i) for i in range(24)]
    real, synthetic = image_set(24, 0, np.ones(3), seed), image_set(24, 0.5, np.ones(3), 100 + seed)
    report = metrics_with_intervals(real, synthetic, groups, k=3, halves=10)
    for column in ("synthetic", "synthetic_halves", "real_halves"):
        for name, metric in report[column].items():
            assert metric["low"] <= metric["value"] <= metric["high"]
            assert name == "kid" or metric["low"] >= 0
            assert name not in ("precision", "recall", "coverage") or metric["high"] <= 1


def test_halves_do_not_split_groups():
    groups = [str(i // 4) for i in range(40)]
    for seed in range(20):
        order = grouped_permutation(groups, np.random.default_rng(seed))
        assert sorted(order) == list(range(40))
        sides = [{groups[i] for i in order[:20]}, {groups[i] for i in order[20:]}]
        assert not sides[0] & sides[1]


@pytest.fixture
def images(phantom_shards):
    keys = phantom_shards.keys()
    return ImageData(DataConfig(image_size=16), phantom_shards, Split("q", (), tuple(keys[:10]), tuple(keys[10:])))


@pytest.fixture
def samples(phantom_shards, tmp_path):
    (tmp_path / "samples").mkdir()
    shard = write_shard(tmp_path / "samples" / "a.tar", [phantom_shards[i] for i in range(10)])
    write_index(tmp_path / "samples", "synthetic", [shard], request={"seed": 0})
    return tmp_path / "samples"


def test_report_states_what_was_compared(vae, images, samples, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    config, accelerator = QualityConfig(neighbours=2), Accelerator(cpu=True)
    extractor = features.load(None, tmp_path / "vae", 16)
    report = quality.evaluate(config, extractor, images, samples, tmp_path / "q", accelerator)
    assert report == json.loads((tmp_path / "q" / "quality.json").read_text())
    assert report["features"] | {"kind": "autoencoder's encoder", "dimensions": 8} == report["features"]
    assert report["images"] == {"real": 14, "synthetic": 10, "half": 5}
    markdown = (tmp_path / "q" / "quality.md").read_text()
    header, _, first, *_ = ([cell.strip() for cell in line.split("|")] for line in markdown.splitlines())
    assert header[3:6] == ["10 synthetic / 14 real", "5 synthetic / 5 real", "5 real / 5 real"]
    assert first[1:3] == ["FID", "lower"]
    assert first[3].startswith(f"{report['synthetic']['fid']['value']:.3g} (")
    assert "| spectral distance (dB) | lower " in markdown
    assert 0 < report["real_halves"]["spectral_distance"]["value"] < 5
    assert f"({report['features']['file']}), 8 dimensions" in markdown


def test_too_few_images_and_a_missing_encoder_are_refused_before_training(images):
    quality.check_config(QualityConfig(neighbours=4), images, 10)
    with pytest.raises(UserError, match=r"14 validation and 10 synthetic images, .* 5 images.*--quality\.neighbours 4"):
        quality.check_config(QualityConfig(neighbours=5), images, 10)
    quality.check_config(QualityConfig(neighbours=5, enabled=False), images, 10)
    with pytest.raises(UserError, match=r"quality\.encoder: nowhere: does not exist"):
        quality.check_config(QualityConfig(encoder="nowhere", enabled=False), images, 10)


class Encoder(torch.nn.Module):
    def __init__(self, result):
        super().__init__()
        self.result = result

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.result == "map":
            return x
        if self.result == "nan":
            return x.flatten(1) / 0
        assert x.shape[3] == 99, "wants 99 pixels"
        return x.flatten(1)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("map", r"returns \[2, 1, 16, 16\] for 2 images\. Use a network that returns features \[2, D\]"),
        ("nan", r"returns features that are not finite"),
        ("assert", r"fails on images: .*wants 99 pixels"),
        (None, r"is not a \.safetensors or TorchScript file"),
    ],
)
def test_broken_encoder_is_refused_before_training(images, tmp_path, result, message):
    file = tmp_path / "encoder.pt"
    if result:
        torch.jit.script(Encoder(result)).save(file)
    else:
        file.write_bytes(b"no network")
    with pytest.raises(UserError, match=rf"quality\.encoder: {file}:? {message}"):
        quality.check_config(QualityConfig(encoder=str(file)), images, 10)
