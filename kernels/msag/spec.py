"""The gate's implementations, benchmark and roofline."""

from collections.abc import Iterable
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..autocast import compute_dtype
from ..compile_spec import CompileSpec
from ..operation import PAPER_LEVELS, Implementation, OperationSpec, Phase, Workload, register
from ..targets import INTERPRETED, device_target, unsupported_device_reason
from .tiles import EVALUATION_IMPLEMENTATIONS, single_kernel_channels

PARTS = ("pointwise", "ordinary", "dilated", "vote")


def unsupported_reason(module: Any, x: Tensor, implementation: str | None = None) -> str | None:
    """Return why the kernels cannot run `module` (an MSAG) on `x`, or None if they can.

    `implementation` is that of evaluation; it does not matter in training.
    """
    norms = [getattr(module, f"{part}_norm") for part in PARTS]
    other_norms = {type(norm).__name__ for norm in norms if type(norm) is not nn.BatchNorm2d}
    if other_norms:
        return f"a norm is {' or '.join(sorted(other_norms))}, not BatchNorm2d"
    if any(norm.running_mean is None or norm.weight is None for norm in norms):
        return "a norm has no running statistics or no weight"
    if len({(norm.eps, norm.momentum, norm.training) for norm in norms}) > 1 or norms[0].momentum is None:
        return "the norms differ in eps, momentum or mode, or have no momentum"
    if x.dim() != 4:
        return f"the input has {x.dim()} dimensions, not 4"
    batch, channels, height, width = x.shape
    if channels % 16 != 0:
        return f"the input has {channels} channels, not a multiple of 16"
    if x.numel() == 0 or height * width * channels >= 2**31:
        return f"the input shape {tuple(x.shape)} is empty or needs 64-bit offsets"
    if norms[0].training and batch * height * width == 1:
        return "the input has a single pixel, which has no variance"
    dtype = compute_dtype(x)
    if (dtype == torch.float64 and not INTERPRETED) or not dtype.is_floating_point or dtype.itemsize < 2:
        return f"the dtype is {dtype}, but the kernels support bfloat16 and float16"
    if dtype == torch.float32 and x.device.type == "cuda":
        return "the dtype is torch.float32, in which the gate kernels spill registers on a GPU"
    if module.vote.weight.device != x.device:
        return f"the input is on {x.device} and the weights are on {module.vote.weight.device}"
    if (reason := unsupported_device_reason(x.device)) is not None:
        return reason
    allowed = single_kernel_channels(device_target(x.device))
    if implementation == "single_kernel" and not norms[0].training and channels not in allowed:
        return f"the single-kernel gate supports {', '.join(map(str, allowed))} channels on this GPU, not {channels}"
    needs_gradient = x.requires_grad or any(parameter.requires_grad for parameter in module.parameters())
    if not norms[0].training and torch.is_grad_enabled() and needs_gradient:
        return "gradients are enabled in evaluation mode (use torch.no_grad() or torch.inference_mode())"
    return None


def _create(plain: nn.Module, implementation: str | None = None) -> nn.Module:
    from .module import FusedMSAG  # Triton is optional

    return FusedMSAG.from_module(plain, implementation)


class MSAGSpec(OperationSpec):
    name = "msag"
    parts: ClassVar[dict[str, type[nn.Module] | None]] = {
        name: required for part in PARTS for name, required in ((part, nn.Conv2d), (f"{part}_norm", None))
    }

    def implementations(self) -> dict[str, Implementation]:
        """Return "triton", which chooses by channels in evaluation, and each way to compute the gate in evaluation."""
        found = {"triton": Implementation(_create, unsupported_reason, benchmarked=("training",))}
        for name in EVALUATION_IMPLEMENTATIONS:
            reason = partial(unsupported_reason, implementation=name)
            create = partial(_create, implementation=name)
            found[f"triton {name}"] = Implementation(create, reason, benchmarked=("evaluation",))
        return found

    def workloads(self, device_type: str, dtype: torch.dtype, training: bool, quick: bool) -> list[Workload]:
        """The gates of the paper's network, largest map first; on a CPU one image, in evaluation only."""
        cuda = device_type == "cuda"
        if not cuda and (quick or training):
            return []
        found = [
            Workload(self.name, (channels, side, side), 8 if cuda else 1, dtype, training)
            for channels, side in PAPER_LEVELS[:-1]
        ]
        return found[:1] if quick else found

    def roofline_phases(self, workload: Workload, direction: str) -> list[Phase]:
        channels, _, _ = workload.shape
        pixels, size = workload.pixels, workload.dtype.itemsize
        plane, weight = pixels * channels * size, channels**2 * size
        convolutions, vote = 38.0 * pixels * channels**2, 6.0 * pixels * channels**2
        if direction == "backward":  # the 26 passes of the kernels, which share all reads they can
            return [(2 * (convolutions + vote), 26 * plane + 44 * weight)]
        if not workload.training:
            return [(convolutions + vote, 2 * plane + 22 * weight)]
        return [(convolutions, 4 * plane + 19 * weight), (vote, 4 * plane + 3 * weight), (0, 3 * plane)]

    def compile_specs(self, target: str) -> Iterable[CompileSpec]:
        from .compile_specs import compile_specs  # Triton is optional

        return compile_specs(target)


register(MSAGSpec())
