"""The images encoded once: the right numbers, in the order of the images, of the right autoencoder."""

import copy
import shutil
from contextlib import closing
from itertools import islice

import pytest
import torch
import webdataset
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from tiny_ldm import AUTOENCODER, DENOISER, PROGRESS, SHAPE

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data import shard_writer
from mgcc_dist.data.loader import StreamOffsets
from mgcc_dist.data.splits import make_split
from mgcc_dist.diffusion import autoencoder, denoiser, latents
from mgcc_dist.diffusion.config import DataConfig
from mgcc_dist.diffusion.denoiser import DenoiserLoss
from mgcc_dist.diffusion.images import ImageData
from mgcc_dist.diffusion.latents import LatentBatch, LatentFolder, LatentLoader
from mgcc_dist.train import checkpoints


@pytest.fixture(scope="module")
def images(phantom_shards) -> ImageData:
    """18 training and 6 held-out phantoms, mirrored half of the time."""
    split = make_split(phantom_shards.records, seed=0, validation=6, labeled=9, grouped=True, name="split")
    return ImageData(DataConfig(image_size=16, workers=0, mirror=True), phantom_shards, split)


@pytest.fixture
def encoded(vae, images, tmp_path):
    return latents.encode(vae, "abc", images, 4, tmp_path / "latents", Accelerator(cpu=True))


def take(loader, steps, start=None):
    with closing(loader.batches(start or StreamOffsets())) as batches:
        return list(islice(batches, steps))


def test_each_image_and_its_mirror_image_have_the_posterior_of_the_autoencoder(encoded, vae, images):
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


def test_a_record_is_a_plain_safetensors_file_that_any_webdataset_reader_finds(encoded):
    [shard] = encoded.train.folder.glob("*.tar")
    records = list(webdataset.WebDataset(str(shard), shardshuffle=False))
    assert [record["__key__"] for record in records] == encoded.train.keys()
    assert load(records[0]["safetensors"]).keys() == {"mean", "logvar"}


def test_training_on_latents_has_the_losses_of_encoding_every_step(encoded, vae, unet, images):
    """Same samples, mirrored or not, and the same noise; what differs is float16's rounding."""
    module = DenoiserLoss(unet, denoiser.build_scheduler(DENOISER), 0.1)
    accelerator = Accelerator(cpu=True)
    stored = take(encoded.train_loader(4, 9, accelerator), 6)
    pixels = take(images.train_loader(4, 9, accelerator), 6)
    for (batch, after), (shown, then) in zip(stored, pixels, strict=True):
        assert (batch.keys, batch.offsets.tolist(), after) == (shown.keys, shown.offsets.tolist(), then)
        with torch.no_grad():
            posterior = vae.encode(shown.to("cpu").images).latent_dist
            fresh = LatentBatch(posterior.mean, posterior.logvar, batch.classes, shown.offsets, shown.keys)
            torch.testing.assert_close(batch.mean.float(), posterior.mean, rtol=1e-3, atol=1e-3)
            losses = [module(each, PROGRESS)["loss"] for each in (batch, fresh)]
        torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


