"""Encoded latents: their values, their order, and the checks that they belong to the autoencoder."""

import copy
import re
import shutil
from contextlib import closing
from itertools import islice

import pytest
import torch
import webdataset
from accelerate import Accelerator
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from tiny_ldm import AUTOENCODER, DENOISER, PROGRESS, SHAPE, latents_of

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data import shard_writer
from mgcc_dist.data.loader import Ranks, StreamOffsets
from mgcc_dist.data.splits import make_split
from mgcc_dist.diffusion import autoencoder, denoiser, latents
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.denoiser import DenoiserLoss
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.diffusion.latents import LatentBatch, LatentFolder, LatentLoader
from mgcc_dist.diffusion.objective import build_objective
from mgcc_dist.train.weights_file import save_weights


@pytest.fixture(scope="module")
def images(phantom_shards) -> ImageData:
    """18 training and 6 validation phantoms, flipped horizontally half of the time."""
    split = make_split(phantom_shards.records, seed=0, validation=6, labeled=9, grouped=True, name="split")
    return ImageData(DataConfig(image_size=16, workers=0, mirror=True), phantom_shards, split)


@pytest.fixture
def encoded(vae, images, tmp_path):
    return latents.encode(vae, "abc", images, 4, tmp_path / "latents", Accelerator(cpu=True))


def take(loader, steps, start=None):
    with closing(loader.batches(start or StreamOffsets())) as batches:
        return list(islice(batches, steps))


