"""What the ahead-of-time compiler needs to know of the gate's kernels: those of MGCC's gates, in bfloat16."""

from typing import Any

import torch
import triton.language as tl

from ..compile_spec import CompileSpec
from .kernels_backward import (
    branch_gradient,
    gate_gradient,
    gate_gradient_sums,
    input_gradient,
    vote_gradient,
    vote_weight_gradient,
)
from .kernels_evaluation import single_kernel_gate
from .kernels_forward import branch_convolutions, gate_kernel, merge_moments, vote_kernel
from .op import split_pixels
from .tiles import (
    convolution_tiles,
    elementwise_block,
    evaluation_tiles,
    power_of_two_divisor,
    single_kernel_channels,
    vote_gradient_tiles,
    vote_tiles,
    weight_tiles,
)

BF16_TENSORS = {"x_ptr", "u_ptr", "v_ptr", "y_ptr", "out_ptr", "weight_ptr", "w_pointwise_ptr", "w_ordinary_ptr"}
BF16_TENSORS |= {"w_dilated_ptr", "w_vote_ptr", "u_pointwise_ptr", "u_ordinary_ptr", "u_dilated_ptr"}
BF16_TENSORS |= {"dx_ptr", "dy_ptr", "du_ptr", "dv_ptr", "g_ptr"}


def gate_pixels(channels: int) -> tuple[int, int]:
    """Return side and number of pixels of the paper's gate with `channels` channels, for 8 images of 256x256."""
    side = 16384 // channels
    return side, 8 * side * side


def make_compile_spec(
    name: str,
    kernel: Any,
    channels: int,
    constants: dict[str, Any],
    options: dict[str, int],
    *,
    tensor_cores: bool = True,
    pixels_per_split: int = 0,
) -> CompileSpec:
    """Build a bfloat16 spec for the gate with `channels` channels."""
    side, pixels = gate_pixels(channels)
    values = {
        "H": side,
        "W": side,
        "pixels": pixels,
        "tiles": pixels // 128,
        "pixels_per_split": pixels_per_split,
        "dy_stride": 2 * channels,  # a slice of the decoder's concatenated maps
        "eps": 1e-5,
    }
    return CompileSpec(
        f"msag.{name} bf16 C{channels}",
        kernel,
        {
            tensor: "*bf16" if tensor in BF16_TENSORS else "*fp32"
            for tensor in kernel.arg_names
            if tensor.endswith("_ptr")
        },
        {argument: value for argument, value in values.items() if argument in kernel.arg_names},
        constants,
        options,
        tensor_cores,
    )


def _forward(channels: int, target: str) -> list[CompileSpec]:
    """Specs for training and for the two-kernel evaluation."""
    shared = {"C": channels, "ACC": tl.float32}
    tiles = convolution_tiles(channels, torch.bfloat16, target)
    blocks = {"TH": tiles.tile_h, "TW": tiles.tile_w, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    with_norm = shared | blocks | {"NORM_OUTPUT": True, "bias_ptr": None, "partial_ptr": None, "counts_ptr": None}
    with_moments = shared | blocks | {"NORM_OUTPUT": False, "norm_ptr": None}
    found = [
        make_compile_spec("branch convolutions with norm", branch_convolutions, channels, with_norm, tiles.options()),
        make_compile_spec(
            "branch convolutions with moments", branch_convolutions, channels, with_moments, tiles.options()
        ),
    ]
    tiles = vote_tiles(channels, torch.bfloat16, target)
    blocks = shared | {"BM": tiles.pixels, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    moments = blocks | {"NORM_INPUT": True, "GATE": False, "vote_norm_ptr": None, "x_ptr": None}
    gated = blocks | {"GATE": True, "bias_ptr": None, "partial_ptr": None, "counts_ptr": None}
    found += [
        make_compile_spec("vote with moments", vote_kernel, channels, moments, tiles.options()),
        make_compile_spec(
            "vote with gate",
            vote_kernel,
            channels,
            gated | {"NORM_INPUT": False, "norm_ptr": None},
            tiles.options(),
        ),
        make_compile_spec(
            "vote with norm and gate",
            vote_kernel,
            channels,
            gated | {"NORM_INPUT": True},
            tiles.options(),
        ),
    ]
    pixels, block = elementwise_block(channels)
    warps = {"num_warps": 8}
    elementwise = shared | {"BM": pixels, "BC": block}
    merged = {"CHANNELS": 3 * channels, "BT": 256, "BC": power_of_two_divisor(3 * channels, 16), "ACC": tl.float32}
    return [
        *found,
        make_compile_spec("gate", gate_kernel, channels, elementwise, warps, tensor_cores=False),
        make_compile_spec("merge moments", merge_moments, channels, merged, warps, tensor_cores=False),
    ]


def _evaluation(channels: int, target: str) -> list[CompileSpec]:
    """Specs for the single kernel; `_forward` has those of the other implementations."""
    if channels not in single_kernel_channels(target):
        return []
    tiles = evaluation_tiles(channels, torch.bfloat16, target)
    blocks = {"TH": tiles.tile_h, "TW": tiles.tile_w, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    blocks |= {"C": channels, "ACC": tl.float32}
    return [make_compile_spec("single kernel", single_kernel_gate, channels, blocks, tiles.options())]


def _backward(channels: int, target: str) -> list[CompileSpec]:
    """Specs for all backward kernels."""
    shared = {"C": channels, "ACC": tl.float32}
    pixels, block = elementwise_block(channels)
    elementwise, warps = shared | {"BM": pixels, "BC": block}, {"num_warps": 8}
    found = [
        make_compile_spec(name, kernel, channels, elementwise, warps, tensor_cores=False)
        for name, kernel in (
            ("gate gradient sums", gate_gradient_sums),
            ("gate gradient", gate_gradient),
            ("branch gradient", branch_gradient),
        )
    ]
    tiles = vote_gradient_tiles(channels, torch.bfloat16, target)
    blocks = shared | {"BM": tiles.pixels, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    found.append(make_compile_spec("vote gradient", vote_gradient, channels, blocks, tiles.options()))
    tiles = convolution_tiles(channels, torch.bfloat16, target)
    blocks = shared | {
        "TH": tiles.tile_h,
        "TW": tiles.tile_w,
        "BN": tiles.block_n,
        "BK": tiles.block_k,
        "UPCAST": False,
    }
    found.append(make_compile_spec("input gradient", input_gradient, channels, blocks, tiles.options()))
    tiles = weight_tiles(channels, torch.bfloat16)
    blocks = shared | {"BM": tiles.tile_w, "BN": tiles.block_n, "BK": tiles.block_k, "UPCAST": False}
    pixels_per_split = split_pixels(channels, gate_pixels(channels)[1], tiles)[1]
    name = "vote weight gradient"
    found.append(
        make_compile_spec(
            name, vote_weight_gradient, channels, blocks, tiles.options(), pixels_per_split=pixels_per_split
        )
    )
    return found


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for the gates of MGCC."""
    return [
        spec
        for channels in (64, 128, 256, 512)
        for listed in (_forward, _evaluation, _backward)
        for spec in listed(channels, target)
    ]
