"""The custom operator of the Triton up-convolution, and what the compiler needs to know of its kernel."""

from itertools import pairwise

import torch
import triton
from torch import Tensor

from ..compile_spec import CompileSpec
from ..launch import needs_upcast
from ..operation import PAPER_LEVELS
from .kernels import phase_gemm


def tiles(channels: int, out: int) -> tuple[dict[str, int], dict[str, int]]:
    """Return the block sizes and the launch options."""
    if out % 128 == 0 and channels % 64 == 0:
        return {"BM": 128, "BN": 128, "BK": 64}, {"num_warps": 8, "num_stages": 3}
    return {"BM": 128, "BN": min(64, out), "BK": min(32, channels)}, {"num_warps": 4, "num_stages": 3}


@torch.library.custom_op("mgcc_dist::upconv_evaluate", mutates_args=())
def upconv_evaluate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return ReLU(conv3x3(upsample(x))) of x [B,C,H,W] as [B,O,2H,2W], channels last.

    `weight` [2,2,2,2,C,O] (row parity, column parity, row tap, column tap) has x's dtype, `bias` [O] is float32.
    """
    batch, channels, height, width = x.shape
    out = weight.shape[-1]
    x = x.contiguous(memory_format=torch.channels_last)
    shape = batch, out, 2 * height, 2 * width
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    blocks, options = tiles(channels, out)
    grid = (triton.cdiv(batch * height * width, blocks["BM"]), out // blocks["BN"], 4)
    sizes = batch, height, width, channels, out
    phase_gemm[grid](x, weight, bias, y, *sizes, **blocks, UPCAST=needs_upcast(x.dtype), **options)
    return y


@upconv_evaluate.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    shape = batch, weight.shape[-1], 2 * height, 2 * width
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for the decoder levels of the paper at 256x256, batch 8."""
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
    found = []
    for (out, _), (channels, side) in pairwise(PAPER_LEVELS):
        blocks, options = tiles(channels, out)
        constants = {"C": channels, "OUT": out, **blocks, "UPCAST": False}
        name, sizes = f"upconv.evaluation bf16 {channels}->{out}", {"B": 8, "H": side, "W": side}
        found.append(CompileSpec(name, phase_gemm, types, sizes, constants, options))
    return found
