"""What the ahead-of-time compiler needs to know of the ConvMixer kernels: 1024 channels, in bfloat16."""

from typing import Any

from ..compile_spec import CompileSpec
from .kernels_backward import backward_resident, backward_staged
from .kernels_evaluation import depthwise_kernel, pointwise_kernel
from .kernels_forward import forward_resident, forward_staged
from .kernels_norm import final_norm_backward_kernel, final_norm_forward_kernel
from .plan import (
    BACKWARD_RESIDENT,
    FORWARD_RESIDENT,
    TILE_ELEMENTS,
    BackwardPlan,
    forward_options,
    plan_backward,
    plan_launch,
    pointwise_tiles,
)

BF16_TENSORS = frozenset({"z_ptr", "x_ptr", "y_ptr", "dy_ptr", "dtap_ptr", "g_ptr", "dz_ptr", "dx_ptr", "gradient_ptr"})
SPEC_SHAPES = ((16, 8, 7), (16, 64, 7), (32, 8, 7))
"""plane size, batch size, depthwise kernel size"""
SPEC_LARGE_KERNEL = (16, 8, 13)


def make_compile_spec(
    name: str,
    kernel: Any,
    batch: int,
    constants: dict[str, Any],
    options: dict[str, int],
    *,
    bf16_tensors: frozenset[str] = BF16_TENSORS,
    tensor_cores: bool = True,
) -> CompileSpec:
    """Build a spec with 1024 channels: `bf16_tensors` are bf16 pointers, all other tensors fp32."""
    tensors = [argument for argument in kernel.arg_names if argument.endswith("_ptr")]
    values = {"C": 1024, "B": batch, "N": 256 * batch, "count": 256.0 * batch, "eps": 1e-5, "pre_eps": 1e-5}
    return CompileSpec(
        f"convmixer.{name}",
        kernel,
        {argument: "*bf16" if argument in bf16_tensors else "*fp32" for argument in tensors},
        {argument: value for argument, value in values.items() if argument in kernel.arg_names},
        constants,
        options,
        tensor_cores,
    )


def _forward(target: str) -> list[CompileSpec]:
    """Specs for a layer within a stack, the first layer of a stack, and each stage used with SyncBatchNorm."""
    found = []

    def add(name: str, side: int, batch: int, size: int, pre_norm: bool, stages: dict[str, int]) -> None:
        launch = plan_launch(batch, side, side, 0 if stages else FORWARD_RESIDENT)
        kernel = forward_resident if launch.resident else forward_staged
        constants = {
            "PRE_NORM": pre_norm,
            "H": side,
            "W": side,
            "K": size,
            "BB": launch.images_per_tile,
            "UPCAST": False,
        }
        if not launch.resident:
            constants |= stages or {"FIRST_STAGE": 0, "LAST_STAGE": 2}
        options = forward_options(launch, target)
        name = f"{name} bf16 {side}x{side} B{batch} k{size}"
        found.append(
            make_compile_spec(name, kernel, batch, constants, options, tensor_cores=stages.get("FIRST_STAGE", 1) == 1)
        )

    for side, batch, size in (*SPEC_SHAPES, SPEC_LARGE_KERNEL):
        add("forward", side, batch, size, True, {})
    for side, batch, size in SPEC_SHAPES:
        add("forward first layer", side, batch, size, False, {})
    for stage in (0, 1, 2):
        add(f"forward stage {stage}", 16, 8, 7, True, {"FIRST_STAGE": stage, "LAST_STAGE": stage})
    return found


def _backward(target: str) -> list[CompileSpec]:
    """Specs for the backward of `_forward`."""
    found = []

    def add(name: str, side: int, batch: int, size: int, pre_norm: bool, launch: BackwardPlan, stages: dict) -> None:
        kernel = backward_resident if launch.resident else backward_staged
        constants = {
            "PRE_NORM": pre_norm,
            "TAP_GRADIENT": pre_norm,
            "H": side,
            "W": side,
            "K": size,
            "BB": launch.images_per_tile,
            "UPCAST": False,
        }
        name = f"{name} bf16 {side}x{side} B{batch} k{size}"
        products = stages.get("FIRST_STAGE") != 2
        found.append(make_compile_spec(name, kernel, batch, constants | stages, launch.options, tensor_cores=products))

    for side, batch, size, pre_norm in (
        *((*shape, pre_norm) for shape in SPEC_SHAPES for pre_norm in (True, False)),
        (*SPEC_LARGE_KERNEL, True),
    ):
        name = "backward" if pre_norm else "backward first layer"
        launch = plan_backward(batch, side, side, BACKWARD_RESIDENT, pre_norm, target)
        if launch.resident:
            add(name, side, batch, size, pre_norm, launch, {})
        for first, last in launch.stages:
            stage = f" stage {first}" if first == last else ""
            add(f"{name}{stage}", side, batch, size, pre_norm, launch, {"FIRST_STAGE": first, "LAST_STAGE": last})
    launch = plan_backward(8, 16, 16, 0, True, target)
    for part in (0, 1, 2):
        add(f"backward stage {part}", 16, 8, 7, True, launch, {"FIRST_STAGE": part, "LAST_STAGE": part})
    return found


def _norm(target: str) -> list[CompileSpec]:
    """Specs for the forward and backward, with both stages in one launch."""
    found = []
    for side, batch, _ in SPEC_SHAPES:
        launch = plan_launch(batch, side, side, 0)
        constants = {"FIRST_STAGE": 0, "LAST_STAGE": 1, "H": side, "W": side, "BB": launch.images_per_tile}
        for name, kernel in (
            ("norm forward", final_norm_forward_kernel),
            ("norm backward", final_norm_backward_kernel),
        ):
            name = f"{name} bf16 {side}x{side} B{batch}"
            options = {"num_warps": launch.num_warps}
            found.append(make_compile_spec(name, kernel, batch, constants, options, tensor_cores=False))
    return found


def _evaluation(target: str) -> list[CompileSpec]:
    """Specs for both kernels; the pointwise kernel in both of its tile sizes."""
    found = []
    for side, batch, size in (*SPEC_SHAPES, SPEC_LARGE_KERNEL):
        launch = plan_launch(batch, side, side, TILE_ELEMENTS)
        planes = {"H": side, "W": side, "K": size, "BB": launch.images_per_tile, "UPCAST": False}
        options = {"num_warps": launch.num_warps, "num_stages": 2}
        name = f"evaluation depthwise bf16 {side}x{side} B{batch} k{size}"
        found.append(make_compile_spec(name, depthwise_kernel, batch, {"CBHW": True} | planes, options))
    for batch in (8, 4):  # large and small tiles
        tiles, options = pointwise_tiles(1024, 256 * batch, element_size=2)
        blocks = {"CBHW": True, "HW": 256, **tiles, "UPCAST": False}
        name, bf16_tensors = f"evaluation pointwise bf16 16x16 tile {tiles['BM']}", BF16_TENSORS | {"weight_ptr"}
        found.append(make_compile_spec(name, pointwise_kernel, 8, blocks, options, bf16_tensors=bf16_tensors))
    return found


def compile_specs(target: str) -> list[CompileSpec]:
    """Specs for training and evaluation, as launched for the paper's sizes."""
    return [spec for listed in (_forward, _backward, _norm, _evaluation) for spec in listed(target)]
