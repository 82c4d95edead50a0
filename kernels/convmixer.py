"""The ConvMixer layer as one Triton kernel and one matrix product, forward, and one kernel and two products, backward.

    y = x + BN(GELU(depthwise(x)))        x' = BN(GELU(W y + b))                        (Eq. 3 and 4)

BatchNorm follows GELU, so it can't be folded into the convolution before it; it is a scale and a shift in an epilogue.

**Where the layers are cut.** Everything but W y works channel by channel. The program that owns a channel does, for
z = W y of the layer before, x = BN(GELU(z + b)) and then y, in one go. So a run of L layers is

    x0 -mix-> y1 -matmul-> z1 -mix-> (x1, y2) -matmul-> z2 ... zL -norm-> xL

with every x on the way as an output, for decoders that tap it. y and z are [C,B,H,W], which nobody outside sees: the
matrix product, and both of its backward, are then each one plain GEMM over all images. W's bias is added, and its
gradient summed, by the program that reads z.

**Bytes, in passes over one activation tensor.** A layer within a run moves, forward, 5: read z, write x and y (mix);
read y, write z (GEMM). Without the write of x, which the shifted loads and the taps need, it would be the floor of 4. A
layer alone moves 6: read x, write y; GEMM; read z, write x'. Backward, within a run: 5 of the kernel (read z and dy,
write and read back g and x mostly in cache, write dz) and 4 of the GEMMs. Eager moves about 20 forward and 30 backward.
Saved for backward are z and y, 2 tensors (3 in a layer alone: x, y, z); eager saves 6.

**Numerics.** Statistics are two-pass or merged, in fp32; no atomics, so two runs agree bit by bit. The depthwise
product takes operands in the type of the activations and adds up in fp32. Parameters may stay fp32 under autocast.

In training on several ranks with `SyncBatchNorm`, the kernels run stage by stage and the ranks' statistics (n, mean,
variance) are gathered and merged in the order of ranks in between.

This file has the modules. The kernels with their launches are in convmixer_forward, _backward, _norm and _evaluation;
_tile is what these share, _launch the shapes of launches and the statistics across ranks.
"""

# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mgcc_dist.kernels import convmixer_backward, convmixer_evaluation, convmixer_forward, convmixer_norm
from mgcc_dist.kernels.autocast import computing_dtype
from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.convmixer_evaluation import evaluate
from mgcc_dist.kernels.convmixer_forward import mix
from mgcc_dist.kernels.convmixer_launch import SIDES
from mgcc_dist.kernels.convmixer_norm import norm
from mgcc_dist.kernels.targets import INTERPRETED, device_refusal

KERNEL_SIZES = (3, 5, 7, 9, 11, 13)


