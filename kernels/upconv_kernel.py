"""The up-convolution's Triton kernel: an implicit GEMM that writes each of the four phases to its output pixels.

GEMM rows are pixels of the low-resolution map (channels last), columns are output channels, and the reduction runs over
4 taps x C. Each program computes one phase. Bias and ReLU are in the epilogue, and each output is written once. In bf16
this moves 2 (C H W + 4 O H W) bytes per image, plus weights, for 32 C O H W floating-point operations. Evaluation only,
with BatchNorm folded into the weights; nothing is saved for backward.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.compile_spec import CompileSpec
from mgcc_dist.kernels.targets import INTERPRETED


@triton.jit
def phase_gemm(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, y_ptr, B, H, W,
    C: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """y[b,2i+p,2j+q,:] = ReLU(bias + sum over taps (r,s) of x[b,i+p-1+r,j+q-1+s,:] w[p,q,r,s,:,:]), channels last.

    Grid: (pixels / BM, OUT / BN, 4 phases). BK divides C and BN divides OUT. UPCAST casts operands to float32 for the
    interpreter, whose bfloat16 products are wrong.
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
    pixel_out = ((b * 2 * H + 2 * i + p) * 2 * W + 2 * j + q).to(tl.int64)
    tl.store(y_ptr + pixel_out[:, None] * OUT + n[None, :], acc.to(y_ptr.dtype.element_ty), mask=inside[:, None])


def _tile(channels: int, out: int) -> tuple[int, int, int, int]:
    """Return BM, BN, BK and the number of warps."""
    return (128, 128, 64, 8) if out % 128 == 0 and channels % 64 == 0 else (128, min(64, out), min(32, channels), 4)


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
    bm, bn, bk, warps = _tile(channels, out)
    grid = (triton.cdiv(batch * height * width, bm), out // bn, 4)
    options = {"num_warps": warps, "num_stages": 3}
    sizes = batch, height, width, channels, out
    phase_gemm[grid](
        x, weight, bias, y, *sizes, BM=bm, BN=bn, BK=bk, UPCAST=INTERPRETED and x.dtype == torch.bfloat16, **options
    )
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
    for channels, out, side in ((1024, 512, 16), (512, 256, 32), (256, 128, 64), (128, 64, 128)):
        bm, bn, bk, warps = _tile(channels, out)
        constants = {"C": channels, "OUT": out, "BM": bm, "BN": bn, "BK": bk, "UPCAST": False}
        options = {"num_warps": warps, "num_stages": 3}
        sizes: dict[str, int | float] = {"B": 8, "H": side, "W": side}
        found.append(
            CompileSpec(f"upconv.evaluation bf16 {channels}->{out}", phase_gemm, types, sizes, constants, options)
        )
    return found
