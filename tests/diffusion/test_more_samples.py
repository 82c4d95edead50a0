"""A folder of samples is extended by a higher count; its earlier images keep their bytes, whatever happens."""

import dataclasses
import json
import signal
import time
from pathlib import Path

import pytest
import ranks
from accelerate import Accelerator
from kills import Killed, killed, killed_after
from tiny_ldm import SAMPLING

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of, write_json
from mgcc_dist.common.lock import lock_folder
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.selection import FORMAT, apply_selection, drop_records
from mgcc_dist.diffusion import sampling

MORE = dataclasses.replace(SAMPLING, count=12)  # SAMPLING: 7 images in shards of 2


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def folder(pipeline_folder, tmp_path, accelerator) -> Path:
    sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    return tmp_path / "s"


def indices(folder: Path) -> list[int]:
    samples = ShardFolder.open(folder)
    return [samples[i].meta["index"] for i in range(len(samples))]


def shards(folder: Path) -> dict[str, str]:
    return {path.name: sha256_of(path) for path in folder.glob("*.tar")}


def test_higher_count_adds_the_further_images(folder, pipeline_folder, tmp_path, accelerator):
    before = shards(folder)
    sampling.sample(MORE, pipeline_folder, folder, accelerator)
    assert indices(folder) == list(range(12))
    assert before.items() <= shards(folder).items()
    assert json.loads((folder / "request.json").read_text())["count"] == 12
    assert len(json.loads((folder / "index-7.json").read_text())["shards"]) == len(before)

    sampling.sample(MORE, pipeline_folder, tmp_path / "at_once", accelerator)
    extended, at_once = ShardFolder.open(folder), ShardFolder.open(tmp_path / "at_once")
    for i in range(12):  # another batch may round differently
        assert abs(extended[i].image.astype(int) - at_once[i].image).max() <= 1
    with pytest.raises(
        UserError, match=r"is for 12 images, more than sampling\.count 7\. Set sampling\.count 12 or more"
    ):
        sampling.sample(SAMPLING, pipeline_folder, folder, accelerator)


@pytest.mark.parametrize("images", [0, 1, 2, 4, "index", "request"])
def test_folder_killed_while_it_is_extended_stays_complete(folder, pipeline_folder, accelerator, monkeypatch, images):
    """Training may read it at any time. The same command then extends it with what is missing."""
    before = shards(folder)

    def write(path, value, original=write_json):
        if path.name == "request.json":
            raise Killed
        original(path, value)

    with killed_after(images, monkeypatch) as patch:
        if images == "index":
            patch.setattr(sampling, "write_index", killed)
        if images == "request":
            patch.setattr("mgcc_dist.data.shard_writer.write_json", write)
        sampling.sample(MORE, pipeline_folder, folder, accelerator)
    assert indices(folder) == list(range(12 if images == "request" else 7))
    assert before.items() <= shards(folder).items()
    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    sampling.sample(MORE, pipeline_folder, folder, accelerator)
    assert indices(folder) == list(range(12))
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.multiprocess
def test_ranks_killed_by_sigkill_while_they_extend_a_folder_lose_nothing(folder, pipeline_folder, accelerator):
    """12 images add shards of 1, 2 and 2: rank 0 has written the first, rank 1 is in the middle of the second."""
    before, index = shards(folder), (folder / "index.json").read_bytes()
    script = Path(__file__).with_name("sample_on_ranks.py")
    started = ranks.start(ranks.forked(2), [script, pipeline_folder, folder, 12])
    deadline = time.monotonic() + ranks.DEADLINE
    while not (folder / "entries" / "synthetic-000007.tar.json").is_file() or not list(folder.glob(".*.tmp")):
        assert started.poll() is None, started.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started.send_signal(signal.SIGKILL)
    started.communicate()
    assert started.returncode == -signal.SIGKILL
    assert (folder / "index.json").read_bytes() == index
    assert indices(folder) == list(range(7))
    assert before.items() < shards(folder).items()

    written = {path: path.stat().st_mtime_ns for path in folder.glob("*.tar")}
    lock_folder(folder, accelerator)
    assert not list(folder.glob(".*.tmp"))
    sampling.sample(MORE, pipeline_folder, folder, accelerator)
    assert indices(folder) == list(range(12))
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_interrupted_folder_may_be_finished_with_a_higher_count(pipeline_folder, tmp_path, accelerator, monkeypatch):
    """The shard that had fewer images is written again."""
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "write_index", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            sampling.sample(SAMPLING, pipeline_folder, tmp_path / "s", accelerator)
    sampling.sample(MORE, pipeline_folder, tmp_path / "s", accelerator)
    assert indices(tmp_path / "s") == list(range(12))
    assert len(shards(tmp_path / "s")) == 6


def test_shards_keep_their_size_when_extended(folder, pipeline_folder, accelerator):
    before = shards(folder)
    other = dataclasses.replace(MORE, per_shard=5)
    sampling.sample(dataclasses.replace(SAMPLING, per_shard=5), pipeline_folder, folder, accelerator)
    assert shards(folder) == before
    sampling.sample(other, pipeline_folder, folder, accelerator)
    assert indices(folder) == list(range(12))
    assert before.items() <= shards(folder).items()


def test_dropped_images_stay_dropped_and_selections_stay_valid(folder, pipeline_folder, tmp_path, accelerator):
    request = json.loads((folder / "index.json").read_text())["request"]
    chosen = {"accepted": ["synthetic-000001", "synthetic-000006"], "rejected": ["synthetic-000000"]}
    write_json(tmp_path / "selection.json", {"format": FORMAT, "version": 1, "samples": request, **chosen})
    drop_records(folder, ["synthetic-000004", "synthetic-000005"])
    sampling.sample(MORE, pipeline_folder, folder, accelerator)
    assert indices(folder) == [0, 1, 2, 3, 6, 7, 8, 9, 10, 11]
    assert ShardFolder.open(folder).index["dropped"] == ["synthetic-000004", "synthetic-000005"]
    assert apply_selection(tmp_path / "selection.json", folder, tmp_path / "curated") == 2
    assert indices(tmp_path / "curated") == [1, 6]


@pytest.mark.parametrize("name", ["samples", "a/b", "..", ".hidden"])
def test_name_that_would_mix_samples_with_a_stage_is_refused(name):
    with pytest.raises(ValueError, match=r"sampling\.name: .* can't be used\. Give a plain folder name"):
        dataclasses.replace(SAMPLING, name=name)
