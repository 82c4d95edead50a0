"""Benchmark workloads: one module of the paper's networks with one input and mode, and its minimum FLOPs and bytes."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from mgcc_dist.models.blocks import MSAG, ConvMixer, ConvMixerLayer, UpConv

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
Shape = tuple[int, ...]
Phase = tuple[float, float]
"""floating-point operations, bytes read and written"""


@dataclass(frozen=True)
class Workload:
    op: str
    shape: Shape
    """as in `measured.shape_key`"""
    batch: int
    dtype: torch.dtype
    """float32, or the autocast dtype over float32 parameters"""
    training: bool
    """forward and backward with batch statistics; else forward without gradients, with running statistics"""

    @property
    def name(self) -> str:
        return f"{self.op} {'x'.join(map(str, self.shape))} B{self.batch} {self.precision} {self.mode}"

    @property
    def precision(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def mode(self) -> str:
        return "training" if self.training else "evaluation"

    def module(self, device: torch.device) -> nn.Module:
        torch.manual_seed(0)
        return self.create().to(device).train(self.training)

    def create(self) -> nn.Module:
        """Return the plain module with random weights. A plugin's operation overrides this and `phases`."""
        channels, _, _, *sizes = self.shape
        created = {"upconv": UpConv, "msag": MSAG, "convmixer": ConvMixerLayer, "mixer": ConvMixer}
        return created[self.op](channels, *sizes)

    def inputs(self, count: int, layout: str, device: torch.device) -> list[Tensor]:
        """Return `count` inputs like those an earlier convolution would produce, equal for all layouts."""
        generator = torch.Generator(device).manual_seed(0)
        size = self.batch, *self.shape[:3]
        created = [torch.randn(size, generator=generator, device=device).to(self.dtype) for _ in range(count)]
        return [x.to(memory_format=LAYOUTS[layout]).requires_grad_(self.training) for x in created]

    @property
    def input_bytes(self) -> int:
        channels, height, width = self.shape[:3]
        return self.batch * channels * height * width * self.dtype.itemsize

    def phases(self, direction: str) -> list[Phase]:
        """Return the FLOPs and bytes of phases that must run one after another, because a norm needs all pixels first.

        `direction` is "forward" or "backward". A multiply-add counts as two operations. Each phase reads its inputs and
        writes its outputs once. In backward, values between convolutions are recomputed, not read.
        """
        channels, height, width, *sizes = self.shape
        pixels, size = self.batch * height * width, self.dtype.itemsize
        plane = pixels * channels * size
        backward = direction == "backward"
        if self.op == "upconv":
            out, flops = 4 * pixels * sizes[0] * size, 32.0 * pixels * channels * sizes[0]
            weight = 9 * channels * sizes[0] * size
            if backward:  # reductions of the norm over dy and u; both gradients of the convolution
                return [(0, 2 * out), (2 * flops, 2 * out + 2 * plane + 2 * weight)]
            first = (flops, plane + out + weight)
            return [first, (0, 2 * out)] if self.training else [first]
        if self.op == "msag":
            convolutions, vote = 38.0 * pixels * channels**2, 6.0 * pixels * channels**2
            weight = channels**2 * size
            if backward:  # the 26 passes of msag_backward, which shares all reads it can
                return [(2 * (convolutions + vote), 26 * plane + 44 * weight)]
            if not self.training:
                return [(convolutions + vote, 2 * plane + 22 * weight)]
            return [(convolutions, 4 * plane + 19 * weight), (vote, 4 * plane + 3 * weight), (0, 3 * plane)]
        kernel, layers = (sizes[0], sizes[1] if self.op == "mixer" else 1)
        depthwise, pointwise = 2.0 * kernel**2 * pixels * channels, 2.0 * pixels * channels**2
        weight = channels**2 * size
        if backward:
            return [(2 * depthwise, 3 * plane), (2 * pointwise, 4 * plane + 2 * weight)] * layers
        return [(depthwise, 2 * plane), (pointwise, 2 * plane + weight)] * layers


def levels(widths: tuple[int, ...], size: int) -> list[tuple[Shape, Shape]]:
    """Return the shapes of up-convolution and gate on each decoder level for images of `size`, deepest first."""
    found: list[tuple[Shape, Shape]] = []
    for n, (wide, deep) in enumerate(pairwise(widths)):
        side = size >> n
        found.insert(0, ((deep, side // 2, side // 2, wide), (wide, side, side)))
    return found


PAPER = (64, 128, 256, 512, 1024), 256
QUARTER = (16, 32, 64, 128, 256), 128  # configs/sweeps/table_1_small.yaml
SMALL = (8, 16, 32, 64, 128), 128  # configs/segment/mgcc_busi_small.yaml
DEMO = (16, 32, 64, 128), 64  # configs/segment/mgcc_demo.yaml


def on_gpu(dtypes: list[torch.dtype], quick: bool) -> Iterator[Workload]:
    """Yield the GPU workloads: the paper's network at its batch size of 8, a larger kernel and a larger batch.

    Training comes before evaluation. In each, the largest workload per operation comes first; `quick` yields only
    these.
    """
    *upconvs, upconv = [("upconv", up, 8) for up, _ in levels(*PAPER)]
    *gates, gate = [("msag", gate, 8) for _, gate in levels(*PAPER)]
    first = [upconv, gate, ("convmixer", (1024, 16, 16, 7), 8), ("mixer", (1024, 16, 16, 7, 9), 8)]
    more = [*upconvs, *gates, ("convmixer", (1024, 16, 16, 13), 8), ("convmixer", (1024, 16, 16, 7), 64)]
    for dtype in dtypes:
        for training in (True, False):
            for op, shape, batch in first if quick else first + more:
                yield Workload(op, shape, batch, dtype, training)


def on_cpu(dtypes: list[torch.dtype], quick: bool) -> Iterator[Workload]:
    """Yield the CPU workloads: up-convolutions of the paper's network and the small networks, then gates and mixer.

    The paper's up-convolutions run on one image, in evaluation only. Gates and mixer compare layouts and dtypes.
    """
    for widths, size in [DEMO] if quick else [DEMO, SMALL, QUARTER, PAPER]:
        for dtype in dtypes:
            for up, _ in levels(widths, size):
                yield Workload("upconv", up, 1 if size == 256 else 8, dtype, False)
                if size != 256:
                    yield Workload("upconv", up, 8, dtype, True)
    for dtype in [] if quick else dtypes:
        for _, gate in levels(*PAPER):
            yield Workload("msag", gate, 1, dtype, False)
        yield Workload("mixer", (1024, 16, 16, 7, 9), 1, dtype, False)
