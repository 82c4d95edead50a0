"""The filter of pairs: which are dropped, by thresholds from real validation images, and what is written."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from mgcc_dist.assessment import filter as pair_filter
from mgcc_dist.assessment.config import FilterConfig
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.sample import Sample
from mgcc_dist.data.selection import provenance
from mgcc_dist.data.splits import Split
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.inference.predictor import Predictor

SIZE = 16


def square(start, side):
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[start : start + side, start : start + side] = 255
    return mask


def folder_of(folder, samples, **extra):
    write_index(folder, "toy", [write_shard(folder / "a.tar", samples)], **extra)
    return ShardFolder.open(folder)


@pytest.fixture
def images(tmp_path):
    """Validation images of which the predicted (bright) part is off by 0 to 3 rows, or 0 to 3 % of a normal image."""
    lesions = [Sample(f"l{i}", square(4, 8 + i), square(4, 8), {"class": "benign"}) for i in range(4)]
    empty = np.zeros((SIZE, SIZE), np.uint8)
    normals = [Sample(f"n{i}", square(2, i), empty, {"class": "normal"}) for i in range(3)]
    shards = folder_of(tmp_path / "real", [Sample("t", square(0, 4), None, {}), *lesions, *normals])
    return ImageData(DataConfig(image_size=SIZE), shards, Split("s", (), ("t",), tuple(shards.keys()[1:])))


@pytest.fixture
def predictor(monkeypatch):
    """A network that calls bright pixels lesion."""
    network = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.constant_(network.weight, 50.0)
    torch.nn.init.zeros_(network.bias)
    found = Predictor(network.eval(), SIZE, {"dataset": "toy", "split": "other"}, "cpu", "no")
    monkeypatch.setattr(pair_filter, "load", lambda *words, **options: found)
    return found


def run(images, samples, tmp_path, quantile):
    config = FilterConfig(run="somewhere", quantile=quantile)
    return pair_filter.filter_pairs(
        config, images, samples.folder, tmp_path / "filter", tmp_path / "pairs", Accelerator(cpu=True)
    )


def test_pairs_that_agree_less_than_real_images_are_dropped_and_counted(images, predictor, tmp_path):
    empty = np.zeros((SIZE, SIZE), np.uint8)
    pairs = {
        "good": (square(4, 8), square(4, 8), "benign"),
        "fair": (square(4, 9), square(4, 8), "benign"),
        "bad": (square(8, 8), square(2, 8), "benign"),
        "empty": (empty, empty, "normal"),
        "lesion": (square(2, 6), empty, "normal"),
    }
    samples = [Sample(key, image, mask, {"class": name}) for key, (image, mask, name) in pairs.items()]
    shards = folder_of(tmp_path / "samples", samples, request={"seed": 0})
    before = shards.folder.joinpath("index.json").read_bytes()
    report = run(images, shards, tmp_path, 0.34)

    assert {row["key"] for row in report["images"] if not row["kept"]} == {"bad", "lesion"}
    dice = [2 * 64 / (64 + (8 + i) ** 2) for i in range(4)]
    assert report["thresholds"]["lesion"] == pytest.approx(np.quantile(dice, 0.34), abs=1e-4)
    assert report["thresholds"]["normal"] == pytest.approx(np.quantile([1, 1 - 1 / 256, 1 - 4 / 256], 0.34), abs=1e-4)
    assert report["classes"]["benign"] == {"pairs": 3, "dropped": 1, "median_agreement": round(dice[1], 4)}
    assert (report["pairs"], report["dropped"]) == (5, 2)
    assert report["request"] == {"samples": {"seed": 0}, "quantile": 0.34}
    assert pair_filter.describe(report) == "benign 1 of 3, normal 1 of 2"
    assert "trained on split other" in report["notes"][0]
    assert json.loads((tmp_path / "filter" / "filter.json").read_text()) == report
    assert (tmp_path / "filter" / "dropped.png").is_file()
    kept = ShardFolder.open(tmp_path / "pairs")
    assert kept.keys() == ["good", "fair", "empty"]
    assert np.array_equal(kept[1].mask, square(4, 8))
    assert provenance(kept)["filter"]["dropped"] == 2
    assert shards.folder.joinpath("index.json").read_bytes() == before, "the samples stay as they are"

    run(images, shards, tmp_path, 0.2)
    assert len(ShardFolder.open(tmp_path / "pairs")) == 3, "the filter of other settings replaces the pairs"


def test_split_without_masks_for_the_threshold_is_refused_before_training(images, predictor):
    pair_filter.check_config(FilterConfig(run="somewhere"), images)
    unlabeled = Split("s", ("l1",), (), ("t",))
    with pytest.raises(UserError, match=r"filter\.run: no validation image has a mask with a lesion"):
        pair_filter.check_config(
            FilterConfig(run="somewhere"), ImageData(DataConfig(image_size=SIZE), images.shards, unlabeled)
        )


def test_run_of_another_data_set_is_noted(images, predictor, tmp_path):
    samples = [Sample("good", square(4, 8), square(4, 8), {"class": "benign"})]
    predictor.info["dataset"] = "TN3K"
    report = run(images, folder_of(tmp_path / "samples", samples, request={}), tmp_path, 0)
    assert "trained on TN3K, and this model on toy" in report["notes"][0]


def test_samples_without_masks_or_without_any_agreement_are_refused(images, predictor, tmp_path, monkeypatch):
    unlabeled = folder_of(tmp_path / "u", [Sample("a", square(4, 8), None, {})], request={})
    with pytest.raises(UserError, match=r"filter\.run: .* holds images without masks"):
        run(images, unlabeled, tmp_path, 0.5)
    wrong = folder_of(tmp_path / "w", [Sample("a", square(8, 8), square(0, 8), {})], request={})
    with pytest.raises(UserError, match=r"filter\.quantile: 0\.5 would drop all 1 pairs"):
        run(images, wrong, tmp_path, 0.5)
    monkeypatch.setattr(pair_filter, "_thresholds", lambda *words: {"lesion": 0.0, "normal": 0.0})
    with pytest.raises(
        UserError, match=r"would drop all 1 pairs"
    ):  # the network misses this lesion, and many real ones
        run(images, wrong, tmp_path, 0.5)
