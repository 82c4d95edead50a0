"""`mgcc segment`: the images of each setting, the files a run writes, the settings it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from segment_runs import UNET, configured, write_data

import mgcc_dist as mgcc
from mgcc_dist.common.errors import UserError
from mgcc_dist.common.files import sha256_of, write_json
from mgcc_dist.data.records import ShardFolder, write_index, write_shard
from mgcc_dist.data.selection import FORMAT, apply_selection
from mgcc_dist.data.splits import read_split
from mgcc_dist.evaluation.metrics import score_image
from mgcc_dist.inference.loading import load_predictor
from mgcc_dist.reporting.runs import find_runs, group_runs
from mgcc_dist.segment import run
from mgcc_dist.segmentation.task import SegmentationTask


@pytest.fixture(scope="module")
def data(tmp_path_factory, phantom_shards):
    return write_data(tmp_path_factory.mktemp("segment"), phantom_shards)


def counts_of(config):
    data = ShardFolder.open(Path(config.data.shards))
    return SegmentationTask(config, data, read_split(Path(config.data.split)), Accelerator(cpu=True)).counts


def test_each_setting_of_the_paper_uses_its_images(data):
    synthetic = ["--data.synthetic", data[1]]
    similar = ["--data.similar", json.dumps([str(data[1])])]
    plain = {"labeled": 8, "validation": 8, "training": 8}
    assert counts_of(configured(data)) == {**plain, "unlabeled": 8}  # Table I
    assert counts_of(configured(data, *similar)) == {**plain, "unlabeled": 13, "similar": 5}  # Table II
    assert counts_of(configured(data, *synthetic)) == {**plain, "unlabeled": 13, "synthetic": 5}  # Table III
    everything = configured(data, *synthetic, "--data.labels", "all")  # Table IV
    assert counts_of(everything) == {"labeled": 16, "unlabeled": 5, "synthetic": 5, "validation": 8}
    supervised = configured(data, "--data.labels", "all", preset="unet_demo")  # Table I, U-Net
    assert counts_of(supervised) == {"labeled": 16, "unlabeled": 0, "validation": 8}


def copied(folder, samples, dataset="synthetic", **extra):
    folder.mkdir()
    write_index(folder, dataset, [write_shard(folder / "s.tar", samples)], **extra)
    return folder


@pytest.mark.parametrize(
    ("method", "network", "message"),
    [
        ("mgcc", "mgcc", r"^network\.name: mgcc has BatchNorm, and DeepSpeed would give it bf16 weights"),
        (
            "mean_teacher",
            "unet",
            r"^method\.name: mean_teacher averages .* DeepSpeed keeps in bf16, too coarse for an average",
        ),
    ],
)
def test_what_the_bf16_of_deepspeed_cannot_train_is_refused(data, monkeypatch, method, network, message):
    """BatchNorm was a stack trace in the first step; the average of a teacher in bf16 stands still."""
    monkeypatch.setattr("mgcc_dist.segmentation.task.deepspeed_precision", lambda accelerator: "bf16")
    with pytest.raises(UserError, match=message):
        counts_of(configured(data, "--method.name", method, "--network.name", network))


def test_run_trains_on_synthetic_images_with_masks(data, tmp_path, phantom_shards):
    folder = copied(tmp_path / "pairs", list(phantom_shards))
    words = ["--loop.epochs", "null", "--loop.steps", "2", "--out", tmp_path / "run"]
    pairs = ["--data.synthetic_labeled", folder, "--data.batch_synthetic", "3"]
    run(configured(data, *words, *pairs))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    images = {"labeled": 8, "validation": 8, "training": 8, "unlabeled": 8, "synthetic_labeled": 24}
    assert result["images"] == images
    assert result["synthetic_labeled"]["images"] == 24
    assert str(folder / "index.json") in result["inputs"]
    with pytest.raises(UserError, match=r"a run with data\.batch_synthetic = 3, not 4"):
        run(configured(data, *words))
    with pytest.raises(UserError, match=r"data\.synthetic_labeled: 5 of 5 records of .* have no mask"):
        counts_of(configured(data, "--data.synthetic_labeled", data[1]))


@pytest.mark.parametrize(
    ("preset", "words", "message"),
    [
        ("mgcc_demo", ["--data.labels", "all"], r"method\.name: mgcc needs unlabeled images and there are none\. Set"),
        ("mgcc_demo", ["--data.batch_unlabeled", "0"], r"data\.batch_unlabeled: method mgcc needs unlabeled images"),
        ("mgcc_demo", ["--data.synthetic", "nowhere"], r"data\.synthetic: nowhere does not .* --data\.synthetic null"),
        ("unet_demo", ["--data.batch_unlabeled", "4"], r"method supervised uses no unlabeled images\. Set it to 0"),
    ],
)
def test_batch_that_does_not_fit_the_method_is_refused(data, preset, words, message):
    with pytest.raises(UserError, match=message):
        counts_of(configured(data, *words, preset=preset))


@pytest.mark.parametrize("batch", [(1, 0), (4, 1)])
def test_batch_of_one_image_of_one_pixel_is_refused(data, batch):
    preset = "mgcc_demo" if batch[1] else "unet_demo"
    words = ["--data.batch_labeled", batch[0], "--data.batch_unlabeled", batch[1], "--data.image_size"]
    with pytest.raises(UserError, match=r"batch_.*: BatchNorm can't train on one image of one pixel, .*2 levels leave"):
        counts_of(configured(data, *words, 2, preset=preset))
    assert counts_of(configured(data, *words, 4, preset=preset))["labeled"] == 8


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network.widths", "[4,8,8]", "--data.image_size", 34], r"34 is not a multiple of 4, .* Set it to 32 or 36"),
        (["--network.widths", "[4,8,8]", "--data.image_size", 2], r"2 is not a multiple of 4, .* Set it to 4, or"),
        (
            [
                "--method.name",
                "ctbct",
                "--network.name",
                "unet",
                "--data.image_size",
                32,
                "--method.swin_unet.window",
                3,
            ],
            r"32 is not a multiple of 96, which method ctbct with network unet needs",
        ),
    ],
)
def test_image_size_that_the_levels_cannot_divide_is_refused_before_work_starts(data, words, message):
    with pytest.raises(UserError, match=rf"data\.image_size: {message}"):
        configured(data, *words)


def test_mean_teacher_whose_consistency_loss_would_stay_off_is_refused(data):
    words = ["--method.name", "mean_teacher", "--loop.epochs", "null", "--loop.steps", "40", "--method.teacher_start"]
    preset = ["--network.name", "unet"]
    message = r"teacher_start: the run has 40 iterations.* starts at iteration 40, .* Set it to 2, or"
    with pytest.raises(UserError, match=message):
        counts_of(configured(data, *preset, *words, 40))
    assert counts_of(configured(data, *preset, *words, 39))["labeled"] == 8


def test_external_data_set_is_scored_but_not_trained_on(data, tmp_path, phantom_shards):
    other = tmp_path / "other"
    other.mkdir()
    samples = [phantom_shards[i] for i in range(3)]
    write_index(other, "elsewhere", [write_shard(other / "s.tar", samples)])
    words = ["--loop.epochs", "null", "--loop.steps", "1", "--data.external", json.dumps([str(other)])]
    config = configured(data, *words, "--out", tmp_path / "run")
    assert counts_of(config)["labeled"] == 8
    run(config)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    for weights in ("best", "last"):
        assert result[weights]["external"]["elsewhere"]["summary"]["images"] == 3
    scored = result["best"]["external"]["elsewhere"]["images"]
    assert sorted(image["key"] for image in scored) == sorted(sample.key for sample in samples)


@pytest.mark.parametrize("fit", ["letterbox", "crop"])
def test_scores_of_a_run_are_those_of_its_predictions(data, tmp_path, phantom_shards, fit):
    """The network, the fit of its weights header and the masks at their own size belong together."""
    wide = tmp_path / "wide"
    wide.mkdir()
    samples = [
        replace(
            sample, image=sample.image[4:29], mask=sample.mask[4:29], meta=sample.meta | {"original_size": [32, 25]}
        )
        for sample in (phantom_shards[i] for i in range(3))
    ]
    write_index(wide, "wide", [write_shard(wide / "s.tar", samples)])
    words = ["--data.fit", fit, "--data.augment", "ultrasound", "--data.external", json.dumps([str(wide)])]
    run(configured(data, *UNET, *words, "--out", tmp_path / "run", preset="unet_demo"))
    scored = json.loads((tmp_path / "run" / "result.json").read_text())["best"]["external"]["wide"]["images"]
    predictor = mgcc.load(tmp_path / "run", device="cpu", precision="no", kernels="torch")
    assert predictor.fit == fit
    for image in scored:
        sample = next(sample for sample in samples if sample.key == image["key"])
        expected = score_image(predictor.predict(sample.image).mask, sample.mask > 0, surface=False)
        assert image["paper"] == pytest.approx(expected["paper"], abs=1e-6)


def test_run_on_curated_samples_records_their_selection(data, tmp_path):
    request = {"checkpoint": "abc", "seed": 0}
    samples = ShardFolder.open(data[1])
    write_index(data[1], "synthetic", samples.index["shards"], request=request)
    chosen = {"accepted": ["synthetic-1", "synthetic-4"], "rejected": ["synthetic-0"], "samples": request}
    write_json(tmp_path / "selection.json", {"format": FORMAT, "version": 1, **chosen})
    apply_selection(tmp_path / "selection.json", data[1], tmp_path / "curated")
    words = ["--data.synthetic", tmp_path / "curated", "--loop.epochs", "null", "--loop.steps", "1"]
    run(configured(data, *words, "--out", tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["images"]["unlabeled"], result["images"]["synthetic"]) == (10, 2)
    assert (result["synthetic"]["images"], result["synthetic"]["request"]) == (2, request)
    sha256 = sha256_of(tmp_path / "selection.json")
    assert result["synthetic"]["selection"] == {"sha256": sha256, "accepted": 2, "of": 5}


@pytest.mark.parametrize("key", ["synthetic", "synthetic_labeled", "similar", "external"])
def test_the_images_of_the_run_are_refused_as_another_data_set(data, phantom_shards, key):
    """Else training would see the validation images, with their masks."""
    folder = str(phantom_shards.folder)
    value = json.dumps([folder]) if key in ("similar", "external") else folder
    with pytest.raises(UserError, match=rf"data\.{key}: .* holds the same images as data\.shards"):
        counts_of(configured(data, f"--data.{key}", value))


def test_synthetic_images_are_not_taken_for_real_ones(data, tmp_path, phantom_shards, caplog):
    folder = copied(tmp_path / "pairs", list(phantom_shards), request={"count": 24})
    with pytest.raises(UserError, match=r"data\.external: .* holds samples of `mgcc ldm`, .* Pass real images"):
        counts_of(configured(data, "--data.external", json.dumps([str(folder)])))
    counts_of(configured(data, "--data.shards", folder))
    assert "holds samples of `mgcc ldm`, so validation does not see real images" in caplog.text


def test_external_data_sets_of_one_name_are_refused(data, tmp_path, phantom_shards):
    folder = copied(tmp_path / "other", [phantom_shards[0]], "phantom")
    with pytest.raises(
        UserError, match=r"data\.external: 2 shard folders are called 'phantom', and results are by name"
    ):
        counts_of(configured(data, "--data.external", json.dumps([str(folder)] * 2)))


def test_external_data_set_without_masks_is_refused(data):
    with pytest.raises(UserError, match=r"data\.external: 5 records of .* have no mask, the first is 'synthetic-0'"):
        counts_of(configured(data, "--data.external", json.dumps([str(data[1])])))


def test_missing_shards_are_named_before_the_split_that_is_made_from_them(data, tmp_path):
    with pytest.raises(UserError, match=r"^nowhere: does not exist\. .*`mgcc shards phantom`, .*`make demo`"):
        run(configured(data, "--data.shards", "nowhere", "--data.split", "none.json", "--out", tmp_path))


def test_run_writes_a_result_and_loadable_networks(data, tmp_path, caplog):
    steps = ["--loop.epochs", "null", "--loop.steps", "3", "--out", tmp_path]
    config = configured(data, *steps)
    run(config)
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["method"], result["dataset"], result["split"], result["steps"]) == ("mgcc", "phantom", "s_1", 3)
    assert len(result["best"]["images"]) == result["best"]["summary"]["images"] == 8
    assert {"key", "class", "paper", "corrected", "lesion", "hd95", "asd"} <= result["best"]["images"][0].keys()
    assert result["last"].keys() == {"step", "epoch", "summary"}
    network, size = load_predictor(tmp_path, "last")
    assert size == 32
    assert sum(parameter.numel() for parameter in network.parameters()) == result["parameters"]["inference"]
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 32, 32)).shape == (1, 1, 32, 32)
    for weights in ("best", "last"):
        assert np.ptp(np.asarray(Image.open(tmp_path / weights / "gallery.png"))) > 0
    with caplog.at_level("INFO"):
        caplog.clear()
        run(config)
    assert "nothing to do" in caplog.text
    with pytest.raises(UserError, match=r"holds a run with loop\.seed = 0, not 1"):
        run(configured(data, *steps, "--loop.seed", "1"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A finished run of a U-Net."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    run(configured(data, *UNET, "--loop.seed", 7, "--out", folder, preset="unet_demo"))
    return folder


def test_finished_run_needs_no_writable_folder(data, trained, tmp_path, caplog):
    folder = shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns(".lock"))
    (folder / ".lock").mkdir()  # which root can't open either
    with caplog.at_level("INFO"):
        run(configured(data, *UNET, "--loop.seed", 7, "--out", folder, preset="unet_demo"))
    assert "result.json already exists; nothing to do" in caplog.text


@pytest.mark.parametrize("method", ["mean_teacher", "uamt", "bcp", "cps", "supervised"])
def test_run_starts_from_the_weights_of_another_run(data, trained, tmp_path, method):
    """With a teacher too: one that starts from random weights would undo them."""
    preset = "unet_demo" if method == "supervised" else "mgcc_demo"
    words = [*UNET, "--method.name", method, "--out", tmp_path, "--init", trained / "last"]
    words += ["--method.teacher_start", 0] if method == "mean_teacher" else []
    config = configured(data, *words, preset=preset)
    folder = ShardFolder.open(Path(config.data.shards))
    task = SegmentationTask(config, folder, read_split(Path(config.data.split)), Accelerator(cpu=True))
    expected = load_file(trained / "last" / "model.safetensors")
    networks = [task.module.predictor(), getattr(task.module, "teacher", None)]
    for network in filter(None, networks):
        state = network.state_dict()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)
    if method == "cps":  # two equal networks would agree from the start
        assert not torch.equal(task.module.second.decoder.head.weight, task.module.first.decoder.head.weight)


def test_initial_weights_are_named_in_the_result_and_the_report(data, trained, tmp_path):
    weights = tmp_path / "copy.safetensors"
    shutil.copy(trained / "best" / "model.safetensors", weights)
    config = configured(data, *UNET, "--init", weights, "--out", tmp_path / "run", preset="unet_demo")
    run(config)
    sha256 = sha256_of(trained / "best" / "model.safetensors")
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["init"] == {"weights": str(weights), "sha256": sha256}
    assert json.loads((trained / "result.json").read_text())["init"] is None
    [group] = group_runs(find_runs([tmp_path / "run"]).segmentation)
    assert group.method == f"supervised (from {sha256[:8]})"

    weights.unlink()  # a checkpoint holds all that is needed
    (tmp_path / "run" / "result.json").unlink()
    run(config)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["init"] == result["init"]
    shutil.copy(trained / "last" / "gallery.png", weights)
    with pytest.raises(UserError, match=r"copy\.safetensors: changed since the run in"):
        run(config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network.name", "cmunet"], r"network\.name is unet there and cmunet here"),
        (["--network.widths", "[4,8,8]"], r"network\.widths is \[4, 8\] there and \[4, 8, 8\] here\. Use"),
        (["--init", "nowhere"], r"nowhere: does not exist\. Name the folder of a run"),
        (["--init", "README.md"], r"README\.md: does not hold a segmentation network"),
    ],
)
def test_initial_weights_of_another_network_are_refused_before_work_starts(data, trained, tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run(configured(data, *UNET, "--init", trained, "--out", tmp_path, *words, preset="unet_demo"))
    assert not (tmp_path / "metrics.jsonl").exists()
