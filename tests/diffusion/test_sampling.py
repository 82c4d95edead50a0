"""Sampling into shards: every index once, and the same images for any number of interruptions and ranks."""

import dataclasses
import logging
import os
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from accelerate import Accelerator
from kills import killed, killed_after
from tiny_ldm import DENOISER, SAMPLING, SHAPE

from mgcc_dist.common.errors import EXIT_STOPPED, UserError
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion import denoiser, pipeline, sampling
from mgcc_dist.diffusion.condition import Condition
from mgcc_dist.diffusion.sampler import Sampler, class_of_index, initial_noise


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir() if path.is_file()}


def test_records_state_checkpoint_seed_and_index(pipeline_folder, tmp_path, accelerator):
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    samples = ShardFolder.open(tmp_path / "s")
    assert samples.dataset == "synthetic"
    for i in range(len(samples)):
        sample = samples[i]
        assert (sample.image.shape, sample.image.dtype, sample.mask) == ((16, 16), np.uint8, None)
        provenance = {"checkpoint": pipeline.fingerprint(pipeline_folder), "seed": 5, "index": i}
        expected = {"dataset": "synthetic", "class": "synthetic", "original_size": [16, 16], **provenance}
        assert expected.items() <= sample.meta.items()
    assert [record.shard for record in samples.records].count("synthetic-000002.tar") == 2


def test_an_image_depends_only_on_checkpoint_seed_and_index(pipeline_folder, tmp_path, accelerator):
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "a", accelerator)
    other = dataclasses.replace(SAMPLING, count=5, per_shard=3, batch=1)
    sampling.sample(other, pipeline_folder, tmp_path / "b", accelerator)
    a, b = ShardFolder.open(tmp_path / "a"), ShardFolder.open(tmp_path / "b")
    for i in range(5):
        # Another batch size may round differently.
        assert np.abs(a[i].image.astype(int) - b[i].image).max() <= 1
    assert not np.array_equal(a[0].image, a[1].image)
    sampling.sample(dataclasses.replace(SAMPLING, seed=6), pipeline_folder, tmp_path / "c", accelerator)
    assert not np.array_equal(a[0].image, ShardFolder.open(tmp_path / "c")[0].image)


@pytest.mark.parametrize("images", [0, 1, 2, 3, 6, 7])
def test_a_killed_run_resumes_with_the_missing_shards(pipeline_folder, tmp_path, accelerator, monkeypatch, images):
    """After a kill at any image, the next start keeps the complete shards and the final bytes are the same."""
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "complete", accelerator)
    with killed_after(images, monkeypatch) as patch:
        if images == SAMPLING.count:
            patch.setattr(sampling, "write_index", killed)
        sampling.sample(SAMPLING, pipeline_folder, tmp_path / "killed", accelerator)
    shards = sorted((tmp_path / "killed").glob("*.tar"))
    assert len(shards) == images // 2 + (images == 7)
    before = {path: path.stat().st_mtime_ns for path in shards}
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "killed", accelerator)
    assert {path: path.stat().st_mtime_ns for path in shards} == before
    assert contents(tmp_path / "killed") == contents(tmp_path / "complete")


def test_a_signal_exits_with_the_code_for_resume(pipeline_folder, tmp_path, accelerator, monkeypatch):
    def interrupt(path, samples, original=sampling.write_shard):
        os.kill(os.getpid(), 15)
        return original(path, samples)

    with monkeypatch.context() as patch:
        patch.setattr(sampling, "write_shard", interrupt)
        with pytest.raises(SystemExit) as stop:
            sampling.sample(SAMPLING, pipeline_folder, tmp_path, accelerator)
    assert stop.value.code == EXIT_STOPPED
    assert len(list(tmp_path.glob("*.tar"))) == 1
    sampling.sample(SAMPLING, pipeline_folder, tmp_path, accelerator)
    assert len(ShardFolder.open(tmp_path)) == 7


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"steps": 4}, {"sampler": "dpm_solver++"}, {"precision": "bf16"}],
)
def test_samples_of_another_config_are_refused(pipeline_folder, tmp_path, accelerator, change):
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    [key] = change
    with pytest.raises(
        UserError, match=rf"holds images made with {key} .* Set sampling\.name NAME to keep them and .*/NAME/s\.$"
    ):
        sampling.sample(dataclasses.replace(SAMPLING, **change), pipeline_folder, tmp_path / "s", accelerator)


def test_samples_of_another_checkpoint_are_refused(pipeline_folder, tmp_path, accelerator):
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    weights = pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UserError, match="holds images made with checkpoint"):
        sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)


@pytest.mark.parametrize("batch", [1, 2, 3, 7])
def test_initial_noise_is_bit_identical_for_any_batch_size(batch):
    parts = [initial_noise(5, list(range(7))[start : start + batch], SHAPE) for start in range(0, 7, batch)]
    assert torch.equal(torch.cat(parts), initial_noise(5, range(7), SHAPE))
    assert not torch.equal(parts[0][0], initial_noise(6, [0], SHAPE)[0])


def test_any_range_of_images_has_the_class_mix_of_training():
    counts = [294, 141, 91]
    for start, stop in [(0, 725), (0, 100), (300, 400)]:
        found = np.bincount([class_of_index(i, counts) for i in range(start, stop)], minlength=3) / (stop - start)
        np.testing.assert_allclose(found, np.array(counts) / 526, atol=0.02)


