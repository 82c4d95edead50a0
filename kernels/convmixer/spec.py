"""The implementations, benchmark and roofline of a ConvMixer layer, and of a stack of layers."""

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..autocast import compute_dtype
from ..compile_spec import CompileSpec
from ..dispatcher import KernelDispatcher
from ..operation import Implementation, OperationSpec, Phase, Workload, find_operation, register
from ..targets import INTERPRETED, unsupported_device_reason
from .plan import PLANE_SIZES

KERNEL_SIZES = (3, 5, 7, 9, 11, 13)


def unsupported_reason(module: Any, x: Tensor) -> str | None:
    """Return why these kernels cannot run a ConvMixer layer `module` on `x` [B,C,H,W], or None if they can."""
    depthwise = module.depthwise
    size = depthwise.kernel_size[0]
    if (reason := unsupported_device_reason(x.device)) is not None:
        return reason
    dtype = compute_dtype(x)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) and not INTERPRETED:
        return f"the dtype is {dtype}, but the kernels support bfloat16, float16 and float32"
    if depthwise.kernel_size != (size, size) or size not in KERNEL_SIZES:
        return (
            f"the depthwise kernel size is {depthwise.kernel_size}, but the kernels support square sizes {KERNEL_SIZES}"
        )
    if depthwise.padding not in ((size // 2, size // 2), "same") or depthwise.stride != (1, 1):
        return "the depthwise convolution changes the spatial size"
    if depthwise.dilation != (1, 1) or depthwise.groups != depthwise.out_channels or depthwise.padding_mode != "zeros":
        return "the depthwise convolution is dilated, grouped differently, or not zero-padded"
    if depthwise.bias is None or module.pointwise.bias is None:
        return "a convolution has no bias"
    if x.ndim != 4 or x.shape[2] not in PLANE_SIZES or x.shape[3] not in PLANE_SIZES:
        return f"the input is {tuple(x.shape[2:])}, but the kernels support heights and widths {PLANE_SIZES}"
    if x.shape[0] == 0:
        return "the batch is empty"
    if x.numel() >= 2**31:
        return f"the input has {x.numel()} elements, but the kernels use 32-bit offsets"
    for batch_norm in (module.depthwise_norm, module.pointwise_norm):
        if not batch_norm.affine or not batch_norm.track_running_stats or batch_norm.momentum is None:
            return "a norm has no parameters, no running statistics or no momentum"
    if not module.training and torch.is_grad_enabled() and (x.requires_grad or depthwise.weight.requires_grad):
        return "gradients are enabled in evaluation mode (use torch.no_grad() or torch.inference_mode())"
    return None


def unsupported_stack_reason(stack: nn.Module, x: Tensor) -> str | None:
    """Return why these kernels cannot run a stack of layers on `x`, or None if they can."""
    for layer in stack.children():
        reason = unsupported_reason(layer, x)
        if reason is not None:
            return reason
    return None


def _create_layer(plain: nn.Module) -> nn.Module:
    from .module import FusedConvMixerLayer  # Triton is optional

    return FusedConvMixerLayer.from_module(plain)


def _create_stack(plain: nn.Module) -> nn.Module:
    from .module import FusedConvMixer  # Triton is optional

    return FusedConvMixer.from_module(plain)


class ConvMixerLayerSpec(OperationSpec):
    name = "convmixer"
    parts: ClassVar[dict[str, type[nn.Module] | None]] = {
        "depthwise": nn.Conv2d,
        "depthwise_norm": None,
        "pointwise": nn.Conv2d,
        "pointwise_norm": None,
    }

    def implementations(self) -> dict[str, Implementation]:
        return {"triton": Implementation(_create_layer, unsupported_reason)}

    def sizes(self, plain: Any) -> tuple[int, ...]:
        """Return the kernel size."""
        return (plain.depthwise.kernel_size[0],)

    def workloads(self, device_type: str, dtype: torch.dtype, training: bool, quick: bool) -> list[Workload]:
        """The paper's layer at its batch size of 8, a larger kernel, and a larger batch; nothing on a CPU."""
        sizes = [(7, 8)] if quick else [(7, 8), (13, 8), (7, 64)]
        found = [Workload(self.name, (1024, 16, 16, kernel), batch, dtype, training) for kernel, batch in sizes]
        return found if device_type == "cuda" else []

    def roofline_phases(self, workload: Workload, direction: str) -> list[Phase]:
        channels, _, _, kernel, *layers = workload.shape
        pixels, size = workload.pixels, workload.dtype.itemsize
        plane, weight = pixels * channels * size, channels**2 * size
        depthwise, pointwise = 2.0 * kernel**2 * pixels * channels, 2.0 * pixels * channels**2
        if direction == "backward":
            phases = [(2 * depthwise, 3.0 * plane), (2 * pointwise, 4.0 * plane + 2 * weight)]
        else:
            phases = [(depthwise, 2.0 * plane), (pointwise, 2.0 * plane + weight)]
        return phases * (layers[0] if layers else 1)

    def compile_specs(self, target: str) -> Iterable[CompileSpec]:
        from .compile_specs import compile_specs  # Triton is optional

        return compile_specs(target)


class ConvMixerDispatcher(KernelDispatcher):
    """The dispatcher of a stack, whose intermediate outputs decoders tap."""

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the output of every layer."""
        implementation: Any = self.implementations[self.select(x)]
        return implementation.outputs(x)


class ConvMixerSpec(ConvMixerLayerSpec):
    """A stack; its kernels are those of the layer."""

    name = "mixer"
    parts: ClassVar[dict[str, type[nn.Module] | None]] = {}
    methods = ("forward", "outputs")

    def implementations(self) -> dict[str, Implementation]:
        return {"triton": Implementation(_create_stack, unsupported_stack_reason)}

    def structure_problem(self, plain: nn.Module) -> str | None:
        for name, layer in plain.named_children():
            spec, problem = find_operation(layer)
            if not isinstance(spec, ConvMixerLayerSpec):
                return f"its layer {name} is {type(layer).__name__}"
            if problem:
                return f"of its layer {name}: {problem}"
        return None if len(list(plain.children())) else "it has no layers"

    def sizes(self, plain: Any) -> tuple[int, ...]:
        """Return the kernel size and the number of layers."""
        return (plain[0].depthwise.kernel_size[0], len(plain))

    def dispatcher(self) -> type[KernelDispatcher]:
        return ConvMixerDispatcher

    def workloads(self, device_type: str, dtype: torch.dtype, training: bool, quick: bool) -> list[Workload]:
        """The paper's stack; on a CPU one image, in evaluation only."""
        if device_type == "cuda":
            return [Workload(self.name, (1024, 16, 16, 7, 9), 8, dtype, training)]
        return [] if quick or training else [Workload(self.name, (1024, 16, 16, 7, 9), 1, dtype, training)]

    def compile_specs(self, target: str) -> Iterable[CompileSpec]:
        return ()


register(ConvMixerLayerSpec())
register(ConvMixerSpec())
