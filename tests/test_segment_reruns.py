"""`mgcc segment` again into the same folder: runs are extended, resumed on the same data, and refused on other data."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from segment_runs import UNET, configured, steps, write_data

from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of, write_json
from mgcc_dist.data.records import write_index, write_shard
from mgcc_dist.data.remote import fetch_index
from mgcc_dist.data.splits import make_split, write_split
from mgcc_dist.segment import run
from mgcc_dist.train import run_folder
from tests.data.http_folder import serving

INPUTS = ("split.json", "data/index.json", "other/index.json")


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom_shards):
    return write_data(tmp_path_factory.mktemp("segment"), phantom_shards)


def test_finished_run_with_a_constant_learning_rate_is_extended(data, tmp_path, caplog, monkeypatch):
    """It ends in the weights of a run of that length; a kill while it is reopened loses nothing."""
    run(configured(data, *steps(4, tmp_path / "long"), preset="unet_demo"))
    short, longer = (configured(data, *steps(count, tmp_path / "run"), preset="unet_demo") for count in (2, 4))
    run(short)
    before = (tmp_path / "run" / "result.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "write_text", raise_(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(longer)
    with caplog.at_level("INFO"):
        run(longer)
        assert "from step 2 of 4" in caplog.text
        caplog.clear()
        run(longer)
        assert "nothing to do" in caplog.text
    assert (tmp_path / "run" / "result-2.json").read_bytes() == before
    result, expected = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("run", "long"))
    assert result["last"] == expected["last"]
    found, wanted = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("run", "long"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with pytest.raises(UserError, match=r"holds a run with loop\.steps = 4, not 2\. Choose another --out\.$"):
        run(short)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loop.schedule", "poly"], r"because loop\.schedule poly depends on the length of the run\. To start a new"),
        (
            ["--method.name", "mean_teacher", "--method.ramp", "compressed", "--method.teacher_start", "0"],
            r"because method\.ramp compressed depends",
        ),
        (["--method.name", "uamt"], r"because method uamt depends on the length"),
        ([], r"because it has no checkpoint any more\. .* choose another --out and pass --init .*/last\.$"),
    ],
)
def test_run_whose_steps_depend_on_its_length_is_not_extended(data, tmp_path, words, message):
    """What it trained so far would be neither the start of a longer run nor a run of its own."""
    preset = "mgcc_demo" if "--method.name" in words else "unet_demo"
    run(configured(data, *steps(1, tmp_path, *words), preset=preset))
    if "checkpoint" in message:
        shutil.rmtree(tmp_path / "checkpoints")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=rf"holds a run with loop\.steps = 1, and can't be extended to 2, {message}"):
        run(configured(data, *steps(2, tmp_path, *words), preset=preset))
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def raise_(kind):
    def fail(*_, **__):
        raise kind

    return fail


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("changed", INPUTS)
def test_run_whose_split_or_data_changed_is_refused(data, tmp_path, phantom_shards, finished, changed):
    """Without this, images of the validation set become training images when a run is resumed."""
    shutil.copytree(phantom_shards.folder, tmp_path / "data")
    (tmp_path / "other").mkdir()
    write_index(tmp_path / "other", "other", [write_shard(tmp_path / "other" / "s.tar", [phantom_shards[0]])])
    split = make_split(phantom_shards.records, seed=0, validation=8, labeled=8, grouped=False, name="s_1")
    write_split(tmp_path / "split.json", split)
    paths = ["--data.shards", tmp_path / "data", "--data.split", tmp_path / "split.json"]
    paths += ["--data.external", json.dumps([str(tmp_path / "other")])]
    out = tmp_path / "run"
    config = configured(data, *paths, "--loop.epochs", "null", "--loop.steps", "1", "--out", out)
    run(config)
    inputs = json.loads((out / "result.json").read_text())["inputs"]
    assert inputs == {str(tmp_path / name): sha256_of(tmp_path / name) for name in INPUTS}
    if not finished:
        (out / "result.json").unlink()  # resume from the checkpoint
    run(config)

    swapped = replace(split, labeled=split.validation, validation=split.labeled)
    if changed == "split.json":
        write_split(tmp_path / changed, swapped)
    else:
        index = json.loads((tmp_path / changed).read_text())
        write_json(tmp_path / changed, index | {"note": "another version"})
    if not finished:
        (out / "result.json").unlink()
    with pytest.raises(UserError, match=rf"{changed}: changed since the run in .*/run started \(sha256 .* then, "):
        run(config)


def test_run_reads_shards_at_a_url_and_is_the_same_run_on_local_ones(data, tmp_path, phantom_shards, caplog):
    shutil.copytree(phantom_shards.folder, tmp_path / "data")
    words = [*UNET, "--out", tmp_path / "run"]
    fetch_index.cache_clear()
    with serving(tmp_path / "data") as server:
        remote = [*words, "--data.shards", server.url, "--data.cache", tmp_path / "node", "--loop.seed", 7]
        run(configured(data, *remote, preset="unet_demo"))
        inputs = json.loads((tmp_path / "run" / "result.json").read_text())["inputs"]
        assert inputs[f"{server.url}/index.json"] == sha256_of(tmp_path / "data" / "index.json")
        with caplog.at_level("INFO"):
            run(configured(data, *words, "--loop.seed", 7, preset="unet_demo"))  # the same data here
        assert "nothing to do" in caplog.text
        write_json(tmp_path / "data" / "index.json", phantom_shards.index | {"note": "another version"})
        fetch_index.cache_clear()
        (tmp_path / "run" / "result.json").unlink()
        with pytest.raises(UserError, match=rf"^{server.url}/index\.json: changed since the run in "):
            run(configured(data, *remote, preset="unet_demo"))
    assert len(list((tmp_path / "node").rglob("*.tar"))) == len(list(phantom_shards.folder.glob("*.tar")))
