"""The generative program: learn a set of ultrasound images, then make new ones of the same kind.

    accelerate launch -m mgcc_dist.ldm                                          # demo: phantom images, minutes on a CPU
    accelerate launch -m mgcc_dist.ldm --preset busi --data.shards out/busi     # the paper's settings
    python -m mgcc_dist.ldm curate --out out/ldm                                # a page on which to choose samples
    python -m mgcc_dist.ldm apply --selection selection.json --samples out/ldm/samples --out out/ldm/curated

It runs what is missing in OUT of eight stages: `autoencoder/` (a run folder), `latents/` (the images, encoded once),
`denoiser/` (a run folder), `pipeline/` (for plain diffusers), `samples/` (a shard folder, which `mgcc_dist.segment`
reads by `--data.synthetic`), `quality/` (how like the held-out images they are), `audit/` (which samples are copies of
training images) and `gallery.png`. The same command again goes on where it was stopped.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL

from mgcc_dist.assessment import audit, curate, features, gallery, quality
from mgcc_dist.assessment.config import ApplyConfig, AuditConfig, CurateConfig, QualityConfig
from mgcc_dist.common.config import CONFIGS, load, parse, save
from mgcc_dist.common.distributed import describe, start
from mgcc_dist.common.errors import UserError, run_program
from mgcc_dist.common.files import sha256_of
from mgcc_dist.data import selection
from mgcc_dist.data.convert import write_shards
from mgcc_dist.data.datasets import Phantoms
from mgcc_dist.data.records import ShardFolder
from mgcc_dist.data.splits import locate_split, make_split, read_split, write_split
from mgcc_dist.diffusion import autoencoder, denoiser, latents, pipeline, sampling
from mgcc_dist.diffusion.autoencoder import AutoencoderTask
from mgcc_dist.diffusion.config import AutoencoderConfig, DataConfig, DenoiserConfig, SamplingConfig
from mgcc_dist.diffusion.denoiser import DenoiserTask
from mgcc_dist.diffusion.images import Images
from mgcc_dist.diffusion.latents import Latents
from mgcc_dist.train.loop import Task, TrainState, fit
from mgcc_dist.train.metrics_logger import read_rows
from mgcc_dist.train.run_folder import is_finished, open_run_folder, write_result
from mgcc_dist.train.weights import count_parameters


@dataclass(frozen=True)
class LdmConfig:
    data: DataConfig
    autoencoder: AutoencoderConfig
    denoiser: DenoiserConfig
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    audit: AuditConfig = field(default_factory=AuditConfig)
    out: str = "out/ldm"
    """folder of everything that is made"""
    until: Literal["autoencoder", "denoiser", "samples", "gallery"] = "gallery"
    """stop after this stage; a cluster runs them as jobs of their own (quality, audit and gallery go together)"""

    def __post_init__(self) -> None:
        if self.autoencoder.loop.precision != self.denoiser.loop.precision:
            raise ValueError("autoencoder.loop.precision and denoiser.loop.precision must be the same")


@dataclass(frozen=True)
class AutoencoderRun:
    """What `autoencoder/` depends on."""

    data: DataConfig
    autoencoder: AutoencoderConfig


@dataclass(frozen=True)
class DenoiserRun:
    """What `denoiser/` depends on."""

    data: DataConfig
    denoiser: DenoiserConfig
    autoencoder_sha256: str


def main() -> None:
    command, words = sys.argv[1:2], sys.argv[2:]
    if command == ["curate"]:
        curate_samples(parse(CurateConfig, "ldm curate", "Propose samples and write a page to choose on.", argv=words))
    elif command == ["apply"]:
        apply_selection(parse(ApplyConfig, "ldm apply", "Write the samples that a person chose.", argv=words))
    else:
        text = "Learn a set of images and make new ones of its kind. `ldm curate` and `ldm apply` choose among these."
        run(parse(LdmConfig, "ldm", text, CONFIGS / "ldm", "demo"))


def run(config: LdmConfig) -> None:
    """All stages, each of which returns at once where its result is there already."""
    out = Path(config.out)
    accelerator = start(config.autoencoder.loop.precision)
    accelerator.print(f"ldm: {describe(accelerator)}")
    if accelerator.is_main_process:
        save(config, out / "config.yaml")

    images = open_images(config.data, out, accelerator)
    if config.until == "gallery":
        quality.check(config.quality, images, config.sampling.count)
    train_autoencoder(config, images, out)
    if config.until == "autoencoder":
        return
    encoded = encode_images(config, images, out, accelerator)
    train_denoiser(config, images, encoded, out)
    if config.until == "denoiser":
        return
    save_pipeline(config, encoded, out, accelerator)
    draw_samples(config, out, accelerator)
    if config.until == "samples":
        return
    measure_quality(config, images, out, accelerator)
    audit_samples(config, images, out, accelerator)
    draw_gallery(images, out, accelerator)


def open_images(config: DataConfig, out: Path, accelerator: Accelerator) -> Images:
    """The images to learn; makes phantom images and split when none are given."""
    if not config.shards and not config.phantom:
        raise UserError(
            "data.shards is not given; BUSI's are made by "
            "`python -m mgcc_dist.shards busi --root Dataset_BUSI_with_GT --out out/busi`, then --data.shards out/busi"
        )
    folder = Path(config.shards) if config.shards else out / "phantom"
    if accelerator.is_main_process and not config.shards:
        write_shards(Phantoms(config.phantom, seed=0, size=config.image_size), folder)
    accelerator.wait_for_everyone()
    data = ShardFolder.open(folder, verify=accelerator.is_local_main_process)

    path = locate_split(config.split) if config.split else out / "split.json"
    if accelerator.is_main_process and not config.split and not path.is_file():
        held_out = round(0.3 * len(data))
        labeled = (len(data) - held_out) // 2
        split = make_split(data.records, seed=0, validation=held_out, labeled=labeled, grouped=True, name="split")
        write_split(path, split)
    accelerator.wait_for_everyone()
    return Images(config, data, read_split(path))


def train_autoencoder(config: LdmConfig, images: Images, out: Path) -> None:
    """Leaves `autoencoder/vae/`, whose latents are standardised, in its run folder."""
    folder, loop = out / "autoencoder", config.autoencoder.loop
    accelerator = start(loop.precision, loop.accumulation)
    open_run_folder(folder, AutoencoderRun(config.data, config.autoencoder), accelerator)
    if is_finished(folder):
        accelerator.print(f"autoencoder: {folder / 'result.json'} is there already")
        return
    set_seed(loop.seed)
    task = AutoencoderTask(config.autoencoder, images, accelerator)
    state = fit(task, loop, folder, accelerator)

    vae = autoencoder.load(config.autoencoder, images.size, folder / "last").to(accelerator.device)
    once = images.training_once(config.autoencoder.batch, accelerator)
    mean, std = autoencoder.latent_moments(vae, once.batches(), accelerator)
    autoencoder.standardise(vae, mean, std)
    if accelerator.is_main_process:
        vae.save_pretrained(folder / "vae")
    facts = {"latent_mean": mean.tolist(), "latent_std": std.tolist()}
    _write_result(task, facts, state, images, loop.seed, folder, accelerator)


def encode_images(config: LdmConfig, images: Images, out: Path, accelerator: Accelerator) -> Latents:
    """Leaves `latents/`. Needs `autoencoder/vae/`."""
    folder = out / "autoencoder" / "vae"
    vae = autoencoder.load_finished(folder)
    sha256 = sha256_of(folder / autoencoder.WEIGHTS)
    return latents.encode(vae, sha256, images, config.autoencoder.batch, out / "latents", accelerator)


def train_denoiser(config: LdmConfig, images: Images, encoded: Latents, out: Path) -> None:
    """Leaves `denoiser/`, a run folder."""
    folder, loop = out / "denoiser", config.denoiser.loop
    accelerator = start(loop.precision, loop.accumulation)
    open_run_folder(folder, DenoiserRun(config.data, config.denoiser, encoded.autoencoder), accelerator)
    if is_finished(folder):
        accelerator.print(f"denoiser: {folder / 'result.json'} is there already")
        return
    set_seed(loop.seed)
    task = DenoiserTask(config.denoiser, encoded, accelerator)
    state = fit(task, loop, folder, accelerator)
    _write_result(task, {}, state, images, loop.seed, folder, accelerator)


def save_pipeline(config: LdmConfig, encoded: Latents, out: Path, accelerator: Accelerator) -> None:
    """Put both networks into `pipeline/`, in diffusers' layout."""
    folder = out / "pipeline"
    source = {
        "autoencoder": encoded.autoencoder,
        "denoiser": sha256_of(out / "denoiser" / "last" / "model.safetensors"),
    }
    if pipeline.is_made_of(source, folder):
        accelerator.print(f"pipeline: {folder} is there already")
    elif accelerator.is_main_process:
        vae = autoencoder.load_finished(out / "autoencoder" / "vae")
        unet = denoiser.load(config.denoiser, encoded, out / "denoiser" / "last")
        pipeline.save(vae, unet, denoiser.build_schedule(config.denoiser), encoded.classes, source, folder)
        print(f"pipeline: diffusers reads it from {folder}")
    accelerator.wait_for_everyone()


