"""Throughput of the package's sampling against diffusers' LDMPipeline with DDIM, with the same network.

    python -m benchmarks.sampling --pipeline out/ldm/pipeline --out benchmarks/results/sampling.json

stock    `LDMPipeline(batch_size=..., num_inference_steps=100)`, float32, as loaded
ddim     the package's sampler with the same number of steps
fast     the package's sampler, DPM-Solver++ with 25 steps

All start from the same noise and are measured alternately. A rate is the median over the rounds, a ratio the median of
the rounds' ratios. On a GPU the package's sampler uses bfloat16 weights and CUDA graphs; change this with --precision
and --compile.

`grey_levels_from_exact` is the mean absolute difference, in grey levels of 255, to DDIM with --reference steps in
float32 from the same noise. It is the solver's error, not a measure of image quality. Without --pipeline the networks
are those of --preset with random weights: the times are valid, the errors are not.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, LDMPipeline, UNet2DModel

from mgcc_dist.common.command_line import parse
from mgcc_dist.common.config import CONFIGS
from mgcc_dist.common.environment import benchmark_header
from mgcc_dist.common.files import write_json
from mgcc_dist.diffusion import autoencoder, denoiser, pipeline
from mgcc_dist.diffusion.config import Solver
from mgcc_dist.diffusion.noise import RngStream, make_generators
from mgcc_dist.diffusion.sampler import Sampler, initial_noise
from mgcc_dist.ldm import LdmConfig


def random_pipeline(preset: str, folder: Path) -> Path:
    words = ["--preset", preset, "--data.phantom", "1"]
    config = parse(LdmConfig, words, CONFIGS / "ldm")
    vae = autoencoder.build(config.autoencoder, config.data.image_size)
    side = config.data.image_size // config.autoencoder.downsampling
    unet = denoiser.build(config.denoiser, (config.autoencoder.latent_channels, side, side), 0)
    pipeline.save(vae, unet, config.denoiser, {}, {}, folder)
    return folder


def stock(folder: Path, steps: int, device: torch.device) -> Callable[[list[int]], np.ndarray]:
    pipe = LDMPipeline(
        vqvae=AutoencoderKL.from_pretrained(folder / "vqvae"),
        unet=UNet2DModel.from_pretrained(folder / "unet"),
        scheduler=DDIMScheduler.from_pretrained(folder / "scheduler"),
    ).to(device)
    pipe.set_progress_bar_config(disable=True)

    def make(indices: list[int]) -> np.ndarray:
        draws = make_generators(0, RngStream.SAMPLE, indices)
        pictures = pipe(batch_size=len(indices), generator=draws, num_inference_steps=steps).images
        return np.stack([np.asarray(picture) for picture in pictures])

    return make


def ours(
    folder: Path, solver: Solver, steps: int, half: bool, compile: bool, device: torch.device
) -> Callable[[list[int]], np.ndarray]:
    model = pipeline.load(folder)
    sampler = Sampler(model, solver, steps, 1.0, half, compile, device)
    return lambda indices: sampler.generate(initial_noise(0, indices, model.latent_shape))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipeline", type=Path, help="OUT/pipeline of a trained model without classes")
    parser.add_argument("--preset", default="busi_small", help="for the networks without --pipeline")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=16, help="images per round")
    parser.add_argument("--steps", type=int, default=100, help="steps of stock and ddim")
    parser.add_argument("--fast-steps", type=int, default=25)
    parser.add_argument("--reference", type=int, default=1000, help="steps of the reference; 0 skips it")
    cuda = torch.cuda.is_available()
    parser.add_argument("--precision", choices=["no", "bf16"], default="bf16" if cuda else "no")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    options = parser.parse_args()

    device = torch.device("cuda" if cuda else "cpu")
    half, indices = options.precision == "bf16", list(range(options.batch))
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.pipeline or random_pipeline(options.preset, Path(scratch) / "pipeline")
        samplers = {
            "stock": stock(folder, options.steps, device),
            "ddim": ours(folder, "ddim", options.steps, half, options.compile, device),
            "fast": ours(folder, "dpm_solver++", options.fast_steps, half, options.compile, device),
        }
        made = {name: make(indices) for name, make in samplers.items()}  # also compiles
        rates: dict[str, list[float]] = {name: [] for name in samplers}
        for _ in range(options.rounds):
            for name, make in samplers.items():
                started = time.perf_counter()
                make(indices)
                rates[name].append(options.batch / (time.perf_counter() - started))
        exact = ours(folder, "ddim", options.reference, False, False, device)(indices) if options.reference else None
    rows = {}
    for name, rate in rates.items():
        ratios = sorted(mine / theirs for mine, theirs in zip(rate, rates["stock"], strict=True))
        rows[name] = {
            "images_per_second": round(statistics.median(rate), 3),
            "ratio": round(statistics.median(ratios), 2),
            "ratio_lowest_highest": [round(ratios[0], 2), round(ratios[-1], 2)],
        }
        if exact is not None:
            error = np.abs(made[name].astype(int) - exact).mean()
            rows[name]["grey_levels_from_exact"] = round(float(error), 3)
        print(f"{name}: {rows[name]}", flush=True)
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "pipeline")}
    settings |= {"weights": "trained" if options.pipeline else "random", "threads": torch.get_num_threads()}
    write_json(options.out, {**benchmark_header("benchmarks.sampling"), "settings": settings, "rows": rows})
    print(f"sampling: {options.out}")


if __name__ == "__main__":
    main()
