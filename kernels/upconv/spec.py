"""The up-convolution's implementations, benchmark and roofline."""

from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..compile_spec import CompileSpec
from ..operation import PAPER_LEVELS, Implementation, OperationSpec, Phase, Workload, register
from ..targets import unsupported_device_reason
from .module import FusedUpConv

# Channels and sides of the maps of small networks, shallow to deep.
QUARTER = ((16, 128), (32, 64), (64, 32), (128, 16), (256, 8))  # configs/sweeps/table_1_small.yaml
SMALL = ((8, 128), (16, 64), (32, 32), (64, 16), (128, 8))  # configs/segment/mgcc_busi_small.yaml
DEMO = ((16, 64), (32, 32), (64, 16), (128, 8))  # configs/segment/mgcc_demo.yaml


def unsupported_reason(module: nn.Module, x: Tensor) -> str | None:
    """Return why the PyTorch implementation cannot replace `module` for x, or None if it can."""
    conv: Any = module.conv
    norm: Any = module.norm
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.padding_mode == "zeros"
    if not plain or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
        return "the convolution is not 3x3 with stride 1, zero padding 1 and one group"
    if getattr(norm, "running_mean", None) is None:
        return "the norm has no running statistics"
    if x.dim() != 4 or not x.is_floating_point():
        return f"the input is {x.dtype} with {x.dim()} dimensions, not a 4-D float tensor"
    return None


def triton_unsupported_reason(module: nn.Module, x: Tensor) -> str | None:
    """Return why the Triton implementation cannot replace `module` for x, or None if it can."""
    if reason := unsupported_reason(module, x):
        return reason
    conv: Any = module.conv
    if module.training or torch.is_grad_enabled():
        return "the Triton up-convolution supports only evaluation without gradients"
    if reason := unsupported_device_reason(x.device):
        return reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"the dtype is {x.dtype}, but the kernel supports float32, float16 and bfloat16"
    if x.numel() >= 2**31:
        return f"the input has {x.numel()} elements, but the kernel uses 32-bit offsets"
    if any(channels % 64 and channels not in (16, 32) for channels in (conv.in_channels, conv.out_channels)):
        return f"the channels are {conv.in_channels} -> {conv.out_channels}, but must be 16, 32 or multiples of 64"
    return None


class UpConvSpec(OperationSpec):
    name = "upconv"
    parts: ClassVar[dict[str, type[nn.Module] | None]] = {"conv": nn.Conv2d, "norm": None}

    def implementations(self) -> dict[str, Implementation]:
        create = FusedUpConv.from_module
        return {
            "torch": Implementation(create, unsupported_reason, triton=False),
            "triton": Implementation(partial(create, implementation="triton"), triton_unsupported_reason),
        }

    def sizes(self, plain: Any) -> tuple[int, ...]:
        """Return the output channels."""
        return (plain.conv.out_channels,)

    def workloads(self, device_type: str, dtype: torch.dtype, training: bool, quick: bool) -> list[Workload]:
        """The decoder levels of the paper's network, on a CPU of small networks too; the largest map first.

        On a CPU, the paper's levels run on one image, in evaluation only.
        """
        on_cpu = [DEMO] if quick else [DEMO, SMALL, QUARTER, PAPER_LEVELS]
        found = []
        for levels in [PAPER_LEVELS] if device_type == "cuda" else on_cpu:
            batch = 1 if levels is PAPER_LEVELS and device_type == "cpu" else 8
            if batch == 8 or not training:
                for (out, _), (channels, side) in pairwise(levels):
                    found.append(Workload(self.name, (channels, side, side, out), batch, dtype, training))
        return found[:1] if quick and device_type == "cuda" else found

    def roofline_phases(self, workload: Workload, direction: str) -> list[Phase]:
        channels, _, _, out_channels = workload.shape
        pixels, size = workload.pixels, workload.dtype.itemsize
        plane, out = pixels * channels * size, 4 * pixels * out_channels * size
        flops, weight = 32.0 * pixels * channels * out_channels, 9 * channels * out_channels * size
        if direction == "backward":  # reductions of the norm over dy and u; both gradients of the convolution
            return [(0, 2 * out), (2 * flops, 2 * out + 2 * plane + 2 * weight)]
        first = (flops, plane + out + weight)
        return [first, (0, 2 * out)] if workload.training else [first]

    def compile_specs(self, target: str) -> Iterable[CompileSpec]:
        from .op import compile_specs  # Triton is optional

        return compile_specs(target)


register(UpConvSpec())
