"""The dtype that kernels compute in: the one PyTorch's own convolutions would choose."""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of convolutions of `x`: autocast's dtype if autocast is enabled, else the dtype of x."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype
