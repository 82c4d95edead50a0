"""`mgcc_dist.ldm` from the command line, at a toy size, on two ranks."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import toy_ldm
from diffusers import DiffusionPipeline
from PIL import Image

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.errors import UserError
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import read_split
from mgcc_dist.diffusion import autoencoder
from mgcc_dist.diffusion.latents import LatentFolder
from mgcc_dist.ldm import LdmConfig, run


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("ldm") / "toy.yaml"
    path.write_text(toy_ldm.config(steps=3, checkpoint_every=100, samples=9))
    return path


@pytest.fixture(scope="module")
def finished(toy) -> tuple[Path, str]:
    """Output folder and stderr of a run on two ranks."""
    out = toy.parent / "two"
    return out, ranks.finish_log(ranks.forked(2), ["-m", "mgcc_dist.ldm", "--config", toy, "--out", out])


@pytest.mark.e2e
@pytest.mark.multiprocess
def test_two_ranks_run_every_stage_once(finished):
    out, printed = finished
    assert "ldm: world size 2" in printed
    assert printed.count("ldm: world size") == 1
    for stage in ("autoencoder", "denoiser"):
        result = json.loads((out / stage / "result.json").read_text())
        assert (result["stage"], result["steps"], result["world_size"]) == (stage, 3, 2)
    samples = ShardFolder.open(out / "samples")
    assert [samples[i].meta["index"] for i in range(len(samples))] == list(range(9))
    images = DiffusionPipeline.from_pretrained(out / "pipeline")(batch_size=1, num_inference_steps=2).images
    assert images[0].size == (16, 16)
    assert np.ptp(np.asarray(Image.open(out / "gallery.png"))) > 0
    weights = "diffusion_pytorch_model.safetensors"
    for trained, linked in (
        ("autoencoder/last", f"autoencoder/vae/{weights}"),
        ("autoencoder/last", f"pipeline/vqvae/{weights}"),
        ("denoiser/last", f"pipeline/unet/{weights}"),
    ):
        assert (out / trained / "model.safetensors").samefile(out / linked), linked


def modification_times(out: Path) -> dict[Path, int]:
    """Of all files but those that every start writes."""
    written = ("config.yaml", ".lock")
    return {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name not in written}


@pytest.mark.e2e
@pytest.mark.multiprocess
def test_a_finished_run_is_not_repeated(finished, toy):
    out, _ = finished
    before = modification_times(out)
    log = ranks.finish_log(ranks.forked(2), ["-m", "mgcc_dist.ldm", "--config", toy, "--out", out])
    assert "world size 2" in log
    assert log.count("already exists") == 8
    assert modification_times(out) == before


@pytest.mark.e2e
@pytest.mark.multiprocess
def test_a_finished_run_in_a_read_only_folder_already_exists(finished, toy, small_disk, caplog):
    small_disk.resize("8m")
    out = shutil.copytree(finished[0], small_disk.folder / "out")
    small_disk.make_read_only()
    with caplog.at_level("INFO"):
        run_here(["--config", str(toy), "--out", str(out)])
    assert caplog.text.count("already exists") == 8
    with pytest.raises(UserError, match=r"out: can't be written \(Read-only file system\)\. Choose another --out\."):
        run_here(["--config", str(toy), "--out", str(out), "--sampling.count", "10"])


@pytest.mark.e2e
def test_an_output_folder_of_0_1_is_resumed(tmp_path, caplog):
    """ldm_of_0_1.tar.xz holds one that version 0.1.0 wrote, without checkpoints and pictures, and its config."""
    shutil.unpack_archive(Path(__file__).parents[1] / "ldm_of_0_1.tar.xz", tmp_path, filter="data")
    out = tmp_path / "ldm"
    kept = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    kept |= {path: path.stat().st_mtime_ns for path in (out / "samples").iterdir()}
    words = ["--config", str(tmp_path / "toy.yaml"), "--out", str(out), "--until", "samples"]
    run_here(words)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert len(LatentFolder.open(out / "latents" / "train")) == 17
    with caplog.at_level("INFO"):
        run_here(words)
    assert caplog.text.count("already exists") == 5
    with pytest.raises(UserError, match="holds images made with seed 0, not 1"):
        run_here([*words, "--sampling.seed", "1"])


@pytest.mark.e2e
@pytest.mark.multiprocess
def test_only_missing_results_are_recomputed(finished, toy, caplog):
    """Some files of the later stages are deleted: one rank recomputes them, byte for byte like two ranks."""
    out, _ = finished
    deleted = [out / "samples" / "index.json", out / "samples" / "synthetic-000002.tar", out / "gallery.png"]
    deleted += [out / "audit" / "audit.json", out / "audit" / "closest.png"]
    deleted += [out / "quality" / "quality.json", out / "quality" / "quality.md"]
    deleted += [path for path in (out / "latents").rglob("*.*") if path.name != "request.json"]
    before = {path: path.read_bytes() for path in deleted}
    for path in deleted:
        path.unlink()
    torch.set_num_threads(1)  # like each of the two ranks
    with caplog.at_level("INFO"):
        run_here(["--config", str(toy), "--out", str(out)])
    assert caplog.text.count("already exists") == 3
    assert {path: path.read_bytes() for path in deleted} == before


@pytest.mark.e2e
@pytest.mark.multiprocess
def test_curate_and_apply(finished, tmp_path):
    out, _ = finished

    def ldm(*words):
        return ranks.run(ranks.forked(1), ["-m", "mgcc_dist.ldm", *words])

    done = ldm("curate", "--out", out, "--count", 3)
    assert done.returncode == 0, done.stderr
    proposal = json.loads((out / "curation" / "proposal.json").read_text())
    assert f"curate: {len(proposal['proposed'])} of 9 samples proposed" in done.stdout
    chosen = {"samples": proposal["samples"], "accepted": ["synthetic-000007"], "rejected": []}
    selection = tmp_path / "selection.json"
    selection.write_text(json.dumps({"format": "mgcc-dist selection", "version": 1, **chosen}))
    words = ("apply", "--selection", selection, "--samples", out / "samples", "--out", tmp_path / "curated")
    done = ldm(*words)
    assert done.returncode == 0, done.stderr
    assert ShardFolder.open(tmp_path / "curated").keys() == ["synthetic-000007"]
    assert ldm(*words).stderr.startswith("ldm: ")  # the folder exists: a one-line error


@pytest.mark.e2e
@pytest.mark.multiprocess
def test_results_state_the_sizes_of_train_and_val(finished):
    out, _ = finished
    split = read_split(out / "split.json")
    assert (len(split.labeled + split.unlabeled), len(split.validation)) == (28, 12)
    for stage in ("autoencoder", "denoiser"):
        counts = json.loads((out / stage / "result.json").read_text())["images"]
        assert counts == {"train": 28, "val": 12}


@pytest.mark.e2e
@pytest.mark.multiprocess
def test_too_few_samples_are_refused_only_if_quality_is_evaluated(finished, toy):
    out, _ = finished
    words = ["--config", str(toy), "--out", str(out), "--sampling.count", "2", "--sampling.name", "few"]
    run_here([*words, "--until", "denoiser"])
    with pytest.raises(UserError, match=r"quality\.neighbours: .* 12 validation and 2 synthetic images"):
        run_here(words)


@pytest.mark.e2e
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--sampling.seed 1", "holds images made with seed 0, not 1"),
        ("--denoiser.batch 3", r"holds a run with denoiser\.batch = 2, not 3"),
        ("--autoencoder.loop.seed 1", r"holds a run with autoencoder\.loop\.seed = 0, not 1"),
        ("--data.phantom 41", "holds a run with data.phantom = 40, not 41"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(finished, toy, words, message):
    out, _ = finished
    config = (out / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=message):
        run_here(["--config", str(toy), "--out", str(out), *words.split()])
    assert (out / "config.yaml").read_bytes() == config  # it says what the folder holds


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--preset busi_small",
            r"data\.shards: no shard folder given\. For BUSI, run `mgcc shards busi",
        ),
        ("--preset demo --data.phantom 40 --data.image_size 18", r"data\.image_size: 18 is not a multiple of 8\."),
        (
            "--preset busi --data.image_size 224",
            r"224 is not a multiple of 64\. The autoencoder divides the size by 8 and the denoiser by 8:",
        ),
        (
            "--preset demo --sampling.steps 1001",
            r"sampling\.steps: 1001 is more than denoiser\.diffusion_steps \(1000\)",
        ),
        (
            "--preset demo --sampling.guidance 3",
            r"sampling\.guidance: 3 needs a denoiser with classes or masks\. Set denoiser",
        ),
        (
            "--preset demo --denoiser.objective flow --sampling.sampler ddim",
            r"sampling\.sampler: ddim can't sample a flow\. Choose euler or dpm_solver\+\+\.",
        ),
        ("--preset demo --denoiser dit --denoiser.patch 5", r"64 is not a multiple of 20\. .* `patch` divides it"),
        ("--preset demo --denoiser.attention [true]", r"denoiser\.attention: has 1 levels but denoiser\.channels has"),
        ("--preset demo --autoencoder.norm_groups 24", r"autoencoder\.channels: .* not a multiple of"),
        ("--preset demo --data.shards nowhere", "nowhere: does not exist"),
        ("--preset demo --data.image_size 8", "image size: 8 is too small for a phantom"),
        ("--preset demo --denoiser.beta_start 0.5", r"beta_end: expected at least .* \(0\.5\) and below 1, got 0\.012"),
        ("--preset demo --denoiser.beta_end 2", r"denoiser\.beta_end: expected .* below 1, got 2"),
        (
            "--preset demo --autoencoder.losses.adversarial.weight 1 --autoencoder.losses.adversarial.layers 5",
            r"adversarial\.layers: 5 need images of at least 96 pixels per side, but data\.image_size is 64",
        ),
    ],
)
def test_errors_name_the_wrong_setting(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        run_here([*words.split(), "--out", str(tmp_path)])


@pytest.mark.parametrize("preset", ["demo", "busi_small", "busi"])
def test_preset_is_a_valid_config(preset):
    config = configuration(["--preset", preset])
    autoencoder.build(config.autoencoder, config.data.image_size)
    assert config.denoiser.diffusion_steps == 1000
    assert config.sampling.steps == {"ddim": 100, "dpm_solver++": 25}[config.sampling.sampler]


def test_busi_preset_has_the_papers_settings():
    """Section IV-B.1."""
    config = configuration(["--preset", "busi"])
    assert config.data.image_size // config.autoencoder.downsampling == 64
    assert (config.data.image_size, config.autoencoder.batch, config.sampling.count) == (512, 4, 725)
    assert (config.sampling.sampler, config.sampling.steps) == ("ddim", 100)
    first, second = config.autoencoder.loop, config.denoiser.loop
    assert (first.optimizer.name, first.learning_rate, first.epochs) == ("adam", 1e-6, 1000)
    assert (second.optimizer.name, second.learning_rate, second.epochs) == ("adamw", 1e-4, 1000)


def configuration(words: list[str]) -> LdmConfig:
    return parse(LdmConfig, words, CONFIGS / "ldm", "demo")


def run_here(words: list[str]) -> None:
    run(configuration(words))