def test_guidance_extrapolates_from_the_null_class(vae, tmp_path):
    """With guidance g the noise is ε(null) + g (ε(class) - ε(null))."""
    torch.manual_seed(1)
    config = dataclasses.replace(DENOISER, classes=True)
    unet = denoiser.build(config, SHAPE, 2)
    pipeline.save(vae, unet, config, {"a": 1, "b": 1}, {}, tmp_path / "p")
    z, t, labels = torch.randn(2, *SHAPE), torch.tensor(500), torch.tensor([0, 1])
    with torch.no_grad():
        conditional, unconditional = (unet(z, t, label).sample for label in (labels, torch.tensor([2, 2])))
        for guidance in (0.0, 1.0, 3.0):
            sampler = Sampler(pipeline.load(tmp_path / "p"), "ddim", 2, guidance, False, False, torch.device("cpu"))
            torch.testing.assert_close(
                sampler._predict(z, t, Condition(labels)),
                unconditional + guidance * (conditional - unconditional),
                rtol=1e-4,
                atol=1e-5,
            )


def test_samples_of_a_class_conditional_model_state_their_class(vae, tmp_path, accelerator):
    config = dataclasses.replace(DENOISER, classes=True)
    unet = denoiser.build(config, SHAPE, 2)
    pipeline.save(vae, unet, config, {"a": 1, "b": 3}, {}, tmp_path / "p")
    sampling.sample(SAMPLING, tmp_path / "p", tmp_path / "s", accelerator)
    categories = [record.category for record in ShardFolder.open(tmp_path / "s").records]
    assert categories == ["ab"[class_of_index(i, [1, 3])] for i in range(7)]
    assert set(categories) == {"a", "b"}


def test_a_full_disk_keeps_complete_shards_and_the_same_command_resumes(
    pipeline_folder, tmp_path, accelerator, small_disk
):
    small = small_disk.folder
    small_disk.resize("40k")
    config = dataclasses.replace(SAMPLING, per_shard=1)
    with pytest.raises(UserError, match=r"No space left on device for .*[1-6] shards are kept"):
        sampling.sample(config, pipeline_folder, small / "s", accelerator)
    kept = {path: path.stat().st_mtime_ns for path in (small / "s").glob("*.tar")}
    assert not list((small / "s").rglob(".*.tmp")), "scratch files use up the space"

    small_disk.resize("1m")
    sampling.sample(config, pipeline_folder, small / "s", accelerator)
    unchanged = [path for path, when in kept.items() if path.stat().st_mtime_ns == when]
    assert len(unchanged) >= len(kept) - 1, "only the shard without an entry may be sampled again"
    sampling.sample(config, pipeline_folder, tmp_path / "complete", accelerator)
    assert contents(small / "s") == contents(tmp_path / "complete")


@pytest.mark.parametrize("bf16", [False, True])
def test_casting_the_networks_gives_no_warning(pipeline_folder, caplog, bf16):
    logging.getLogger("diffusers").addHandler(caplog.handler)
    try:
        sampler = Sampler(pipeline.load(pipeline_folder), "ddim", 2, 1.0, bf16, False, torch.device("cpu"))
    finally:
        logging.getLogger("diffusers").removeHandler(caplog.handler)
    assert {weight.dtype for network in (sampler._unet, sampler._vae) for weight in network.parameters()} == {
        sampler.dtype
    }
    assert caplog.text == ""


@pytest.mark.gpu
def test_compiled_bfloat16_images_on_a_gpu_match_float32(pipeline_folder):
    noise = initial_noise(5, range(4), SHAPE)
    device = torch.device("cuda")
    plain, fast = (
        Sampler(pipeline.load(pipeline_folder), "dpm_solver++", 20, 1.0, quick, quick, device).generate(noise)
        for quick in (False, True)
    )
    assert np.abs(plain.astype(int) - fast).mean() < 4


@pytest.mark.multiprocess
def test_two_ranks_sample_every_index_once_and_the_same_images_as_one_rank(pipeline_folder, tmp_path, accelerator):
    script = Path(__file__).with_name("sample_on_ranks.py")
    done = ranks.run(ranks.forked(2), [script, pipeline_folder, tmp_path / "two"])
    assert done.returncode == 0, done.stderr
    assert "world size 2" in done.stdout
    assert "sampling: 7/7 images (100%)" in done.stderr
    samples = ShardFolder.open(tmp_path / "two")
    assert [samples[i].meta["index"] for i in range(len(samples))] == list(range(7))

    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "one", accelerator)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_image_that_is_not_finite_stops_the_run_and_is_named(pipeline_folder, tmp_path, accelerator, monkeypatch):
    """Without this, it is saved as a black image."""

    def noise(seed, indices, shape):
        values = initial_noise(seed, indices, shape)
        values[[index == 3 for index in indices]] = torch.inf
        return values

    monkeypatch.setattr(sampling, "initial_noise", noise)
    with pytest.raises(
        UserError, match=r"^sampling: the result for image 3 is not finite \(NaN or infinity\)\. Sample"
    ):
        sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    assert not (tmp_path / "s" / "index.json").exists()
    assert sorted(path.name for path in (tmp_path / "s").glob("*.tar")) == ["synthetic-000000.tar"]  # images 0 and 1
