"""The saved folder is read by plain diffusers, which makes the same images from the same noise."""

import subprocess
import sys

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DModel

from mgcc_dist.diffusion import pipeline
from mgcc_dist.diffusion.noise import Draw, generators

OUTSIDER = """
import sys, torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
image = pipe(batch_size=1, generator=torch.Generator().manual_seed(0), num_inference_steps=3).images[0]
assert image.mode == "L" and image.size == (16, 16), image
assert not any(name.startswith("mgcc_dist") for name in sys.modules)
"""


def test_a_program_without_this_package_loads_and_samples(pipeline_folder, tmp_path):
    subprocess.run([sys.executable, "-c", OUTSIDER, str(pipeline_folder)], check=True, cwd=tmp_path)


def test_diffusers_makes_our_image_from_our_noise(pipeline_folder):
    theirs = DiffusionPipeline.from_pretrained(pipeline_folder)
    ours = pipeline.load(pipeline_folder)
    images = [
        pipe(batch_size=2, generator=generators(3, Draw.SAMPLE, [4, 5]), num_inference_steps=5, output_type="np").images
        for pipe in (theirs, ours)
    ]
    assert np.array_equal(images[0], images[1])
    assert np.ptp(images[0]) > 0


def test_part_by_part_ddim_makes_the_same_image(pipeline_folder):
    """DDIM written out (Song et al. 2021, Eq. 12 with σ = 0) over the parts that diffusers loads."""
    vae = AutoencoderKL.from_pretrained(pipeline_folder / "vqvae").double()
    unet = UNet2DModel.from_pretrained(pipeline_folder / "unet").double()
    schedule = DDIMScheduler.from_pretrained(pipeline_folder / "scheduler")
    alpha_bar = schedule.alphas_cumprod.double()
    [draw] = generators(3, Draw.SAMPLE, [4])
    z = torch.randn(1, 2, 4, 4, generator=draw).double()
    steps = list(range(999, 0, -200))
    with torch.no_grad():
        for t, following in zip(steps, [*steps[1:], None], strict=True):
            now, then = alpha_bar[t], alpha_bar[following] if following is not None else torch.tensor(1.0)
            noise = unet(z, t).sample
            z = then.sqrt() * (z - (1 - now).sqrt() * noise) / now.sqrt() + (1 - then).sqrt() * noise
        expected = (vae.decode(z / 1.7).sample / 2 + 0.5).clamp(0, 1)[0, 0].numpy()
    made = pipeline.load(pipeline_folder)(
        batch_size=1, generator=generators(3, Draw.SAMPLE, [4]), num_inference_steps=5, output_type="np"
    ).images
    np.testing.assert_allclose(made[0, :, :, 0], expected, atol=2e-5)


def test_fingerprint_follows_weights_and_settings(pipeline_folder):
    before = pipeline.fingerprint(pipeline_folder)
    path = pipeline_folder / "scheduler" / "scheduler_config.json"
    path.write_text(path.read_text().replace("0.012", "0.013"))
    assert pipeline.fingerprint(pipeline_folder) != before
