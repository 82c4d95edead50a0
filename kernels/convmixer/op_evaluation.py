"""Custom operator of a ConvMixer layer in evaluation."""

# mypy: disallow-untyped-defs=False

import torch
import triton
from torch import Tensor

from ..launch import needs_upcast
from .kernels_evaluation import depthwise_kernel, pointwise_kernel
from .plan import TILE_ELEMENTS, cbhw_shape, plan_launch, pointwise_tiles


@torch.library.custom_op("mgcc_dist::convmixer_evaluate", mutates_args=())
def evaluate_layer(
    x: Tensor,
    depthwise: list[Tensor],
    depthwise_eps: float,
    pointwise: list[Tensor],
    pointwise_eps: float,
    input_cbhw: bool,
    output_cbhw: bool,
) -> Tensor:
    """Run one layer with its running statistics. Input and output are [C,B,H,W] where the flags say so, else [B,C,H,W].

    Each list holds weight, bias, gamma, beta, running mean and running variance. The pointwise weight has x's dtype.
    """
    channels, batch, height, width = cbhw_shape(x, input_cbhw)
    launch = plan_launch(batch, height, width, TILE_ELEMENTS)
    y = x.new_empty(channels, batch, height, width)
    depthwise_kernel[(channels, triton.cdiv(batch, launch.images_per_tile))](
        x, *depthwise, y, depthwise_eps, batch, channels, CBHW=input_cbhw,
        H=height, W=width, K=depthwise[0].shape[-1], BB=launch.images_per_tile, UPCAST=needs_upcast(x.dtype),
        num_warps=launch.num_warps, num_stages=2,
    )  # fmt: skip
    out = _new_output(x, input_cbhw, output_cbhw)
    columns = batch * height * width
    blocks, options = pointwise_tiles(channels, columns, x.element_size())
    pointwise_kernel[(triton.cdiv(channels, blocks["BM"]), triton.cdiv(columns, blocks["BN"]))](
        y, *pointwise, out, pointwise_eps, channels, columns, CBHW=output_cbhw, HW=height * width,
        **blocks, UPCAST=needs_upcast(x.dtype), **options,
    )  # fmt: skip
    return out


@evaluate_layer.register_fake
def _(x, depthwise, depthwise_eps, pointwise, pointwise_eps, input_cbhw, output_cbhw):
    return _new_output(x, input_cbhw, output_cbhw)


def _new_output(x: Tensor, input_cbhw: bool, output_cbhw: bool) -> Tensor:
    channels, batch, height, width = cbhw_shape(x, input_cbhw)
    return x.new_empty((channels, batch, height, width) if output_cbhw else (batch, channels, height, width))
