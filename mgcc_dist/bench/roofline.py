"""The machine's measured limits, from the same run as everything that is compared with them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from mgcc_dist.bench.timing import Call, alternate, cpu_timer, cuda_event_timer
from mgcc_dist.kernels.operation import Phase


@contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Let cuDNN benchmark its algorithms for each shape, and keep float32 exact (no TF32)."""
    backends = torch.backends
    before = backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    try:
        backends.cudnn.benchmark = True
        backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before


class Roofline:
    """Copy bandwidth, and for each dtype the higher FLOP rate of a large matrix product and a convolution.

    Each is the best of several rounds. On an AMD processor, oneDNN's float32 convolution was twice as fast as MKL's
    matrix product.
    """

    def __init__(self, device: torch.device, dtypes: list[torch.dtype], milliseconds: float) -> None:
        cuda = device.type == "cuda"
        timer = cuda_event_timer(milliseconds) if cuda else cpu_timer(milliseconds)
        source = torch.ones(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = 8192 if cuda else 1024
        workloads = {
            dtype: [_matrix_product(side, dtype, device), _convolution(side // 4, dtype, device)] for dtype in dtypes
        }
        rounds = {"copy": timer(lambda _: target.copy_(source), 1)}
        rounds |= {f"{dtype} {i}": timer(call, 1) for dtype in dtypes for i, (call, _) in enumerate(workloads[dtype])}
        ms = {name: min(map(min, times)) for name, times in alternate(rounds, 3).items()}
        self.bytes_per_second = 2 * source.nbytes / ms["copy"] * 1e3
        self.flops_per_second = {
            dtype: 1e3 * max(flops / ms[f"{dtype} {i}"] for i, (_, flops) in enumerate(workloads[dtype]))
            for dtype in dtypes
        }

    def floor(self, phases: list[Phase], dtype: torch.dtype) -> float:
        """Return the minimum milliseconds of `phases`, executed one after another."""
        peak = self.flops_per_second[dtype]
        return 1e3 * sum(max(flops / peak, moved / self.bytes_per_second) for flops, moved in phases)

    def as_dict(self) -> dict[str, float]:
        rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.flops_per_second.items()}
        return {
            "copy_gigabytes_per_second": round(self.bytes_per_second / 1e9, 1),
            **{f"{name}_tflops": round(rate / 1e12, 3) for name, rate in rates.items()},
        }


def _matrix_product(side: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, float]:
    """Return a call and its floating-point operations."""
    # Random values, because a GPU runs faster on zeros.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out), 2.0 * side**3


def _convolution(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, float]:
    """Return a call and its floating-point operations."""
    size = 32
    x = torch.randn(8 if device.type == "cuda" else 1, channels, size, size, device=device)
    weight = torch.randn(channels, channels, 3, 3, device=device)
    x, weight = (each.to(dtype, memory_format=torch.channels_last) for each in (x, weight))
    return lambda _: F.conv2d(x, weight, padding=1), 2.0 * 9 * channels**2 * len(x) * size**2
