"""Nearest x2 upsampling followed by a 3x3 convolution, as four 2x2 convolutions of the small map.

Upsampling repeats each pixel, so the nine taps of an output pixel read only four different pixels of the small map, and
which four depends on whether its row and column are even or odd. In one dimension, with taps w0, w1, w2:

    even output 2i   reads x[i-1], x[i]   with w0, w1 + w2
    odd output 2i+1  reads x[i], x[i+1]   with w0 + w1, w2

The upsampled map never exists, and of the 36 multiply-adds of four output pixels 16 are left. It is exact, also at the
border: the zeros around the upsampled map are those around the small one. The 3x3 weight stays the only parameter, so
state dicts do not change; it is folded in its own precision, so in float32 under autocast.

Two forms. The PyTorch form does all phases in one library convolution with 4 O channels (its [H+1, W+1] result is read
in four shifted windows) and interleaves the phases; four convolutions that read shifted windows of x were slower on a
CPU, since the library copies each window. The Triton form is an implicit GEMM for evaluation: rows are pixels of the
small map (channels last), columns output channels, the inner axis 4 taps x C, one phase a program; bias and ReLU are in
its epilogue and each output is written once, in place. It moves 2 (C H W + 4 O H W) bytes an image in bf16, plus
weights, for 32 C O H W floating-point operations.

In evaluation both fold BN into weight and bias (it follows the convolution directly), once for each state of the
parameters.
"""

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.kernels.case import Case

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def phase_weights(weight: Tensor) -> Tensor:
    """The 2x2 kernels [2,2,O,C,2,2] (row parity, column parity, ...) that replace `weight` [O,C,3,3]."""

    def halves(w: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        before, here, after = w.unbind(dim)
        return torch.stack((before, here + after), dim), torch.stack((before + here, after), dim)

    return torch.stack([torch.stack(halves(rows, 3)) for rows in halves(weight, 2)])


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """[B,C,H,W] -> [B,O,2H,2W], equal to `reference.upsample_conv`; `weight` [O,C,3,3], `bias` [O]."""
    kernels = phase_weights(weight).flatten(0, 2)  # [4 O, C, 2, 2]
    # Row i of the [H+1, W+1] result has read rows i-1 and i of x.
    phases = F.conv2d(x, kernels, None if bias is None else bias.repeat(4), padding=1)
    return Interleave.apply(phases)


class Interleave(torch.autograd.Function):
    """Phases [B,4 O,H+1,W+1] -> [B,O,2H,2W] in the same layout: output (2i+p, 2j+q) is phase (p, q) at (i+p, j+q)."""

    @staticmethod
    def forward(ctx: Any, phases: Tensor) -> Tensor:
        ctx.layout = _layout(phases)
        out = _output(phases)
        for phase, place in zip(_windows(phases), _places(out), strict=True):
            place.copy_(phase)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        batch, out, height, width = gradient.shape
        shape = batch, 4 * out, height // 2 + 1, width // 2 + 1
        phases = torch.zeros(shape, dtype=gradient.dtype, device=gradient.device).to(memory_format=ctx.layout)
        for phase, place in zip(_windows(phases), _places(gradient), strict=True):
            phase.copy_(place)
        return phases


def _layout(x: Tensor) -> torch.memory_format:
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def _output(phases: Tensor) -> Tensor:
    batch, channels, height, width = phases.shape
    shape = batch, channels // 4, 2 * (height - 1), 2 * (width - 1)
    return torch.empty(shape, dtype=phases.dtype, device=phases.device, memory_format=_layout(phases))


def _windows(phases: Tensor) -> list[Tensor]:
    """Of each phase, row parity first, the [B,O,H,W] window that is read."""
    out, height, width = phases.shape[1] // 4, phases.shape[2] - 1, phases.shape[3] - 1
    split = phases.split(out, dim=1)
    return [split[2 * p + q][:, :, p : p + height, q : q + width] for p in (0, 1) for q in (0, 1)]


def _places(out: Tensor) -> list[Tensor]:
    """Where each phase stands in the output."""
    return [out[:, :, p::2, q::2] for p in (0, 1) for q in (0, 1)]


@triton.jit
def phase_gemm(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, y_ptr, B, H, W, C, OUT,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[b,2i+p,2j+q,:] = ReLU(bias + sum over taps (r,s) of x[b,i+p-1+r,j+q-1+s,:] w[p,q,r,s,:,:]), channels last.

    Grid: (pixels / BM, OUT / BN, 4 phases). C divides by BK, OUT by BN. UPCAST is for the interpreter, which multiplies
    bfloat16 wrongly.
    """
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    phase = tl.program_id(2)
    p, q = phase // 2, phase % 2
    j = m % W
    i = (m // W) % H
    b = m // (W * H)
    inside = m < B * H * W
    k = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    per_tap = C // BK
    for step in range(4 * per_tap):
        tap = step // per_tap
        channel = (step % per_tap) * BK + k
        row = i + p - 1 + tap // 2
        column = j + q - 1 + tap % 2
        valid = inside & (row >= 0) & (row < H) & (column >= 0) & (column < W)
        pixel = (b * H + row) * W + column
        xs = tl.load(x_ptr + pixel[:, None] * C + channel[None, :], mask=valid[:, None], other=0.0)
        ws = tl.load(w_ptr + ((phase * 4 + tap) * C + channel)[:, None] * OUT + n[None, :])
        if UPCAST:
            xs, ws = xs.to(tl.float32), ws.to(tl.float32)
        acc = tl.dot(xs, ws, acc, input_precision="ieee")
    acc = tl.maximum(acc + tl.load(bias_ptr + n)[None, :], 0.0)
    place = ((b * 2 * H + 2 * i + p) * 2 * W + 2 * j + q).to(tl.int64)
    tl.store(y_ptr + place[:, None] * OUT + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside[:, None])


def _tile(channels: int, out: int) -> tuple[int, int, int, int]:
    """BM, BN, BK and the number of warps."""
    return (128, 128, 64, 8) if out % 128 == 0 and channels % 64 == 0 else (128, min(64, out), min(32, channels), 4)


@torch.library.custom_op("mgcc::upconv_evaluate", mutates_args=())
def triton_upsample_conv(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """ReLU(upsampled convolution) of x [B,C,H,W]: [B,O,2H,2W], channels last.

    `weight` [2,2,2,2,C,O] (row parity, column parity, row tap, column tap) has x's dtype, `bias` [O] is float32.
    """
    batch, channels, height, width = x.shape
    out = weight.shape[-1]
    x = x.contiguous(memory_format=torch.channels_last)
    shape = batch, out, 2 * height, 2 * width
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    bm, bn, bk, warps = _tile(channels, out)
    grid = (triton.cdiv(batch * height * width, bm), out // bn, 4)
    options = {"num_warps": warps, "num_stages": 3}
    sizes = batch, height, width, channels, out
    phase_gemm[grid](x, weight, bias, y, *sizes, BM=bm, BN=bn, BK=bk, UPCAST=INTERPRETED, **options)
    return y


@triton_upsample_conv.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    shape = batch, weight.shape[-1], 2 * height, 2 * width
    return x.new_empty(shape).to(memory_format=torch.channels_last)


class FusedUpConv(nn.Module):
    """Upsampling, convolution, BN, ReLU of a module with `conv` and `norm`, which it shares: [B,C,H,W] -> [B,O,2H,2W].

    `form` "torch" trains and evaluates; "triton" evaluates, in the dtype of its input or of autocast.
    """

    conv: nn.Conv2d
    norm: nn.BatchNorm2d

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, form: str = "torch") -> None:
        super().__init__()
        self.conv, self.norm, self.form = conv, norm, form
        self._folded: tuple[Any, tuple[Tensor, Tensor]] | None = None

    @classmethod
    def from_module(cls, module: nn.Module, form: str = "torch") -> "FusedUpConv":
        fused = cls(module.conv, module.norm, form)  # type: ignore[arg-type]
        return fused.train(module.training)

    def train(self, mode: bool = True) -> "FusedUpConv":
        self._folded = None  # `weight.data` may be changed without a trace
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or torch.is_grad_enabled():
            return F.relu(self.norm(upsample_conv(x, self.conv.weight, self.conv.bias)), inplace=True)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight, bias = self._weights(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            if self.form == "triton":
                return triton_upsample_conv(x, weight, bias)
            phases = F.conv2d(x, weight, bias, padding=1)
        out = _output(phases)
        for phase, place in zip(_windows(phases), _places(out), strict=True):
            torch.clamp_min(phase, 0, out=place)
        return out

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Weight and bias with BN in them, by phases, as this form reads them."""
        norm = self.norm
        sources = (self.conv.weight, self.conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
        if torch.compiler.is_compiling() or any(t is not None and t.is_inference() for t in sources):
            return self._fold(dtype)  # these have no version to tell whether they changed
        state = dtype, self.form, [(t.data_ptr(), t._version) for t in sources if t is not None]
        if self._folded is None or self._folded[0] != state:
            self._folded = state, self._fold(dtype)
        return self._folded[1]

    def _fold(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        norm: Any = self.norm  # with running statistics, and perhaps without weight and bias
        scale = (norm.running_var + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight
        bias = -norm.running_mean if self.conv.bias is None else self.conv.bias - norm.running_mean
        bias = bias * scale if norm.bias is None else bias * scale + norm.bias
        kernels = phase_weights(self.conv.weight * scale[:, None, None, None])
        if self.form == "triton":
            return kernels.permute(0, 1, 4, 5, 3, 2).to(dtype).contiguous(), bias.float()
        layout = torch.channels_last
        return kernels.flatten(0, 2).to(dtype).contiguous(memory_format=layout), bias.repeat(4).to(dtype)


def supported(module: nn.Module, x: Tensor, form: str = "torch") -> str | None:
    """Why `form` can't take the place of `module` (with `conv` and `norm`) for x [B,C,H,W]; None where it can."""
    conv: Any = module.conv
    norm: Any = module.norm
    plain = conv.kernel_size == (3, 3) and conv.padding == (1, 1) and conv.padding_mode == "zeros"
    if not plain or conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.groups != 1:
        return "its convolution is not 3x3 with stride 1, zero padding 1 and one group"
    if getattr(norm, "running_mean", None) is None:
        return "its norm has no running statistics"
    if not x.is_floating_point():
        return f"its input is {x.dtype}"
    if form == "triton":
        return _triton_supported(module, conv, x)
    return None


def _triton_supported(module: nn.Module, conv: Any, x: Tensor) -> str | None:
    if module.training or torch.is_grad_enabled():
        return "the Triton form is for evaluation without gradients"
    if x.device.type != "cuda" and not INTERPRETED:
        return f"the Triton form needs a GPU, not {x.device.type}"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"its input is {x.dtype}"
    if not _divides(conv.in_channels) or not _divides(conv.out_channels):
        return f"{conv.in_channels} and {conv.out_channels} channels are not powers of two or multiples of 64, from 16"
    return None


def _divides(channels: int) -> bool:
    return channels % 64 == 0 or channels in (16, 32)


def cases() -> list[Case]:
    """The levels of the paper's decoder at 256x256; the constants do not depend on the batch."""
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
    sizes = dict.fromkeys(("B", "H", "W", "C", "OUT"), "i32")
    found = []
    for channels, out in ((1024, 512), (128, 64)):
        bm, bn, bk, warps = _tile(channels, out)
        constants = {"BM": bm, "BN": bn, "BK": bk, "UPCAST": False}
        options = {"num_warps": warps, "num_stages": 3}
        found.append(Case(f"upconv.evaluation bf16 {channels}->{out}", phase_gemm, types | sizes, constants, options))
    return found