def supported(module: Any, x: Tensor) -> str | None:
    """None if `module`, a ConvMixer layer or its fused form, can run `x` [B,C,H,W] on these kernels, else why not."""
    depthwise = module.depthwise
    size = depthwise.kernel_size[0]
    if (reason := device_refusal(x.device)) is not None:
        return reason
    dtype = computing_dtype(x)
    if dtype not in (torch.bfloat16, torch.float16, torch.float32) and not INTERPRETED:
        return f"the type is {dtype}; the kernels compute in bfloat16, float16 or float32"
    if depthwise.kernel_size != (size, size) or size not in KERNEL_SIZES:
        return f"the depthwise kernel is {depthwise.kernel_size}; the kernels are for squares of {KERNEL_SIZES}"
    if depthwise.padding not in ((size // 2, size // 2), "same") or depthwise.stride != (1, 1):
        return "the depthwise convolution does not keep the plane's size"
    if depthwise.dilation != (1, 1) or depthwise.groups != depthwise.out_channels or depthwise.padding_mode != "zeros":
        return "the depthwise convolution is dilated, not depthwise, or not padded with zeros"
    if depthwise.bias is None or module.pointwise.bias is None:
        return "a convolution has no bias"
    if x.ndim != 4 or x.shape[2] not in SIDES or x.shape[3] not in SIDES:
        return f"the planes are {tuple(x.shape[2:])}; the kernels are for sides of {SIDES}"
    if x.shape[0] == 0:
        return "the batch is empty"
    if x.numel() >= 2**31:
        return f"the tensor has {x.numel()} elements; the kernels' offsets are 32-bit"
    for batch_norm in (module.depthwise_norm, module.pointwise_norm):
        if not batch_norm.affine or not batch_norm.track_running_stats or batch_norm.momentum is None:
            return "a norm is without parameters, running statistics or momentum"
    if not module.training and torch.is_grad_enabled() and (x.requires_grad or depthwise.weight.requires_grad):
        return "evaluation with gradients; use torch.no_grad() or torch.inference_mode()"
    return None


def _group(batch_norm: Any) -> str:
    """The name of the process group that shares this norm's statistics, "" if it is this rank alone."""
    if not isinstance(batch_norm, nn.SyncBatchNorm) or not dist.is_initialized():
        return ""
    group: Any = batch_norm.process_group or dist.group.WORLD
    return group.group_name if dist.get_world_size(group) > 1 else ""


@torch.no_grad()
def _update_running(updates: list[tuple[Any, Tensor]]) -> None:
    """Moves running statistics towards those of the batch, as torch does; three launches however many norms."""
    for momentum in {batch_norm.momentum for batch_norm, _ in updates}:
        chosen = [(norm_, stats) for norm_, stats in updates if norm_.momentum == momentum]
        running = [buffer for norm_, _ in chosen for buffer in (norm_.running_mean, norm_.running_var)]
        seen = [stats[row].to(norm_.running_mean.dtype) for norm_, stats in chosen for row in (0, 2)]
        torch._foreach_lerp_(running, seen, momentum)
    torch._foreach_add_([norm_.num_batches_tracked for norm_, _ in updates], 1)


def _train(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """What comes out of every layer of the run."""
    outputs: list[Tensor] = []
    updates: list[tuple[Any, Tensor]] = []
    source = x.to(computing_dtype(x)).contiguous()
    dtype = source.dtype
    before: Any = None
    for layer in layers:
        first, second = layer.depthwise_norm, layer.pointwise_norm
        pre: tuple = (None, None, None, 0.0)
        if before is not None:
            pre_norm = before.pointwise_norm
            pre = (before.pointwise.bias, pre_norm.weight, pre_norm.bias, pre_norm.eps)
        x_before, y, pre_stats, stats = mix(
            source,
            *pre,
            layer.depthwise.weight,
            layer.depthwise.bias,
            first.weight,
            first.bias,
            first.eps,
            _group(first),
        )
        if before is not None:
            outputs.append(x_before)
            updates.append((before.pointwise_norm, pre_stats))
        updates.append((first, stats))
        source = torch.mm(layer.pointwise.weight.flatten(1).to(dtype), y.flatten(1)).view(y.shape)
        before = layer
    x, stats = norm(source, layer.pointwise.bias, second.weight, second.bias, second.eps, _group(second))
    _update_running([*updates, (second, stats)])
    return [*outputs, x]


def _evaluate(layers: Sequence[Any], x: Tensor) -> Tensor:
    """What comes out of the last layer of the run."""
    x = x.to(computing_dtype(x)).contiguous()
    for number, layer in enumerate(layers):
        groups: list[Any] = []
        for convolution, batch_norm in (
            (layer.depthwise, layer.depthwise_norm),
            (layer.pointwise, layer.pointwise_norm),
        ):
            affine = [batch_norm.weight, batch_norm.bias, batch_norm.running_mean, batch_norm.running_var]
            groups += [[convolution.weight, convolution.bias, *affine], batch_norm.eps]
        groups[2][0] = groups[2][0].to(x.dtype)
        x = evaluate(x, *groups, number > 0, number < len(layers) - 1)
    return x


class FusedConvMixerLayer(nn.Module):
    """A ConvMixer layer [B,C,H,W] -> [B,C,H,W] on these kernels, with the submodules of the one it is made from.

    Same parameters and state_dict keys. Its input must be `supported`, else a ValueError says why it is not.
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
        return _run([self], x)


class FusedConvMixer(nn.Sequential):
    """A run of ConvMixer layers in place of their `nn.Sequential`; a boundary costs a kernel less than layers apart."""

    @classmethod
    def from_module(cls, module: nn.Sequential) -> "FusedConvMixer":
        return cls(*(FusedConvMixerLayer.from_module(layer) for layer in module)).train(module.training)

    def forward(self, x: Tensor) -> Tensor:
        return _run(self.layers(), x)

    def layers(self) -> list[FusedConvMixerLayer]:
        return cast(list[FusedConvMixerLayer], list(self))

    def outputs(self, x: Tensor) -> list[Tensor]:
        """What comes out of every layer, for those who tap them."""
        if self.training:
            _require_supported(self.layers(), x)
            return _train(self.layers(), x)
        outputs = [x]
        for layer in self:
            outputs.append(layer(outputs[-1]))
        return outputs[1:]


def _require_supported(layers: Sequence[FusedConvMixerLayer], x: Tensor) -> None:
    for layer in layers:
        reason = supported(layer, x)
        if reason is not None:
            raise ValueError(f"the fused ConvMixer layer can't run: {reason}")


def _run(layers: Sequence[FusedConvMixerLayer], x: Tensor) -> Tensor:
    _require_supported(layers, x)
    return _train(layers, x)[-1] if layers[0].training else _evaluate(layers, x)


def cases(target: str) -> list[Case]:
    """The compiled forms that the ledger keeps: training and evaluation in bf16 as launched at the paper's sizes."""
    files = (convmixer_forward, convmixer_backward, convmixer_norm, convmixer_evaluation)
    return [case for file in files for case in file.cases(target)]
