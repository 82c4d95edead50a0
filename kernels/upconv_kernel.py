"""The up-convolution's Triton form: an implicit GEMM that writes the four phases into their places.

Rows are pixels of the small map (channels last), columns output channels, the inner axis 4 taps x C; one phase a
program. Bias and ReLU are in the epilogue, and each output is written once. In bf16 it moves 2 (C H W + 4 O H W) bytes
an image, plus weights, for 32 C O H W floating-point operations. For evaluation, with BN folded into the weights.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mgcc_dist.kernels.case import Case
from mgcc_dist.kernels.targets import INTERPRETED


@triton.jit
def phase_gemm(  # type: ignore[no-untyped-def]
    x_ptr, w_ptr, bias_ptr, y_ptr, B, H, W,
    C: tl.constexpr, OUT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, UPCAST: tl.constexpr,
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


@torch.library.custom_op("mgcc_dist::upconv_evaluate", mutates_args=())
def upconv_evaluate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
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
    phase_gemm[grid](
        x, weight, bias, y, *sizes, BM=bm, BN=bn, BK=bk, UPCAST=INTERPRETED and x.dtype == torch.bfloat16, **options
    )
    return y


@upconv_evaluate.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    batch, _, height, width = x.shape
    shape = batch, weight.shape[-1], 2 * height, 2 * width
    return x.new_empty(shape).to(memory_format=torch.channels_last)


def cases(target: str) -> list[Case]:
    """The levels of the paper's decoder at 256x256, of a batch of 8."""
    types = {"x_ptr": "*bf16", "w_ptr": "*bf16", "bias_ptr": "*fp32", "y_ptr": "*bf16"}
    found = []
    for channels, out, side in ((1024, 512, 16), (512, 256, 32), (256, 128, 64), (128, 64, 128)):
        bm, bn, bk, warps = _tile(channels, out)
        constants = {"C": channels, "OUT": out, "BM": bm, "BN": bn, "BK": bk, "UPCAST": False}
        options = {"num_warps": warps, "num_stages": 3}
        sizes: dict[str, int | float] = {"B": 8, "H": side, "W": side}
        found.append(
            Case(
                f"upconv.evaluation bf16 {channels}->{out}",
                phase_gemm,
                types,
                dict[str, int | float](sizes),
                constants,
                options,
            )
        )
    return found
