"""Block sizes of the gate's kernels by channels, dtype and architecture."""

from typing import NamedTuple

import torch

EVALUATION_IMPLEMENTATIONS = ("single_kernel", "two_kernels", "aten_convolutions")


class TileConfig(NamedTuple):
    """Block sizes of a tensor-core kernel."""

    tile_h: int
    """pixel rows per tile"""
    tile_w: int
    """pixel columns per tile"""
    block_n: int
    """output channels per program"""
    block_k: int
    """reduction length per product"""
    num_warps: int
    num_stages: int

    @property
    def pixels(self) -> int:
        return self.tile_h * self.tile_w

    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def power_of_two_divisor(channels: int, largest: int) -> int:
    """Return the largest power of two up to `largest` that divides `channels`."""
    return min(channels & -channels, largest)


def channel_block(channels: int, dtype: torch.dtype) -> int:
    """Return the reduction block of most products: the channels in 128 bytes of a pixel."""
    return power_of_two_divisor(channels, 128 // dtype.itemsize)


def convolution_tiles(channels: int, dtype: torch.dtype, target: str) -> TileConfig:
    """Return the blocks of the branch convolutions and the input gradient: 256 pixels x 64 channels or 128 x 128.

    Both have 64 accumulators per thread and the least L2 traffic possible with that.
    """
    out = power_of_two_divisor(channels, 128)
    rows = 8 if out == 128 else 16
    stages = 2 if target == "gfx942" and out < 128 else 3  # three need 80 KiB of its 64 KiB shared memory
    return TileConfig(rows, 16, out, channel_block(channels, dtype), num_warps=8, num_stages=stages)


def evaluation_tiles(channels: int, dtype: torch.dtype, target: str) -> TileConfig:
    """Return the blocks of the single-kernel gate.

    The accumulators of the votes [pixels, C] and of one branch [pixels, block_n] are live at the same time. With these
    values of block_k they do not spill on sm_80.
    """
    block_k = channel_block(channels, dtype) if channels == 128 else min(channels, 32)
    stages = 2 if target == "sm_120" and channels == 128 else 3  # three stages spill there
    return TileConfig(8, 16, min(channels, 64), block_k, num_warps=8, num_stages=stages)


def vote_tiles(channels: int, dtype: torch.dtype, target: str) -> TileConfig:
    """Return the blocks of the vote. The pixels of a tile are consecutive in memory."""
    out = power_of_two_divisor(channels, 128)
    if target == "gfx942" and out == 128:  # a larger block_k or three stages spill
        return TileConfig(1, 128, out, channel_block(channels, dtype) // 2, num_warps=8, num_stages=2)
    return TileConfig(1, 128, out, channel_block(channels, dtype), num_warps=8, num_stages=3)


def vote_gradient_tiles(channels: int, dtype: torch.dtype, target: str) -> TileConfig:
    """Return the blocks of the vote's input gradient, which sums over C channels and not over 3C like the vote."""
    tiles = vote_tiles(channels, dtype, target)
    # Three stages spill there when compiled by Triton 3.6.
    return (
        tiles._replace(num_stages=2) if target in ("sm_80", "sm_86", "sm_89", "sm_120") and channels >= 256 else tiles
    )


def weight_tiles(channels: int, dtype: torch.dtype) -> TileConfig:
    """Return the blocks of the vote's weight gradient: tile_w of C outputs by block_n of 3C inputs."""
    block = power_of_two_divisor(channels, 128)
    return TileConfig(1, block, block, 128 // dtype.itemsize, num_warps=8, num_stages=3)


def elementwise_block(channels: int) -> tuple[int, int]:
    """Return pixels and channels per program of an elementwise kernel: 4096 elements."""
    out = power_of_two_divisor(channels, 128)
    return 4096 // out, out


def single_kernel_channels(target: str) -> tuple[int, ...]:
    """Return the channels `single_kernel_gate` is compiled for; on gfx942 128 spill with every block size tried."""
    return (16, 32, 64) if target == "gfx942" else (16, 32, 64, 128)


EVALUATION_IMPLEMENTATIONS = ("single_kernel", "two_kernels", "aten_convolutions")
