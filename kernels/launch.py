"""What the launches of all kernels share: the dtypes of accumulators and statistics, and the interpreter's work-around.

Kernels compute in ACC, the accumulator type. UPCAST casts the operands of matrix products to ACC.
"""

from typing import Any

import torch
import triton.language as tl

from .targets import INTERPRETED


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums and statistics: float32, or float64 for float64 inputs (in tests)."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def accumulator_type(dtype: torch.dtype) -> Any:
    """Return Triton's accumulator type: float32, or float64 for gradcheck in the interpreter."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def needs_upcast(dtype: torch.dtype) -> bool:
    """Return whether products need float32 operands: the interpreter multiplies bit patterns of bfloat16.

    See triton issue 11584.
    """
    return INTERPRETED and dtype == torch.bfloat16