def draw_samples(config: LdmConfig, out: Path, accelerator: Accelerator) -> None:
    """Fill `samples/` with synthetic images."""
    folder = out / "samples"
    if sampling.is_finished(config.sampling, out / "pipeline", folder, accelerator):
        accelerator.print(f"samples: {folder / 'index.json'} is there already")
        return
    sampling.sample(config.sampling, out / "pipeline", folder, accelerator)
    accelerator.print(f"samples: {config.sampling.count} synthetic images -> {folder}")


def measure_quality(config: LdmConfig, images: Images, out: Path, accelerator: Accelerator) -> None:
    """Leave `quality/`, which compares the samples with the held-out images."""
    folder = out / "quality"
    if not config.quality.enabled:
        accelerator.print("quality: not measured, since quality.enabled is false")
        return
    used = features.load(config.quality.encoder, out / "pipeline" / "vqvae", images.size)
    if quality.is_finished(config.quality, used, images, out / "samples", folder):
        accelerator.print(f"quality: {folder / 'quality.json'} is there already")
        return
    report = quality.measure(config.quality, used, images, out / "samples", folder, accelerator)
    accelerator.print(f"{quality.table(report)}quality: -> {folder / 'quality.json'}")


def audit_samples(config: LdmConfig, images: Images, out: Path, accelerator: Accelerator) -> None:
    """Leave `audit/`, which says what samples are copies of training images, and drop those if that is asked for."""
    folder = out / "audit"
    if not config.audit.enabled:
        accelerator.print("audit: not made, since audit.enabled is false")
        return
    encoder = config.quality.encoder
    used = features.load(encoder, out / "pipeline" / "vqvae", images.size) if encoder else None
    if audit.is_finished(config.audit, used, images, out / "samples", folder):
        accelerator.print(f"audit: {folder / 'audit.json'} is there already")
        return
    report = audit.audit(config.audit, used, images, out / "samples", folder, accelerator)
    over = f"similarity over {report['threshold']:.2f}"
    if used:
        over += f" in pixels or {report['features']['threshold']:.2f} in features"
    else:
        accelerator.print("audit: images are compared in pixels alone, since quality.encoder names no trained network")
    what = "dropped" if config.audit.drop_copies else "listed; --audit.drop_copies true takes them out"
    accelerator.print(
        f"audit: {len(report['near_copies'])} of {report['synthetic']['images']} samples are as good as copies "
        f"of a training image ({over}), {what} -> {folder}"
    )