def test_stored_posteriors_of_image_and_mirror_image_match_the_autoencoder(encoded, vae, images):
    assert (len(encoded.train), len(encoded.val), encoded.shape) == (18, 6, SHAPE)
    assert encoded.classes == encoded.train.index["classes"]
    assert sum(encoded.classes.values()) == 18
    for batch in images.train_eval_loader(18, Accelerator(cpu=True)).batches():
        for key, image in zip(batch.keys, batch.to("cpu").images, strict=True):
            latent = encoded.train[encoded.train.index_of(key)]
            assert latent.mean.dtype == latent.logvar.dtype == torch.float16
            with torch.no_grad():
                posterior = vae.encode(torch.stack([image, image.flip(2)])).latent_dist
            torch.testing.assert_close(latent.mean.float(), posterior.mean, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(latent.logvar.float(), posterior.logvar, rtol=1e-3, atol=1e-3)
    assert encoded.val[0].mean.shape == (1, *SHAPE)


def test_stored_posteriors_are_sampled_in_float32_under_autocast_to_bf16():
    """Autocast of the CPU refuses to concatenate float16."""
    mean, logvar = torch.zeros(2, 1, *SHAPE, dtype=torch.float16)
    batch = latents_of(torch.cat([mean, logvar], dim=1), [0])
    with torch.autocast("cpu", torch.bfloat16):
        sample = batch.sample([torch.Generator().manual_seed(3)])
    torch.testing.assert_close(sample, torch.randn(1, *SHAPE, generator=torch.Generator().manual_seed(3)))


def test_records_are_safetensors_files_that_webdataset_reads(encoded):
    [shard] = encoded.train.folder.glob("*.tar")
    records = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [record["__key__"] for record in records] == encoded.train.keys()
    assert load(records[0]["safetensors"]).keys() == {"mean", "logvar"}


def test_training_on_latents_has_the_same_losses_as_encoding_every_step(encoded, vae, unet, images):
    """Samples, flips and noise are the same; the losses differ by the rounding to float16."""
    module = DenoiserLoss(unet, build_objective(DENOISER), label_dropout=0.1)
    accelerator = Accelerator(cpu=True)
    stored = take(encoded.train_loader(4, 9, accelerator), 6)
    pixels = take(images.train_loader(4, 9, accelerator), 6)
    for (batch, after), (shown, then) in zip(stored, pixels, strict=True):
        assert (batch.keys, batch.offsets.tolist(), after) == (shown.keys, shown.offsets.tolist(), then)
        with torch.no_grad():
            posterior = vae.encode(shown.to("cpu").images).latent_dist
            fresh = LatentBatch(posterior.mean, posterior.logvar, batch.classes, shown.offsets, shown.keys, batch.mask)
            torch.testing.assert_close(batch.mean.float(), posterior.mean, rtol=1e-3, atol=1e-3)
            losses = [module(each, PROGRESS)["loss"] for each in (batch, fresh)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


@settings(deadline=None, derandomize=True, max_examples=15)
@example(before=2, after=3, batch=2, steps=4, seed=5, workers=1)  # a process per stream
@given(
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    batch=st.integers(1, 5),
    steps=st.integers(1, 6),
    seed=st.integers(0, 99),
    workers=st.just(0),
)
def test_order_is_a_function_of_seed_and_position_for_any_ranks_and_resumes(
    folder_of_latents, before, after, batch, steps, seed, workers
):
    """`before` ranks for some steps, then `after` ranks from there, see the same stream as one rank."""
    first, end = stream_of(folder_of_latents, before, batch, steps, seed, StreamOffsets(), workers)
    rest, last = stream_of(folder_of_latents, after, batch, 3, seed, end, workers)
    assert not first.keys() & rest.keys()
    single, single_end = stream_of(folder_of_latents, 1, batch, steps * before + 3 * after, seed, StreamOffsets(), 0)
    assert (first | rest, last) == (single, single_end)
    for epoch in range(len(single) // 18):
        assert len({single[index][0] for index in range(18 * epoch, 18 * epoch + 18)}) == 18


@pytest.fixture(scope="module")
def folder_of_latents(images, tmp_path_factory) -> LatentFolder:
    torch.manual_seed(0)
    vae = autoencoder.build(AUTOENCODER, 16)
    return latents.encode(vae, "abc", images, 4, tmp_path_factory.mktemp("latents") / "l", Accelerator(cpu=True)).train


def stream_of(folder, world, batch, steps, seed, start, workers):
    """Return {offset: (key, mean)} of all ranks together, and the final offsets."""
    samples, ends = {}, set()
    for rank in range(world):
        taken = take(LatentLoader(folder, batch, seed, Ranks(rank, world), workers), steps, start)
        ends.add(taken[-1][1])
        for got, _ in taken:
            for key, offset, mean in zip(got.keys, got.offsets.tolist(), got.mean, strict=True):
                assert offset not in samples, "an offset occurs twice"
                samples[offset] = (key, mean.numpy().tobytes())
    assert len(ends) == 1, "the ranks disagree on the offsets"
    return samples, ends.pop()


def test_validation_latents_come_once_over_all_ranks_and_are_not_in_training(encoded):
    class Rank:
        num_processes = 2

        def __init__(self, process_index):
            self.process_index = process_index

    batches = [batch for rank in (0, 1) for batch in encoded.val_batches(2, Rank(rank))]
    assert sorted(index for batch in batches for index in batch.offsets.tolist()) == list(range(6))
    keys = {key for batch in batches for key in batch.keys}
    assert keys == set(encoded.val.keys())
    assert not keys & set(encoded.train.keys())


def test_labels_number_the_training_classes_and_unknown_classes_get_the_next_number(encoded):
    names = sorted(encoded.classes)
    [(batch, _)] = take(encoded.train_loader(18, 0, Accelerator(cpu=True)), 1)
    for key, label in zip(batch.keys, batch.classes.tolist(), strict=True):
        assert encoded.train.records[encoded.train.index_of(key)].category == names[label]
    encoded.train.index["classes"] = {"another class": 18}
    assert {label for batch in encoded.val_batches(6, Accelerator(cpu=True)) for label in batch.classes.tolist()} == {1}


@pytest.mark.parametrize(
    ("sha256", "mirror", "message"),
    [("another", True, "holds latents made with autoencoder abc, not another"), ("abc", False, "mirror True, not F")],
)
def test_latents_of_another_autoencoder_or_augmentation_are_refused(
    encoded, vae, images, tmp_path, sha256, mirror, message
):
    images = copy.copy(images)
    images.mirror = mirror
    with pytest.raises(UserError, match=f"{message}.*Choose another --out"):
        latents.encode(vae, sha256, images, 4, tmp_path / "latents", Accelerator(cpu=True))


def test_latents_of_another_split_are_refused(encoded, vae, phantom_shards, tmp_path):
    split = make_split(phantom_shards.records, seed=1, validation=6, labeled=9, grouped=True, name="split")
    others = ImageData(DataConfig(image_size=16, workers=0, mirror=True), phantom_shards, split)
    with pytest.raises(UserError, match="latents made with images"):
        latents.encode(vae, "abc", others, 4, tmp_path / "latents", Accelerator(cpu=True))


def test_a_killed_run_keeps_complete_shards_and_resumes_with_the_others(encoded, vae, images, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PER_SHARD", 5)
    monkeypatch.setattr(shard_writer, "write_json", stop_after := StopAfter(shard_writer.write_json, 3))
    with pytest.raises(Stopped):
        latents.encode(vae, "abc", images, 4, tmp_path / "killed", Accelerator(cpu=True))
    assert not (tmp_path / "killed" / "train" / "index.json").exists()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "train").glob("*.tar")}
    assert len(before) == 3

    stop_after.limit = None
    latents.encode(vae, "abc", images, 4, tmp_path / "killed", Accelerator(cpu=True))
    latents.encode(vae, "abc", images, 4, tmp_path / "complete", Accelerator(cpu=True))
    kept = [path for path, when in before.items() if path.stat().st_mtime_ns == when]
    assert len(kept) == 2, "only the shard without an entry may be encoded again"
    for path in (tmp_path / "complete").rglob("*.*"):
        assert sha256_of(path) == sha256_of(tmp_path / "killed" / path.relative_to(tmp_path / "complete")), path


class Stopped(BaseException):
    pass


class StopAfter:
    """Wrap a function; from call `limit` + 1 on it raises Stopped."""

    def __init__(self, function, limit):
        self.function, self.limit, self.calls = function, limit, 0

    def __call__(self, *args, **kwargs):
        self.calls += 1
        if self.limit is not None and self.calls > self.limit:
            raise Stopped
        return self.function(*args, **kwargs)


def test_the_error_names_the_damaged_record(encoded, tmp_path):
    shutil.copytree(encoded.train.folder, tmp_path / "damaged")
    [shard] = (tmp_path / "damaged").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[content.index(b'"mean"') + 200] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"its sha256 does not match index\.json"):
        LatentFolder.open(tmp_path / "damaged")
    folder = LatentFolder.open(tmp_path / "damaged", verify=False)
    with pytest.raises(UserError, match=rf"record {folder.keys()[0]!r} is corrupt"):
        folder[0]


def test_a_denoiser_of_another_autoencoder_or_architecture_is_refused(encoded, unet, tmp_path):
    path = tmp_path / "last" / "model.safetensors"
    save_weights(unet.state_dict(), path, {"autoencoder": "abc"})
    assert denoiser.load(DENOISER, encoded, path.parent).config.in_channels == 2

    save_weights(unet.state_dict(), path, {"autoencoder": "def"})
    with pytest.raises(UserError, match="was trained on latents of autoencoder def, not of abc"):
        denoiser.load(DENOISER, encoded, path.parent)

    other = denoiser.build(DENOISER, (3, 4, 4), 0)
    save_weights(other.state_dict(), path, {"autoencoder": "abc"})
    with pytest.raises(
        UserError, match=r"does not match the configured architecture\. conv_in\.weight is \(8, 3, 3, 3"
    ):
        denoiser.load(DENOISER, encoded, path.parent)

    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        denoiser.load(DENOISER, encoded, path.parent)


def test_latent_that_is_not_finite_in_float16_stops_the_encoding(vae, images, tmp_path):
    vae.quant_conv.bias.data[0] = 1e5  # more than the 65504 of float16
    first = images.train[0].key
    with pytest.raises(UserError, match=rf"^encoding: the result for image '{re.escape(first)}' is not finite"):
        latents.encode(vae, "abc", images, 4, tmp_path / "latents", Accelerator(cpu=True))
    assert not (tmp_path / "latents" / "train" / "index.json").exists()
