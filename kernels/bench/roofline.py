"""What the machine reaches at most, measured in the same run as everything that is compared with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional as F

from mgcc_dist.kernels.bench.timing import Call, events, host, take_turns
from mgcc_dist.kernels.bench.workloads import Phase


@contextmanager
def fastest_library() -> Iterator[None]:
    """cuDNN tries its algorithms for each shape and takes the fastest; float32 stays float32."""
    backends = torch.backends
    before = backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32
    try:
        backends.cudnn.benchmark = True
        backends.cudnn.allow_tf32 = backends.cuda.matmul.allow_tf32 = False
        yield
    finally:
        backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before


class Roofline:
    """Copy bandwidth, and by dtype the rate of a large matrix product or of a convolution, whichever is higher.

    Each at its best, measured here and now. On an AMD processor oneDNN's convolution in float32 reached twice the rate
    of MKL's product.
    """

    def __init__(self, device: torch.device, dtypes: list[torch.dtype], milliseconds: float) -> None:
        cuda = device.type == "cuda"
        clock = events(milliseconds) if cuda else host(milliseconds)
        source = torch.ones(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = 8192 if cuda else 1024
        works = {dtype: [_product(side, dtype, device), _convolution(side // 4, dtype, device)] for dtype in dtypes}
        rounds = {"copy": clock(lambda _: target.copy_(source), 1)}
        rounds |= {f"{dtype} {i}": clock(call, 1) for dtype in dtypes for i, (call, _) in enumerate(works[dtype])}
        ms = {name: min(map(min, times)) for name, times in take_turns(rounds, 3).items()}
        self.bytes_per_second = 2 * source.nbytes / ms["copy"] * 1e3
        self.flops_per_second = {
            dtype: 1e3 * max(flops / ms[f"{dtype} {i}"] for i, (_, flops) in enumerate(works[dtype]))
            for dtype in dtypes
        }

    def floor(self, phases: list[Phase], dtype: torch.dtype) -> float:
        """Milliseconds that `phases`, one after another, take at least."""
        peak = self.flops_per_second[dtype]
        return 1e3 * sum(max(flops / peak, moved / self.bytes_per_second) for flops, moved in phases)

    def as_dict(self) -> dict[str, float]:
        rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.flops_per_second.items()}
        return {
            "copy_gigabytes_per_second": round(self.bytes_per_second / 1e9, 1),
            **{f"{name}_tflops": round(rate / 1e12, 3) for name, rate in rates.items()},
        }


def _product(side: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, float]:
    """A call and its floating-point operations."""
    # Random, as a GPU runs faster on zeros.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out), 2.0 * side**3


def _convolution(channels: int, dtype: torch.dtype, device: torch.device) -> tuple[Call, float]:
    size = 32
    x = torch.randn(8 if device.type == "cuda" else 1, channels, size, size, device=device)
    weight = torch.randn(channels, channels, 3, 3, device=device)
    x, weight = (each.to(dtype, memory_format=torch.channels_last) for each in (x, weight))
    return lambda _: F.conv2d(x, weight, padding=1), 2.0 * 9 * channels**2 * len(x) * size**2