def draw_gallery(images: Images, out: Path, accelerator: Accelerator) -> None:
    """Draw `gallery.png` after the samples that it shows."""
    path, samples = out / "gallery.png", out / "samples"
    if path.is_file() and path.stat().st_mtime >= (samples / "index.json").stat().st_mtime:
        accelerator.print(f"gallery: {path} is there already")
    elif accelerator.is_main_process:
        vae = AutoencoderKL.from_pretrained(out / "pipeline" / "vqvae")
        gallery.draw(images.examples(8), vae, ShardFolder.open(samples), path)
        print(f"gallery: {path}")
    accelerator.wait_for_everyone()


def curate_samples(config: CurateConfig) -> None:
    """Leave `curation/`: a proposal, and the page on which a person makes a selection of it."""
    out = Path(config.out)
    made = load(LdmConfig, out / "config.yaml")
    images = open_images(made.data, out, start())
    used = features.load(made.quality.encoder, out / "pipeline" / "vqvae", images.size)
    proposal = curate.curate(config, used, images, out / "samples", out / "audit" / "audit.json", out / "curation")
    apply = f"apply --selection selection.json --samples {out / 'samples'} --out {out / 'curated'}"
    print(
        f"curate: {len(proposal['proposed'])} of {len(proposal['images'])} samples proposed; "
        f"open {out / 'curation' / 'page.html'} in a browser, save selection.json there, then\n"
        f"    python -m mgcc_dist.ldm {apply}"
    )


def apply_selection(config: ApplyConfig) -> None:
    kept = selection.apply(Path(config.selection), Path(config.samples), Path(config.out))
    print(f"apply: {kept} synthetic images -> {config.out}")


def _write_result(
    task: Task,
    facts: dict[str, Any],
    state: TrainState,
    images: Images,
    seed: int,
    folder: Path,
    accelerator: Accelerator,
) -> None:
    """Mark a training stage as finished."""
    last = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "validation"][-1]
    result = {
        "program": "ldm",
        "stage": task.name,
        **images.facts,
        "seed": seed,
        "parameters": count_parameters(task.module),
        **facts,
        "best": state.best,
        "last": {key: value for key, value in last.items() if key != "split"},
        "steps": state.step,
        "seconds": {"training": round(state.seconds, 1)},
    }
    write_result(folder, result, accelerator)


if __name__ == "__main__":
    run_program("ldm", main)
