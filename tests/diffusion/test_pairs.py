"""A denoiser with masks: what it is trained on, that it uses the mask, and samples that are pairs of image and mask."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import LDMPipeline
from tiny_ldm import DENOISER, PROGRESS, SAMPLING, SHAPE
from torch.nn import functional as F

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import write_json
from mgcc_dist.data.images import resize_mask
from mgcc_dist.data.loader import StreamOffsets
from mgcc_dist.data.phantom import draw
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.splits import Split, make_split
from mgcc_dist.diffusion import denoiser, latents, pipeline, sampling
from mgcc_dist.diffusion.condition import Condition, shrink_masks
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.denoiser import build_loss, predict
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.diffusion.latents import LatentBatch
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.diffusion.sampler import class_of_index
from mgcc_dist.diffusion.stages import check_masks
from mgcc_dist.diffusion.warped_masks import WarpedMasks

MASKED = replace(DENOISER, masks="labeled")


@pytest.fixture(scope="module")
def images(phantom_shards) -> ImageData:
    """18 training phantoms, 9 of them labeled, and 6 validation phantoms of 16x16."""
    split = make_split(phantom_shards.records, seed=0, validation=6, labeled=9, grouped=True, name="split")
    return ImageData(DataConfig(image_size=16, workers=0, mirror=True), phantom_shards, split)


def test_latents_have_the_masks_of_labeled_images_only(vae, images, tmp_path):
    encoded = latents.encode(vae, "abc", images, 4, tmp_path / "latents", Accelerator(cpu=True), "labeled")
    labeled = set(images.split.labeled)
    for latent, sample in zip(encoded.train, images.train, strict=True):
        square = resize_mask(sample.mask, 16, 16)
        views = shrink_masks(torch.from_numpy(np.stack([square, square[:, ::-1]])), 4).half()
        assert torch.equal(latent.mask, views if sample.key in labeled else torch.zeros(2, 1, 4, 4).half())
    for latent, sample in zip(encoded.val, images.val, strict=True):
        assert torch.equal(
            latent.mask, shrink_masks(torch.from_numpy(resize_mask(sample.mask, 16, 16))[None], 4).half()
        )
    batch, _ = next(encoded.train_loader(18, 0, Accelerator(cpu=True)).batches(StreamOffsets()))
    views = [encoded.train[encoded.train.index_of(key)] for key in batch.keys]
    for mean, mask, latent in zip(batch.mean, batch.mask, views, strict=True):
        view = int(not torch.equal(mean, latent.mean[0]))
        assert torch.equal(mask, latent.mask[view]), "the mask of a mirrored image is mirrored"


def test_mask_at_latent_size_is_the_share_of_lesion():
    mask = torch.zeros(1, 8, 8, dtype=torch.uint8)
    mask[0, :2, :3] = 255
    assert shrink_masks(mask, 2).tolist() == [[[[6 / 16 * 2 - 1, -1.0], [-1.0, -1.0]]]]


def test_split_without_the_masks_that_a_denoiser_needs_is_refused(phantom_shards, tmp_path):
    keys = phantom_shards.keys()
    images = ImageData(DataConfig(image_size=16), phantom_shards, Split("s", (), tuple(keys[:9]), tuple(keys[9:])))
    with pytest.raises(UserError, match=r"denoiser\.masks: labeled needs training images with masks, and split s has"):
        images.masked("labeled")
    assert len(images.masked("all")) == 9


def test_masks_that_can_not_be_warped_are_refused_before_training(phantom_shards, tmp_path):
    ring = np.full((32, 32), 255, np.uint8)
    ring[1:-1, 1:-1] = 0
    sample = replace(phantom_shards[0], image=ring, mask=ring)
    write_index(tmp_path, "toy", [write_shard(tmp_path / "a.tar", [sample])])
    split = Split("s", (sample.key,), (), ())
    images = ImageData(DataConfig(image_size=16), ShardFolder.open(tmp_path), split)
    with pytest.raises(UserError, match=r"masks: no mask of class .* that differs from the training masks"):
        check_masks("labeled", images, tmp_path)
    (tmp_path / "autoencoder").mkdir()
    write_json(tmp_path / "autoencoder" / "result.json", {})
    check_masks("labeled", images, tmp_path)  # too late, and not read again at every start


def phantom_latents(indices):
    """Latents and masks [N,1,8,8] of phantoms."""
    drawn = [draw(0, index, 32) for index in indices]
    pixels = torch.from_numpy(np.stack([each.image for each in drawn])).float()
    masks = torch.from_numpy(np.stack([each.mask for each in drawn]))
    return F.adaptive_avg_pool2d(pixels[:, None], 8) / 40 - 2, shrink_masks(masks, 8)


def test_training_teaches_the_denoiser_to_use_the_mask():
    """On other images, the error is lower with an image's own mask than with none or another image's."""
    torch.manual_seed(0)
    data = type("LatentData", (), {"shape": (1, 8, 8), "classes": {}})
    loss = build_loss(replace(MASKED, diffusion_steps=100), data())
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-2)
    z, masks = phantom_latents(range(96))

    def batch(chosen, masks, offsets):
        mean = z[chosen]
        keys = [str(i) for i in chosen]
        return LatentBatch(
            mean, torch.full_like(mean, -30), torch.zeros(len(chosen)), torch.tensor(offsets), keys, masks
        )

    for step in range(60):
        chosen = torch.randperm(64)[:16]
        loss(batch(chosen, masks[chosen], range(16 * step, 16 * step + 16)), PROGRESS)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
    test = [i for i in range(64, 96) if masks[i].max() > 0]

    @torch.no_grad()
    def error(masks):
        generators = make_generators(0, RngStream.VALIDATION, range(len(test)))
        loss.label_dropout = 0
        return loss.sample_losses(batch(torch.tensor(test), masks, range(len(test))), generators).mean()

    right, none, wrong = error(masks[test]), error(0 * masks[test]), error(masks[test].roll(1, 0))
    assert right < 0.95 * none
    assert right < 0.9 * wrong


@pytest.mark.parametrize("classes", [True, False])
def test_samples_are_pairs_whose_masks_belong_to_their_index_and_class(vae, images, tmp_path, classes):
    config = replace(MASKED, classes=classes)
    counts = {"benign": 4, "malignant": 3, "normal": 2}
    torch.manual_seed(1)
    unet = denoiser.build(config, SHAPE, 3)
    pipeline.save(vae, unet, config, counts, {}, tmp_path / "p")
    assert pipeline.load(tmp_path / "p").masks
    masks = WarpedMasks(images.masked("labeled"), 16)
    accelerator = Accelerator(cpu=True)
    settings = replace(SAMPLING, guidance=2.0)
    sampling.sample(settings, tmp_path / "p", tmp_path / "s", accelerator, masks)
    pairs = ShardFolder.open(tmp_path / "s")
    names = list(masks.counts)
    for i, pair in enumerate(pairs):
        name = names[class_of_index(i, list(masks.counts.values()))]
        assert pair.meta["class"] == name
        assert np.array_equal(pair.mask, masks.draw(name, settings.seed, i))
    assert pairs.index["labeled"] == settings.count
    assert pairs.index["request"]["masks"] == masks.sha256
    others = WarpedMasks(images.masked("all"), 16)
    with pytest.raises(UserError, match="holds images made with masks"):
        sampling.sample(settings, tmp_path / "p", tmp_path / "s", accelerator, others)


def test_plain_diffusers_samples_the_denoiser_without_mask(vae, tmp_path):
    config = replace(MASKED, classes=True)
    torch.manual_seed(1)
    unet = denoiser.build(config, SHAPE, 2)
    pipeline.save(vae, unet, config, {"a": 1, "b": 1}, {}, tmp_path / "p")
    plain = LDMPipeline.from_pretrained(tmp_path / "p")
    plain.unet = pipeline.unconditional_unet(plain.unet)
    z, t = torch.randn(2, *SHAPE), torch.tensor(5)
    null = Condition(torch.tensor([2, 2]), torch.zeros(2, 1, 4, 4))
    with torch.no_grad():
        torch.testing.assert_close(plain.unet(z, t).sample, predict(unet, z, t, null), rtol=1e-4, atol=1e-5)
    plain.set_progress_bar_config(disable=True)
    assert plain(batch_size=1, num_inference_steps=2, output_type="np").images.shape == (1, 16, 16, 1)
