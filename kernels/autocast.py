"""The type that kernels compute in, as PyTorch's own convolutions would choose it."""

import torch
from torch import Tensor


def computing_dtype(x: Tensor) -> torch.dtype:
    """What convolutions of `x` compute in: autocast's dtype inside autocast, else that of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