@settings(deadline=None, derandomize=True, max_examples=30)
@given(
    before=st.integers(1, 4),
    after=st.integers(1, 4),
    batch=st.integers(1, 5),
    steps=st.integers(1, 6),
    seed=st.integers(0, 99),
    workers=st.sampled_from([0] * 9 + [1]),
)
def test_order_is_a_function_of_seed_and_position_for_any_ranks_and_resumes(
    folder_of_latents, before, after, batch, steps, seed, workers
):
    """`before` ranks for some steps, then `after` ranks from there: what one rank sees, offset by offset."""
    many, end = seen(folder_of_latents, before, batch, steps, seed, StreamOffsets(), workers)
    rest, last = seen(folder_of_latents, after, batch, 3, seed, end, workers)
    assert not many.keys() & rest.keys()
    whole, one = seen(folder_of_latents, 1, batch, steps * before + 3 * after, seed, StreamOffsets(), 0)
    assert (many | rest, last) == (whole, one)
    for epoch in range(len(whole) // 18):
        assert len({whole[place][0] for place in range(18 * epoch, 18 * epoch + 18)}) == 18


@pytest.fixture(scope="module")
def folder_of_latents(images, tmp_path_factory) -> LatentFolder:
    torch.manual_seed(0)
    vae = autoencoder.build(AUTOENCODER, 16)
    return latents.encode(vae, "abc", images, 4, tmp_path_factory.mktemp("latents") / "l", Accelerator(cpu=True)).train


def seen(folder, world, batch, steps, seed, start, workers):
    """{place: (key, mean)} of all ranks together, and the offsets at the end."""
    places, ends = {}, set()
    for rank in range(world):
        taken = take(LatentLoader(folder, batch, seed, rank, world, workers), steps, start)
        ends.add(taken[-1][1])
        for got, _ in taken:
            for key, place, mean in zip(got.keys, got.offsets.tolist(), got.mean, strict=True):
                assert place not in places, "two ranks or steps have one place"
                places[place] = (key, mean.numpy().tobytes())
    assert len(ends) == 1, "ranks don't agree on the offsets"
    return places, ends.pop()


def test_held_out_latents_come_once_over_all_ranks_and_are_never_learned(encoded):
    class Rank:
        num_processes = 2

        def __init__(self, process_index):
            self.process_index = process_index

    batches = [batch for rank in (0, 1) for batch in encoded.val_batches(2, Rank(rank))]
    assert sorted(place for batch in batches for place in batch.offsets.tolist()) == list(range(6))
    keys = {key for batch in batches for key in batch.keys}
    assert keys == set(encoded.val.keys())
    assert not keys & set(encoded.train.keys())


def test_class_numbers_are_those_of_training_and_one_more_for_a_class_that_it_lacks(encoded):
    names = sorted(encoded.classes)
    [(batch, _)] = take(encoded.train_loader(18, 0, Accelerator(cpu=True)), 1)
    for key, number in zip(batch.keys, batch.classes.tolist(), strict=True):
        assert encoded.train.records[encoded.train.index_of(key)].category == names[number]
    encoded.train.index["classes"] = {"of another kind": 18}
    assert {number for batch in encoded.val_batches(6, Accelerator(cpu=True)) for number in batch.classes.tolist()} == {
        1
    }


@pytest.mark.parametrize(
    ("sha256", "mirror", "message"),
    [("another", True, "holds latents made with autoencoder abc, not another"), ("abc", False, "mirror True, not F")],
)
def test_latents_of_another_autoencoder_are_refused(encoded, vae, images, tmp_path, sha256, mirror, message):
    images = copy.copy(images)
    images.mirror = mirror
    with pytest.raises(UserError, match=f"{message}.*Delete the folder"):
        latents.encode(vae, sha256, images, 4, tmp_path / "latents", Accelerator(cpu=True))


def test_latents_of_another_split_are_refused(encoded, vae, phantom_shards, tmp_path):
    split = make_split(phantom_shards.records, seed=1, validation=6, labeled=9, grouped=True, name="split")
    others = ImageData(DataConfig(image_size=16, workers=0, mirror=True), phantom_shards, split)
    with pytest.raises(UserError, match="latents made with images"):
        latents.encode(vae, "abc", others, 4, tmp_path / "latents", Accelerator(cpu=True))


def test_a_kill_leaves_whole_shards_and_the_next_start_encodes_the_others(encoded, vae, images, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "PER_SHARD", 5)
    monkeypatch.setattr(shard_writer, "write_json", stop_after := StopAfter(shard_writer.write_json, 3))
    with pytest.raises(Stopped):
        latents.encode(vae, "abc", images, 4, tmp_path / "killed", Accelerator(cpu=True))
    assert not (tmp_path / "killed" / "training" / "index.json").exists()
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed" / "training").glob("*.tar")}
    assert len(made) == 3

    stop_after.limit = None
    latents.encode(vae, "abc", images, 4, tmp_path / "killed", Accelerator(cpu=True))
    latents.encode(vae, "abc", images, 4, tmp_path / "whole", Accelerator(cpu=True))
    kept = [path for path, when in made.items() if path.stat().st_mtime_ns == when]
    assert len(kept) == 2, "the shard whose entry was not written is made again, no other"
    for path in (tmp_path / "whole").rglob("*.*"):
        assert sha256_of(path) == sha256_of(tmp_path / "killed" / path.relative_to(tmp_path / "whole")), path


class Stopped(BaseException):
    pass


class StopAfter:
    """A function that raises Stopped from call `limit` + 1 on."""

    def __init__(self, function, limit):
        self.function, self.limit, self.calls = function, limit, 0

    def __call__(self, *words, **named):
        self.calls += 1
        if self.limit is not None and self.calls > self.limit:
            raise Stopped
        return self.function(*words, **named)


def test_a_damaged_record_is_named(encoded, tmp_path):
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
    checkpoints.save_weights(unet.state_dict(), path, {"autoencoder": "abc"})
    assert denoiser.load(DENOISER, encoded, path.parent).config.in_channels == 2

    checkpoints.save_weights(unet.state_dict(), path, {"autoencoder": "def"})
    with pytest.raises(UserError, match="was trained on latents of autoencoder def, not of abc"):
        denoiser.load(DENOISER, encoded, path.parent)

    other = denoiser.build(DENOISER, (3, 4, 4), 0)
    checkpoints.save_weights(other.state_dict(), path, {"autoencoder": "abc"})
    with pytest.raises(UserError, match=r"does not match the configured architecture: conv_in\.weight is \(8, 3, 3, 3"):
        denoiser.load(DENOISER, encoded, path.parent)

    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match="is damaged"):
        denoiser.load(DENOISER, encoded, path.parent)
