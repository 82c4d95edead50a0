"""The drop-in modules of a ConvMixer layer and of a stack of layers."""

# mypy: disallow-untyped-defs=False

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..autocast import compute_dtype
from ..fused_module import FusedModule
from .op import final_norm, spatial_mix
from .op_evaluation import evaluate_layer
from .spec import unsupported_reason


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


class FusedConvMixerLayer(FusedModule):
    """A ConvMixer layer [B,C,H,W] -> [B,C,H,W] on these kernels.

    Raises:
        ValueError: `unsupported_reason` has a reason for this input.
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, kernel_size)

    @staticmethod
    def make_parts(*sizes: int) -> dict[str, nn.Module]:
        channels, size = sizes
        return {
            "depthwise": nn.Conv2d(channels, channels, size, padding=size // 2, groups=channels),
            "depthwise_norm": nn.BatchNorm2d(channels),
            "pointwise": nn.Conv2d(channels, channels, 1),
            "pointwise_norm": nn.BatchNorm2d(channels),
        }

    def forward(self, x: Tensor) -> Tensor:
        return _outputs([self], x)[-1]


class FusedConvMixer(FusedModule):
    """A stack of equal ConvMixer layers, a drop-in for their `nn.Sequential`.

    Two adjacent layers take one kernel less than two separate FusedConvMixerLayers.

    Raises:
        ValueError: `unsupported_reason` has a reason for this input.
    """

    def __init__(self, channels: int, kernel_size: int, layers: int) -> None:
        super().__init__(channels, kernel_size, layers)

    @staticmethod
    def make_parts(*sizes: int) -> dict[str, nn.Module]:
        channels, kernel_size, layers = sizes
        return {str(i): FusedConvMixerLayer(channels, kernel_size) for i in range(layers)}

    def forward(self, x: Tensor) -> Tensor:
        return _outputs(list(self.children()), x)[-1]

    def outputs(self, x: Tensor) -> list[Tensor]:
        """Return the output of every layer, for decoders that tap them."""
        return _outputs(list(self.children()), x, every=True)


def _outputs(layers: Sequence[Any], x: Tensor, every: bool = False) -> list[Tensor]:
    """Return the outputs of the stack; in evaluation only the last one, unless `every`."""
    for layer in layers:
        reason = unsupported_reason(layer, x)
        if reason is not None:
            raise ValueError(f"the fused ConvMixer layer does not support this input: {reason}")
    if layers[0].training:
        return _forward_training(layers, x)
    if not every:
        return [_forward_evaluation(layers, x)]
    outputs = [x]
    for layer in layers:
        outputs.append(_forward_evaluation([layer], outputs[-1]))
    return outputs[1:]
