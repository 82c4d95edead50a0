"""Sampling into shards: every index once, the same images however often it is killed and on however many ranks."""

import dataclasses
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate import Accelerator
from tiny_ldm import SAMPLING

from mgcc_dist.data import records
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.diffusion import pipeline, sampling
from mgcc_dist.errors import UserError
from mgcc_dist.files import sha256_of
from mgcc_dist.train.signals import EXIT_STOPPED


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.iterdir() if path.is_file()}


def test_records_say_where_they_come_from(pipeline_folder, tmp_path, accelerator):
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    samples = ShardFolder.open(tmp_path / "s")
    assert samples.dataset == "synthetic"
    for i in range(len(samples)):
        sample = samples.read(i)
        assert (sample.image.shape, sample.image.dtype, sample.mask) == ((16, 16), np.uint8, None)
        made_by = {"checkpoint": pipeline.fingerprint(pipeline_folder), "seed": 5, "index": i}
        expected = {"dataset": "synthetic", "class": "synthetic", "original_size": [16, 16], **made_by}
        assert expected.items() <= sample.meta.items()
    assert [record.shard for record in samples.records].count("synthetic-000002.tar") == 2


def test_image_depends_on_checkpoint_seed_and_index_alone(pipeline_folder, tmp_path, accelerator):
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "a", accelerator)
    other = dataclasses.replace(SAMPLING, count=5, per_shard=3, batch=1)
    sampling.sample(other, pipeline_folder, tmp_path / "b", accelerator)
    a, b = ShardFolder.open(tmp_path / "a"), ShardFolder.open(tmp_path / "b")
    for i in range(5):
        # another batch may round otherwise
        assert np.abs(a.read(i).image.astype(int) - b.read(i).image).max() <= 1
    assert not np.array_equal(a.read(0).image, a.read(1).image)
    sampling.sample(dataclasses.replace(SAMPLING, seed=6), pipeline_folder, tmp_path / "c", accelerator)
    assert not np.array_equal(a.read(0).image, ShardFolder.open(tmp_path / "c").read(0).image)


@pytest.mark.parametrize("images", [0, 1, 2, 3, 6, 7])
def test_killed_run_makes_only_the_missing_shards(pipeline_folder, tmp_path, accelerator, monkeypatch, images):
    """A kill after any number of images: the next start keeps the whole shards and ends in the same bytes."""
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "whole", accelerator)

    class Killed(BaseException):
        pass

    made = 0

    def encode(sample, original=records._encode):
        nonlocal made
        if made == images:
            raise Killed
        made += 1
        return original(sample)

    with monkeypatch.context() as patch:
        patch.setattr(records, "_encode", encode)
        if images < SAMPLING.count:
            with pytest.raises(Killed):
                sampling.sample(SAMPLING, pipeline_folder, tmp_path / "killed", accelerator)
        else:
            patch.setattr(sampling, "write_index", lambda *_, **__: (_ for _ in ()).throw(Killed))
            with pytest.raises(Killed):
                sampling.sample(SAMPLING, pipeline_folder, tmp_path / "killed", accelerator)
    assert not sampling.is_finished(SAMPLING, pipeline_folder, tmp_path / "killed", accelerator)
    shards = sorted((tmp_path / "killed").glob("*.tar"))
    assert len(shards) == images // 2 + (images == 7)
    before = {path: path.stat().st_mtime_ns for path in shards}
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "killed", accelerator)
    assert {path: path.stat().st_mtime_ns for path in shards} == before
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sampling.is_finished(SAMPLING, pipeline_folder, tmp_path / "killed", accelerator)


def test_signal_ends_with_the_code_for_start_again(pipeline_folder, tmp_path, accelerator, monkeypatch):
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


@pytest.mark.parametrize("change", [{"seed": 6}, {"steps": 4}, {"count": 8}, {"per_shard": 3}])
def test_samples_of_another_request_are_not_mixed(pipeline_folder, tmp_path, accelerator, change):
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    [key] = change
    with pytest.raises(UserError, match=f"holds images made with {key} .*delete the folder"):
        sampling.is_finished(dataclasses.replace(SAMPLING, **change), pipeline_folder, tmp_path / "s", accelerator)


def test_samples_of_another_checkpoint_are_not_mixed(pipeline_folder, tmp_path, accelerator):
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    weights = pipeline_folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes() + b" ")
    with pytest.raises(UserError, match="holds images made with checkpoint"):
        sampling.is_finished(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)


@pytest.mark.multiprocess
def test_two_ranks_make_every_index_once_and_the_images_of_one_rank(
    pipeline_folder, tmp_path, accelerator, monkeypatch
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = Path(__file__).parent / "sample_on_ranks.py"
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    command = [sys.executable, *launcher, str(script), str(pipeline_folder), str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "world size 2" in done.stdout
    assert "rank 0 of 2): 100%" in done.stderr
    samples = ShardFolder.open(tmp_path / "two")
    assert [samples.read(i).meta["index"] for i in range(len(samples))] == list(range(7))

    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "one", accelerator)
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
