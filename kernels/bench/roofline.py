"""What the machine reaches at most, measured in the same run as everything that is compared with it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

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
    """Copy bandwidth and matrix-product peaks, measured here and now, at their best.

    `floor(phases)` is the time in ms that they leave to a workload.
    """

    def __init__(self, device: torch.device, dtypes: list[torch.dtype], milliseconds: float) -> None:
        cuda = device.type == "cuda"
        clock = events(milliseconds) if cuda else host(milliseconds)
        source = torch.ones(2**30 if cuda else 2**27, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        side = 8192 if cuda else 1024
        rounds = {"copy": clock(lambda _: target.copy_(source), 1)}
        for dtype in dtypes:
            rounds[str(dtype)] = clock(_product(side, dtype, device), 1)
        ms = {name: min(map(min, times)) for name, times in take_turns(rounds, 3).items()}
        self.bytes_per_second = 2 * source.nbytes / ms["copy"] * 1e3
        self.flops_per_second = {dtype: 2 * side**3 / ms[str(dtype)] * 1e3 for dtype in dtypes}

    def floor(self, phases: list[Phase], dtype: torch.dtype) -> float:
        peak = self.flops_per_second[dtype]
        return 1e3 * sum(max(flops / peak, moved / self.bytes_per_second) for flops, moved in phases)

    def as_dict(self) -> dict[str, float]:
        rates = {str(dtype).removeprefix("torch."): rate for dtype, rate in self.flops_per_second.items()}
        return {
            "copy_gigabytes_per_second": round(self.bytes_per_second / 1e9, 1),
            **{f"matmul_{name}_tflops": round(rate / 1e12, 3) for name, rate in rates.items()},
        }


def _product(side: int, dtype: torch.dtype, device: torch.device) -> Call:
    # Random, as a GPU runs faster on zeros.
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out: Tensor = torch.empty_like(a)
    return lambda _: torch.mm(a, b, out=out)
