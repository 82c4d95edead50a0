"""The ConvMixer layer as one Triton kernel and one matrix product, forward, and one kernel and two products, backward.

    y = x + BN(GELU(depthwise(x)))        x' = BN(GELU(W y + b))                        (Eq. 3 and 4)

BatchNorm follows GELU, so it can't be folded into the convolution before it; it is a scale and a shift in an epilogue.

**Where the layers are cut.** Everything but W y works channel by channel (`convmixer_kernels`). The program that owns
a channel does, for z = W y of the layer before, x = BN(GELU(z + b)) and then y, in one go. So a run of L layers is

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

**Launch table.** A channel with at most RESIDENT elements stays in registers; more goes through in groups of images of
TILE elements. There is a warp for every 512 elements of a tile, but 4 at least and 8 at most. It is a table and not an
autotuner, so that the order of every sum, and with it every bit, depends on the shape alone.

In training on several ranks with `SyncBatchNorm`, the kernels run stage by stage and the ranks' statistics (n, mean,
variance) are gathered and merged in the order of ranks in between.
"""

# mypy: disallow-untyped-defs=False

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import triton
from torch import Tensor, nn

from mgcc_dist.kernels import convmixer_kernels as kernels
from mgcc_dist.kernels.case import Case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_SIZES = (3, 5, 7, 9, 11, 13)
SIDES = (16, 32)  # of a plane: the height and width of a tensor-core tile, or of two
RESIDENT_FORWARD = 8192
RESIDENT_BACKWARD = 2048
TILE = 2048


class Plan(NamedTuple):
    images: int
    """in a tile, a power of two"""
    resident: bool
    """whether that is the whole batch"""
    num_warps: int


