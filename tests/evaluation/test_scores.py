"""Scoring in batches equals scoring image by image."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn

from mgcc_dist.common.errors import SharedError
from mgcc_dist.data.batch import Batch
from mgcc_dist.data.loader import EvalLoader, Ranks
from mgcc_dist.data.sample import Sample
from mgcc_dist.evaluation import scores
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.evaluation.scores import CachedBatches, score_images


def batches(sizes):
    generator = torch.Generator().manual_seed(2)
    made, first = [], 0
    for size in sizes:
        images = torch.randn(size, 1, 12, 12, generator=generator)
        shares = torch.rand(size, 1, 1, 1, generator=generator)
        masks = (torch.rand(size, 1, 12, 12, generator=generator) < shares).float()
        masks[0] = 0  # an image without lesion
        images[-1] = -1  # predicted empty
        made.append(Batch(images, masks, torch.arange(first, first + size), [f"k{first + i}" for i in range(size)]))
        first += size
    return made


@pytest.mark.parametrize("surface", [False, True])
def test_batched_scores_are_bit_identical_to_single_images(surface):
    data = batches((3, 3, 1))
    scores = score_images(nn.Identity(), data, Accelerator(cpu=True), surface)
    expected = {
        key: score_image(np.asarray(image[0] > 0), np.asarray(mask[0] > 0.5), surface)
        for batch in data
        for key, image, mask in zip(batch.keys, batch.images, batch.masks, strict=True)
    }
    assert [score.pop("key") for score in scores] == sorted(expected)
    assert scores == [expected[key] for key in sorted(expected)]


class WhiteDisc:
    """One image, a white disc of radius 20 at the left end of 50x120 pixels, which is also the mask."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        rows, columns = np.mgrid[:50, :120]
        disc = np.where((rows - 24.5) ** 2 + (columns - 34.5) ** 2 <= 400, 255, 0).astype(np.uint8)
        return Sample("disc", disc, disc, {})


@pytest.mark.parametrize(
    ("fit", "seen"), [("stretch", slice(None)), ("letterbox", slice(None)), ("crop", slice(35, 85))]
)
def test_a_lesion_outside_the_crop_counts_as_missed(fit, seen):
    """The network thresholds: it finds all that it sees."""
    loader = EvalLoader(WhiteDisc(), 1, 64, Ranks(), fit=fit)
    (score,) = score_images(nn.Identity(), loader.batches(), Accelerator(cpu=True), surface=True, fit=fit)
    disc = WhiteDisc()[0].mask > 0
    visible = disc[:, seen].sum() / disc.sum()
    assert score["lesion"]["recall"] == pytest.approx(visible, abs=0.02)
    assert score["lesion"]["iou"] == pytest.approx(visible, abs=0.04)
    assert 0.3 < visible < 0.8 if fit == "crop" else visible == 1
    if fit != "crop":
        assert score["hd95"] < 2


def test_scoring_without_surface_distances_synchronises_once(monkeypatch):
    reads = []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self, read=torch.Tensor.tolist: reads.append(1) or read(self))
    for name in ("item", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("a read of the device in the loop"))
    assert len(score_images(nn.Identity(), batches((3, 3, 1)), Accelerator(cpu=True), surface=False)) == 7
    assert len(reads) == 1


def test_output_that_is_not_finite_is_an_error_and_not_an_empty_mask():
    data = batches((3, 3, 1))
    data[1].images[2, 0, 5, 5] = torch.nan
    with pytest.raises(SharedError, match=r"network's output for image 'k5' is not finite .*as for 0 others"):
        score_images(nn.Identity(), data, Accelerator(cpu=True), surface=False)


@pytest.mark.parametrize(("limit", "loads"), [(2**30, 1), (5000, 2)])
def test_cached_batches_are_loaded_once_unless_they_are_too_large(monkeypatch, limit, loads):
    class Loader:
        passes = 0

        def batches(self):
            self.passes += 1
            yield from batches((3, 3, 1))  # 8064 bytes

    monkeypatch.setattr(scores, "CACHE_BYTES", limit)
    loader = Loader()
    kept = CachedBatches(loader, torch.device("cpu"))
    for _ in range(2):
        seen = list(kept)
        assert [batch.keys for batch in seen] == [batch.keys for batch in batches((3, 3, 1))]
        assert all(torch.equal(a.images, b.images) for a, b in zip(seen, batches((3, 3, 1)), strict=True))
    assert loader.passes == loads
