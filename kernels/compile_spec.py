"""What Triton needs to compile a kernel ahead of time. `aot` compiles the specs that kernel files list."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompileSpec:
    """One specialization of a Triton kernel. An operation lists its specs in `compile_specs`."""

    name: str
    """key in the ledger, such as "convmixer.forward bf16 16x16 B8 k7" """
    kernel: Any
    """the `@triton.jit` function"""
    pointers: dict[str, str]
    """tensor argument -> Triton type, such as "*bf16" """
    scalars: dict[str, int | float]
    """number argument -> value at launch; Triton specializes on integers that are 1 or divisible by 16"""
    constants: dict[str, Any]
    """constexpr argument -> value"""
    options: dict[str, int] = field(default_factory=dict)
    """num_warps, num_stages, maxnreg"""
    tensor_cores: bool = True
    """whether the machine code must contain a tensor-core instruction"""
