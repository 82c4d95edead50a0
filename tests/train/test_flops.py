"""FLOPs of a training step, against fvcore's count of the forward pass, and peak FLOP/s of GPUs."""

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.nn import functional as F

from mgcc_dist.common.gpus import NAMES, PEAKS, peak_flops
from mgcc_dist.data.batch import Batch
from mgcc_dist.diffusion.config import UNetDenoiserConfig
from mgcc_dist.diffusion.denoiser import DenoiserLoss, build
from mgcc_dist.diffusion.latents import LatentBatch
from mgcc_dist.diffusion.objective import build_objective
from mgcc_dist.kernels.dispatcher import fuse
from mgcc_dist.methods.config import METHODS
from mgcc_dist.methods.method import build as build_method
from mgcc_dist.models.config import MGCCConfig, UNetConfig
from mgcc_dist.train.config import LoopConfig
from mgcc_dist.train.flops import count_flops
from mgcc_dist.train.schedules import Progress
from mgcc_dist.train.weights import meta_copy

PROGRESS = Progress(step=0, total_steps=10, epoch=0.0, images=0, seed=0)
IMAGES, SIZE = 4, 32


class FirstOutput(nn.Module):
    """A denoiser as a module of tensors only, which is what fvcore can trace."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x, torch.zeros(len(x))).sample


def forward_flops(network, x):
    """FLOPs of convolutions and matrix products by fvcore, which counts a multiplication and an addition as one."""
    counted = FlopCountAnalysis(network, x).unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    operators = counted.by_operator()
    return 2 * sum(operators[name] for name in ("conv", "linear", "addmm", "matmul", "bmm"))


@pytest.mark.parametrize(
    ("method", "network"),
    [
        ("supervised", UNetConfig(widths=(4, 8, 8))),
        ("mgcc", MGCCConfig(widths=(4, 8, 8), taps=(1, 2, 3), kernel_size=3)),
    ],
)
def test_a_step_takes_three_times_the_forward_pass(method, network):
    """Less the gradient of the images, which nobody needs; whatever implementation computes it."""
    module = build_method(METHODS.get(method).config(), network)
    forward = forward_flops(module.network, torch.zeros(IMAGES, 1, SIZE, SIZE))
    labeled = IMAGES if method == "supervised" else IMAGES // 2
    first = 2 * IMAGES * SIZE**2 * 4 * 3 * 9
    batch = Batch(torch.zeros(IMAGES, 1, SIZE, SIZE), torch.zeros(labeled, 1, SIZE, SIZE), torch.arange(IMAGES), [])
    template = meta_copy(fuse(module, "torch"))  # phase up-convolutions
    state = torch.get_rng_state()
    assert count_flops(template, batch, PROGRESS) == 3 * forward - first
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in template.parameters())


def test_a_step_of_the_denoiser_counts_its_attention():
    loop = LoopConfig(steps=1)
    levels = {"channels": (8, 16), "attention": (False, True), "layers": 1}
    config = UNetDenoiserConfig(loop, **levels, norm_groups=4, head_channels=8)
    unet = build(config, (3, 8, 8), 0)
    side, heads, width = 4, 2, 16
    attentions = 4  # down, middle, two of up
    attention = 2 * 2 * IMAGES * heads * (side**2) ** 2 * (width // heads) * attentions
    first = 2 * IMAGES * 8**2 * 8 * 3 * 9 + 2 * IMAGES * 8 * 32  # of the latents and of the timesteps
    latents = torch.zeros(IMAGES, 3, 8, 8)
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    batch = LatentBatch(latents, latents, labels, torch.arange(IMAGES), [], latents[:, :1])
    loss = DenoiserLoss(unet, build_objective(config))
    forward = forward_flops(FirstOutput(unet), latents) + attention
    assert count_flops(meta_copy(loss), batch, PROGRESS) == 3 * forward - first


def test_a_grouped_convolution_counts_its_own_channels_only():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.plain, self.grouped = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.transposed = nn.ConvTranspose2d(8, 4, 2, stride=2, groups=4)

        def forward(self, batch, progress):
            return {"loss": F.relu(self.transposed(self.grouped(self.plain(batch)))).sum()}

    plain, grouped, transposed = (2 * 16**2 * products for products in (8, 8 * 9, 8 * 4))
    step = meta_copy(Step())
    assert count_flops(step, torch.zeros(1, 1, 16, 16), PROGRESS) == 2 * plain + 3 * grouped + 3 * transposed


def test_a_module_whose_values_decide_what_it_computes_is_not_counted():
    class Step(nn.Module):
        def forward(self, batch, progress):
            return {"loss": batch.sum() if batch.sum() > 0 else -batch.sum()}

    assert count_flops(Step(), torch.zeros(1), PROGRESS) is None


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", True, 989),
        ("NVIDIA H100 PCIe", "fp16", True, 756),
        ("NVIDIA A100-SXM4-80GB", "no", True, 156),
        ("NVIDIA A100 80GB PCIe", "no", False, 19.5),
        ("Tesla V100-SXM2-32GB", "fp16", True, 125),
        ("Tesla V100-SXM2-32GB", "no", True, 15.7),
        ("Tesla V100-SXM2-32GB", "bf16", True, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bf16", True, None),
        ("NVIDIA A10G", "bf16", True, None),
        ("cpu", "no", True, None),
    ],
)
def test_peak_of_a_gpu_and_none_of_what_is_not_in_the_table(name, precision, tf32, teraflops):
    assert peak_flops(name, precision, tf32) == (teraflops and 1e12 * teraflops)


def test_every_peak_has_a_name():
    assert NAMES.keys() == PEAKS.keys()
