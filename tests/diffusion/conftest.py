from pathlib import Path

import pytest
import torch
from tiny_ldm import DENOISER, SHAPE

from mgcc_dist.diffusion import denoiser, pipeline

torch.set_num_threads(1)  # like the ranks that some tests start, so that sums have the same order


@pytest.fixture
def unet():
    torch.manual_seed(1)
    return denoiser.build(DENOISER, SHAPE, 0)


@pytest.fixture
def pipeline_folder(vae, unet, tmp_path) -> Path:
    folder = tmp_path / "pipeline"
    pipeline.save(vae, unet, DENOISER, {}, {}, folder)
    return folder