def plan(batch: int, height: int, width: int, resident: int) -> Plan:
    """The launch of a kernel with a program a channel that can keep `resident` elements; deterministic in the shape."""
    plane = height * width
    images = triton.next_power_of_2(batch)
    fits = images * plane <= resident
    if not fits:
        images = max(TILE // plane, 1)
    return Plan(images, fits, min(max(images * plane // 512, 4), 8))


def accumulator_type(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Statistics across ranks.


def merge_statistics(counts: Tensor, means: Tensor, variances: Tensor) -> Tensor:
    """[3,C] mean, biased and unbiased variance of R sets of values, from their counts [R,1], means and variances [R,C].

    The variance is that within the sets plus that of their means: no difference of large squares.
    """
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    squares = (counts * (variances + (means - mean).square())).sum(0)
    return torch.stack([mean, squares / total, squares / (total - 1)])


def _resolve(group: Any) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)


def _gather_statistics(stats: Tensor, count: int, group: str) -> None:
    """Replaces stats [3,C] of this rank's `count` values a channel by those of the group."""
    process_group = _resolve(group)
    mine = torch.cat([stats[:2].flatten(), stats.new_tensor([count])])
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(gathered, mine, group=process_group)
    everyone = torch.stack(gathered)
    means, variances = everyone[:, :-1].unflatten(1, (2, -1)).unbind(1)
    stats.copy_(merge_statistics(everyone[:, -1:], means, variances))


def _average_sums(sums: Tensor, count: int, group: str) -> None:
    """Replaces this rank's sums [2,C] over its `count` values by the mean over all values of the group."""
    everyone = torch.cat([sums.flatten(), sums.new_tensor([count])])
    dist.all_reduce(everyone, group=_resolve(group))
    sums.copy_((everyone[:-1] / everyone[-1]).view_as(sums))


# Training: y from x, or x and y from z.


@torch.library.custom_op("mgcc_dist::convmixer_mix", mutates_args=())
def mix(
    source: Tensor,
    pre_bias: Tensor | None,
    pre_gamma: Tensor | None,
    pre_beta: Tensor | None,
    pre_eps: float,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    beta: Tensor,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, y, pre_stats, stats), with y [C,B,H,W] = x + BN(GELU(depthwise(x) + bias)).

    With `pre_bias`, source is z [C,B,H,W] and x [B,C,H,W] = BN(GELU(z + pre_bias)); without, source is x, and the x and
    pre_stats returned are empty. `group` names the process group that shares statistics, "" for none. Statistics are
    [3,C]: mean, biased and unbiased variance.
    """
    norm = pre_bias is not None
    channels, batch, height, width = _channels_outer_shape(source, norm)
    launch = plan(batch, height, width, 0 if group else RESIDENT_FORWARD)
    y = source.new_empty(channels, batch, height, width)
    stats = source.new_empty(3, channels, dtype=accumulator_type(source))
    pre_stats = torch.empty_like(stats) if norm else stats.new_empty(0)
    x_out = source.new_empty(batch, channels, height, width) if norm else source.new_empty(0)
    x = x_out if norm else source

    def run(kernel, **constants: int) -> None:
        kernel[(channels,)](
            source,
            pre_bias,
            pre_gamma,
            pre_beta,
            pre_stats,
            x,
            weight,
            bias,
            gamma,
            beta,
            stats,
            y,
            pre_eps,
            eps,
            batch,
            channels,
            NORM=norm,
            H=height,
            W=width,
            K=weight.shape[-1],
            BB=launch.images,
            UPCAST=INTERPRETED,
            num_warps=launch.num_warps,
            num_stages=2,
            **constants,
        )

    if not group:
        if launch.resident:
            run(kernels.forward_resident)
        else:
            run(kernels.forward_staged, FIRST=0, LAST=2)
        return x_out, y, pre_stats, stats
    count = batch * height * width
    if norm:
        run(kernels.forward_staged, FIRST=0, LAST=0)
        _gather_statistics(pre_stats, count, group)
    run(kernels.forward_staged, FIRST=1, LAST=1)
    _gather_statistics(stats, count, group)
    run(kernels.forward_staged, FIRST=2, LAST=2)
    return x_out, y, pre_stats, stats


def _channels_outer_shape(tensor: Tensor, channels_outer: bool) -> tuple[int, int, int, int]:
    first, second, height, width = tensor.shape
    return (first, second, height, width) if channels_outer else (second, first, height, width)


@mix.register_fake
def _(source, pre_bias, pre_gamma, pre_beta, pre_eps, weight, bias, gamma, beta, eps, group):
    norm = pre_bias is not None
    channels, batch, height, width = _channels_outer_shape(source, norm)
    stats = source.new_empty(3, channels, dtype=accumulator_type(source))
    x = source.new_empty(batch, channels, height, width) if norm else source.new_empty(0)
    pre_stats = torch.empty_like(stats) if norm else stats.new_empty(0)
    return x, source.new_empty(channels, batch, height, width), pre_stats, stats


@torch.library.custom_op("mgcc_dist::convmixer_mix_backward", mutates_args=())
def mix_backward(
    dtap: Tensor | None,
    dy: Tensor,
    source: Tensor,
    pre_bias: Tensor | None,
    pre_gamma: Tensor | None,
    pre_beta: Tensor | None,
    pre_stats: Tensor,
    pre_eps: float,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor,
    stats: Tensor,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dsource, dweight, [3,C] gradients of bias, gamma, beta, and the same of the norm before) of `mix`.

    `dtap` is the gradient of x as an output. The parameters' gradients are in the type of the statistics.
    """
    norm = pre_bias is not None
    channels, batch, height, width = _channels_outer_shape(source, norm)
    launch = plan(batch, height, width, 0 if group else RESIDENT_BACKWARD)
    x = source.new_empty(batch, channels, height, width) if norm else source
    g = torch.empty_like(dy)
    dsource = torch.empty_like(source)
    dweight = stats.new_empty(weight.shape)
    dparameters = stats.new_empty(3, channels)
    dpre = stats.new_empty(3 if norm else 0, channels)
    sums, pre_sums = stats.new_empty(2, channels), stats.new_empty(2, channels)
    count = batch * height * width

    def run(kernel, *extra: Tensor | float, **constants: int) -> None:
        kernel[(channels,)](
            source,
            pre_bias,
            pre_gamma,
            pre_beta,
            pre_stats,
            x,
            weight,
            bias,
            gamma,
            stats,
            dy,
            dtap,
            g,
            dsource,
            *(dpre if norm else (None, None, None)),
            dsource,
            dweight,
            *dparameters,
            *extra,
            pre_eps,
            eps,
            batch,
            channels,
            NORM=norm,
            TAP=dtap is not None,
            H=height,
            W=width,
            K=weight.shape[-1],
            BB=launch.images,
            UPCAST=INTERPRETED,
            num_warps=launch.num_warps,
            num_stages=2,
            **constants,
        )

    if not group:
        if launch.resident:
            run(kernels.backward_resident)
        else:
            run(kernels.backward_staged, pre_sums, sums, float(count), FIRST=0, LAST=2)
        return dsource, dweight, dparameters, dpre
    run(kernels.backward_staged, pre_sums, sums, 1.0, FIRST=0, LAST=0)
    _average_sums(sums, count, group)
    run(kernels.backward_staged, pre_sums, sums, 1.0, FIRST=1, LAST=1)
    if norm:
        _average_sums(pre_sums, count, group)
        run(kernels.backward_staged, pre_sums, sums, 1.0, FIRST=2, LAST=2)
    return dsource, dweight, dparameters, dpre


@mix_backward.register_fake
def _(
    dtap, dy, source, pre_bias, pre_gamma, pre_beta, pre_stats, pre_eps, weight, bias, gamma, stats, eps, group
):  # fmt: skip
    dpre = stats.new_empty(0 if pre_bias is None else 3, gamma.shape[0])
    return torch.empty_like(source), stats.new_empty(weight.shape), stats.new_empty(3, gamma.shape[0]), dpre


def _save_mix(ctx, inputs, output):
    source, pre_bias, pre_gamma, pre_beta, ctx.pre_eps, weight, bias, gamma, _, ctx.eps, ctx.group = inputs
    _, _, pre_stats, stats = output
    ctx.save_for_backward(source, pre_bias, pre_gamma, pre_beta, pre_stats, weight, bias, gamma, stats)
    ctx.set_materialize_grads(False)


def _backward_of_mix(ctx, dx, dy, _dpre_stats, _dstats):
    source, pre_bias, pre_gamma, pre_beta, pre_stats, weight, bias, gamma, stats = ctx.saved_tensors
    norm = pre_bias is not None
    if dy is None:
        dy = torch.zeros_like(source) if norm else torch.zeros_like(source.transpose(0, 1)).contiguous()
    dtap = dx.contiguous() if norm and dx is not None else None
    dsource, dweight, dparameters, dpre = mix_backward(
        dtap,
        dy.contiguous(),
        source,
        pre_bias,
        pre_gamma,
        pre_beta,
        pre_stats,
        ctx.pre_eps,
        weight,
        bias,
        gamma,
        stats,
        ctx.eps,
        ctx.group,
    )
    dbias, dgamma, dbeta = dparameters.to(gamma.dtype).unbind()
    dpre_bias, dpre_gamma, dpre_beta = dpre.to(gamma.dtype).unbind() if norm else (None, None, None)
    dweight = dweight.to(weight.dtype)
    return dsource, dpre_bias, dpre_gamma, dpre_beta, None, dweight, dbias, dgamma, dbeta, None, None


mix.register_autograd(_backward_of_mix, setup_context=_save_mix)


# Training: x from z, at the end of a run.


@torch.library.custom_op("mgcc_dist::convmixer_norm", mutates_args=())
def norm(z: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor]:
    """(x [B,C,H,W], its norm's statistics [3,C]), x = BN(GELU(z + bias)), from z [C,B,H,W]."""
    channels, batch, height, width = z.shape
    launch = plan(batch, height, width, 0)
    x = z.new_empty(batch, channels, height, width)
    stats = z.new_empty(3, channels, dtype=accumulator_type(z))

    def run(first: int, last: int) -> None:
        kernels.norm_forward[(channels,)](
            z,
            bias,
            gamma,
            beta,
            stats,
            x,
            eps,
            batch,
            channels,
            FIRST=first,
            LAST=last,
            H=height,
            W=width,
            BB=launch.images,
            num_warps=launch.num_warps,
        )

    if not group:
        run(0, 1)
        return x, stats
    run(0, 0)
    _gather_statistics(stats, batch * height * width, group)
    run(1, 1)
    return x, stats


@norm.register_fake
def _(z, bias, gamma, beta, eps, group):
    channels, batch, height, width = z.shape
    return z.new_empty(batch, channels, height, width), z.new_empty(3, channels, dtype=accumulator_type(z))


@torch.library.custom_op("mgcc_dist::convmixer_norm_backward", mutates_args=())
def norm_backward(
    dx: Tensor, z: Tensor, bias: Tensor, gamma: Tensor, stats: Tensor, eps: float, group: str
) -> tuple[Tensor, Tensor]:
    """(dz, [3,C] gradients of bias, gamma, beta) of `norm`."""
    channels, batch, height, width = z.shape
    launch = plan(batch, height, width, 0)
    dz = torch.empty_like(z)
    dparameters = stats.new_empty(3, channels)
    sums = stats.new_empty(2, channels)
    count = batch * height * width

    def run(count: float, first: int, last: int) -> None:
        kernels.norm_backward[(channels,)](
            z,
            bias,
            gamma,
            stats,
            dx,
            dz,
            *dparameters,
            sums,
            count,
            eps,
            batch,
            channels,
            FIRST=first,
            LAST=last,
            H=height,
            W=width,
            BB=launch.images,
            num_warps=launch.num_warps,
        )

    if not group:
        run(float(count), 0, 1)
        return dz, dparameters
    run(1.0, 0, 0)
    _average_sums(sums, count, group)
    run(1.0, 1, 1)
    return dz, dparameters


@norm_backward.register_fake
def _(dx, z, bias, gamma, stats, eps, group):
    return torch.empty_like(z), stats.new_empty(3, z.shape[0])


def _save_norm(ctx, inputs, output):
    z, bias, gamma, _, ctx.eps, ctx.group = inputs
    ctx.save_for_backward(z, bias, gamma, output[1])


def _backward_of_norm(ctx, dx, _dstats):
    z, bias, gamma, stats = ctx.saved_tensors
    dz, dparameters = norm_backward(dx.contiguous(), z, bias, gamma, stats, ctx.eps, ctx.group)
    return dz, *dparameters.to(gamma.dtype).unbind(), None, None


norm.register_autograd(_backward_of_norm, setup_context=_save_norm)


# Evaluation: two kernels a layer.


@torch.library.custom_op("mgcc_dist::convmixer_evaluate", mutates_args=())
def evaluate(
    x: Tensor,
    depthwise: list[Tensor],
    depthwise_eps: float,
    pointwise: list[Tensor],
    pointwise_eps: float,
    channels_outer_in: bool,
    channels_outer_out: bool,
) -> Tensor:
    """One layer by its running statistics. x and the result are [B,C,H,W], or [C,B,H,W] where `channels_outer` says so.

    A list is weight, bias, gamma, beta, running mean and running variance; pointwise's weight has the type of x.
    """
    channels, batch, height, width = _channels_outer_shape(x, channels_outer_in)
    launch = plan(batch, height, width, TILE)
    y = x.new_empty(channels, batch, height, width)
    kernels.depthwise_evaluation[(channels, triton.cdiv(batch, launch.images))](
        x,
        *depthwise,
        y,
        depthwise_eps,
        batch,
        channels,
        CHANNELS_OUTER=channels_outer_in,
        H=height,
        W=width,
        K=depthwise[0].shape[-1],
        BB=launch.images,
        UPCAST=INTERPRETED,
        num_warps=launch.num_warps,
        num_stages=2,
    )
    out = x.new_empty((channels, batch, height, width) if channels_outer_out else (batch, channels, height, width))
    columns = batch * height * width
    tile = 128 if columns * channels >= 128 * 128 * 100 else 64  # enough tiles to occupy a hundred processors
    kernels.pointwise_evaluation[(triton.cdiv(channels, tile), triton.cdiv(columns, tile))](
        y,
        *pointwise,
        out,
        pointwise_eps,
        channels,
        columns,
        CHANNELS_OUTER=channels_outer_out,
        HW=height * width,
        BM=tile,
        BN=tile,
        BK=64 if x.element_size() == 2 else 32,
        UPCAST=INTERPRETED,
        num_warps=8 if tile == 128 else 4,
        num_stages=3,
    )
    return out


@evaluate.register_fake
def _(x, depthwise, depthwise_eps, pointwise, pointwise_eps, channels_outer_in, channels_outer_out):
    channels, batch, height, width = _channels_outer_shape(x, channels_outer_in)
    return x.new_empty((channels, batch, height, width) if channels_outer_out else (batch, channels, height, width))


# Modules.


def supported(module: Any, x: Tensor) -> str | None:
    """None if `module`, a ConvMixer layer or its fused form, can run `x` [B,C,H,W] on these kernels, else why not."""
    depthwise = module.depthwise
    size = depthwise.kernel_size[0]
    if not (x.is_cuda or INTERPRETED):
        return f"the tensor is on {x.device.type}; the kernels need a GPU"
    dtype = activation_type(x)
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


def activation_type(x: Tensor) -> torch.dtype:
    """The type in which a layer computes on `x`: autocast's where that is on."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return x.dtype


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
    source = x.to(activation_type(x)).contiguous()
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
    x = x.to(activation_type(x)).contiguous()
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


# The compiled forms that the ledger keeps.

ACTIVATIONS = frozenset({"z_ptr", "x_ptr", "y_ptr", "dy_ptr", "dtap_ptr", "g_ptr", "dz_ptr", "dx_ptr"})
SCALARS = frozenset({"eps", "pre_eps", "count"})


def _case(name: str, kernel, constants: dict, num_warps: int, num_stages: int = 2, tensor_cores: bool = True) -> Case:
    """With activations, and the evaluation's pointwise weight, in bf16 and the rest in fp32."""
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            continue
        if argument in ACTIVATIONS or (kernel is kernels.pointwise_evaluation and argument == "weight_ptr"):
            signature[argument] = "*bf16"
        elif argument.endswith("_ptr"):
            signature[argument] = "*fp32"
        else:
            signature[argument] = "fp32" if argument in SCALARS else "i32"
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return Case(f"convmixer.{name}", kernel, signature, constants, options, tensor_cores)


def cases() -> list[Case]:
    """Training and evaluation in bf16 as launched at the paper's sizes."""
    listed = []
    for side, batch, size in ((16, 8, 7), (16, 8, 13), (16, 64, 7), (16, 64, 13), (32, 8, 7), (32, 8, 13)):
        shape = f"bf16 {side}x{side} B{batch} k{size}"
        plane = {"H": side, "W": side}

        def tile(launch: Plan, plane: dict = plane, size: int = size) -> dict:
            return {**plane, "K": size, "BB": launch.images, "UPCAST": False}

        for pass_, limit in (("forward", RESIDENT_FORWARD), ("backward", RESIDENT_BACKWARD)):
            launch = plan(batch, side, side, limit)
            kind = "resident" if launch.resident else "staged"
            constants: dict = {"NORM": True}
            if pass_ == "backward":
                constants["TAP"] = True
            if not launch.resident:
                constants |= {"FIRST": 0, "LAST": 2}
            kernel = getattr(kernels, f"{pass_}_{kind}")
            listed.append(_case(f"{pass_} {shape}", kernel, constants | tile(launch), launch.num_warps))
        launch = plan(batch, side, side, TILE)
        constants = {"CHANNELS_OUTER": True} | tile(launch)
        listed.append(_case(f"evaluation_depthwise {shape}", kernels.depthwise_evaluation, constants, launch.num_warps))
        if size == 7:
            launch = plan(batch, side, side, 0)
            constants = {"FIRST": 0, "LAST": 1, **plane, "BB": launch.images}
            for pass_ in ("forward", "backward"):
                kernel = getattr(kernels, f"norm_{pass_}")
                name = f"norm_{pass_} bf16 {side}x{side} B{batch}"
                listed.append(_case(name, kernel, constants, launch.num_warps, tensor_cores=False))
    for tile_size, warps in ((128, 8), (64, 4)):
        constants = {"CHANNELS_OUTER": True, "HW": 256, "BM": tile_size, "BN": tile_size, "BK": 64, "UPCAST": False}
        name = f"evaluation_pointwise bf16 16x16 tile {tile_size}"
        listed.append(_case(name, kernels.pointwise_evaluation, constants, warps, 3))
    return listed
