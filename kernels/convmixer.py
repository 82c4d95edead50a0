"""Fused ConvMixer layers: one Triton kernel and one matrix product forward, one kernel and two products backward.

    y = x + BN(GELU(depthwise(x)))        x' = BN(GELU(W y + b))                        (Eq. 3 and 4)

BatchNorm follows GELU, so it cannot be folded into the preceding convolution. It is a scale and shift in an epilogue.

**Fusion across layers.** Everything except W y works per channel. For z = W y of the previous layer, the program that
owns a channel computes x = BN(GELU(z + b)) and then y in one pass. A stack of L layers is

    x0 -mix-> y1 -matmul-> z1 -mix-> (x1, y2) -matmul-> z2 ... zL -norm-> xL

where every intermediate x is also an output, because decoders tap it. y and z are internal and stored as [C,B,H,W], so
the matrix product and both of its gradients are each one plain GEMM over all images. The kernel that reads z adds W's
bias and computes its gradient.

**Bytes moved, in passes over one activation tensor.** Forward, a layer within a stack takes 5: read z, write x and y
(mix); read y, write z (GEMM). The floor is 4; x is written because the shifted loads and the taps need it. A single
layer takes 6: read x, write y; GEMM; read z, write x'. Backward, a layer within a stack takes 5 in the kernel (read z
and dy, write and reread g and x mostly from cache, write dz) and 4 in the GEMMs. Eager PyTorch takes about 20 forward
and 30 backward. Saved for backward are z and y, 2 tensors per layer (3 for a single layer: x, y, z); eager saves 6.

**Numerics.** Statistics are two-pass or merged, in fp32, without atomics, so results are bit-reproducible. The
depthwise product takes operands in the activations' dtype and accumulates in fp32. Parameters may stay fp32 under
autocast.

With `SyncBatchNorm` on several ranks, training launches the kernels stage by stage. In between, the ranks' statistics
(count, mean, variance) are gathered and merged in rank order.

The kernels and their launches are in convmixer_forward, _backward, _norm and _evaluation. convmixer_tile holds their
shared device functions, convmixer_launch the launch configuration and the statistics across ranks.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgcc_dist.kernels import convmixer_backward, convmixer_evaluation, convmixer_forward, convmixer_norm
from mgcc_dist.kernels.autocast import compute_dtype
from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.convmixer_evaluation import evaluate_layer
from mgcc_dist.kernels.convmixer_forward import spatial_mix
from mgcc_dist.kernels.convmixer_launch import PLANE_SIZES
from mgcc_dist.kernels.convmixer_norm import final_norm
from mgcc_dist.kernels.targets import INTERPRETED, unsupported_device_reason

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


def _group_name(batch_norm: Any) -> str:
    """Return the name of the process group that shares the norm's statistics, "" for this rank only."""
    if not isinstance(batch_norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return ""
    group: Any = batch_norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


@torch.no_grad()
def _update_running_stats(updates: list[tuple[Any, Tensor]]) -> None:
    """Update running statistics like torch does, with three launches for any number of norms."""
    for momentum in {batch_norm.momentum for batch_norm, _ in updates}:
        chosen = [(batch_norm, stats) for batch_norm, stats in updates if batch_norm.momentum == momentum]
        running = [buffer for batch_norm, _ in chosen for buffer in (batch_norm.running_mean, batch_norm.running_var)]
        seen = [stats[row].to(batch_norm.running_mean.dtype) for batch_norm, stats in chosen for row in (0, 2)]
        torch._foreach_lerp_(running, seen, momentum)
    torch._foreach_add_([batch_norm.num_batches_tracked for batch_norm, _ in updates], 1)


def _forward_training(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """Return the output of every layer of the stack."""
    outputs: list[Tensor] = []
    updates: list[tuple[Any, Tensor]] = []
    source = x.to(compute_dtype(x)).contiguous()
    dtype = source.dtype
    previous: Any = None
    for layer in layers:
        first, second = layer.depthwise_norm, layer.pointwise_norm
        pre: tuple = (None, None, None, 0.0)
        if previous is not None:
            pre_norm = previous.pointwise_norm
            pre = (previous.pointwise.bias, pre_norm.weight, pre_norm.bias, pre_norm.eps)
        x_before, y, pre_stats, stats = spatial_mix(
            source,
            *pre,
            layer.depthwise.weight,
            layer.depthwise.bias,
            first.weight,
            first.bias,
            first.eps,
            _group_name(first),
        )
        if previous is not None:
            outputs.append(x_before)
            updates.append((previous.pointwise_norm, pre_stats))
        updates.append((first, stats))
        source = torch.mm(layer.pointwise.weight.flatten(1).to(dtype), y.flatten(1)).view(y.shape)
        previous = layer
    x, stats = final_norm(source, layer.pointwise.bias, second.weight, second.bias, second.eps, _group_name(second))
    _update_running_stats([*updates, (second, stats)])
    return [*outputs, x]


def _forward_evaluation(layers: Sequence[Any], x: Tensor) -> Tensor:
    """Return the output of the last layer of the stack."""
    x = x.to(compute_dtype(x)).contiguous()
    for i, layer in enumerate(layers):
        groups: list[Any] = []
        for convolution, batch_norm in (
            (layer.depthwise, layer.depthwise_norm),
            (layer.pointwise, layer.pointwise_norm),
        ):
            affine = [batch_norm.weight, batch_norm.bias, batch_norm.running_mean, batch_norm.running_var]
            groups += [[convolution.weight, convolution.bias, *affine], batch_norm.eps]
        groups[2][0] = groups[2][0].to(x.dtype)
        x = evaluate_layer(x, *groups, i > 0, i < len(layers) - 1)
    return x


class FusedConvMixerLayer(nn.Module):
    """A ConvMixer layer [B,C,H,W] -> [B,C,H,W] on these kernels, with the submodules of the original layer.

    It has the same parameters and state_dict keys.

    Raises:
        ValueError: `unsupported_reason` has a reason for this input.
    """

    def __init__(
        self, depthwise: nn.Module, depthwise_norm: nn.Module, pointwise: nn.Module, pointwise_norm: nn.Module
    ):
        super().__init__()
        self.depthwise = depthwise
        self.depthwise_norm = depthwise_norm
        self.pointwise = pointwise
        self.pointwise_norm = pointwise_norm

    @classmethod
    def from_module(cls, module: Any) -> "FusedConvMixerLayer":
        fused = cls(module.depthwise, module.depthwise_norm, module.pointwise, module.pointwise_norm)
        return fused.train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        return _forward([self], x)


class FusedConvMixer(nn.Sequential):
    """A stack of ConvMixer layers, a drop-in for their `nn.Sequential`.

    Two adjacent layers take one kernel less than two separate FusedConvMixerLayers.
    """

    @classmethod
    def from_module(cls, module: nn.Sequential) -> "FusedConvMixer":
        return cls(*(FusedConvMixerLayer.from_module(layer) for layer in module)).train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self.layers(), x)

    def layers(self) -> list[FusedConvMixerLayer]:
        return cast(list[FusedConvMixerLayer], list(self))

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the output of every layer, for decoders that tap them."""
        if self.training:
            _require_supported(self.layers(), x)
            return _forward_training(self.layers(), x)
        outputs = [x]
        for layer in self:
            outputs.append(layer(outputs[-1]))
        return outputs[1:]


def _require_supported(layers: Sequence[FusedConvMixerLayer], x: Tensor) -> None:
    for layer in layers:
        reason = unsupported_reason(layer, x)
        if reason is not None:
            raise ValueError(f"the fused ConvMixer layer does not support this input: {reason}")


def _forward(layers: Sequence[FusedConvMixerLayer], x: Tensor) -> Tensor:
    _require_supported(layers, x)
    return _forward_training(layers, x)[-1] if layers[0].training else _forward_evaluation(layers, x)


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for the ledger: training and evaluation in bf16, as launched for the paper's sizes."""
    files = (convmixer_forward, convmixer_backward, convmixer_norm, convmixer_evaluation)
    return [spec for file in files for spec in file.compile_specs(target)]
