"""The up-convolution's Triton kernel; the folder's docstring describes it."""

import triton
import triton.language as tl


@triton.jit
def phase_gemm(  # type: ignore[no-untyped-def]
    x_ptr,  # [B,H,W,C]
    w_ptr,  # [2,2,2,2,C,OUT]: row parity, column parity, row tap, column tap
    bias_ptr,  # [OUT]
    y_ptr,  # [B,2H,2W,OUT]
    B, H, W,
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
