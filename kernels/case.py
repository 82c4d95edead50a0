"""One compiled form of a Triton kernel. Kernel files list theirs by `cases()`; `compile` builds and checks them."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    name: str
    """in the ledger, such as "convmixer.forward bf16 16x16 B8 k7" """
    kernel: Any
    """the `@triton.jit` function"""
    pointers: dict[str, str]
    """tensor argument -> Triton's type, such as "*bf16" """
    scalars: dict[str, int | float]
    """number argument -> a value as launched: Triton compiles integers that 16 divides, and 1, to forms of their own"""
    constants: dict[str, Any]
    """constexpr argument -> value"""
    options: dict[str, int] = field(default_factory=dict)
    """num_warps, num_stages"""
    tensor_cores: bool = True
    """whether its code must hold a tensor-core instruction"""
