"""Pictures of a mask on its image."""

import numpy as np
import torch
from torch.nn import functional as F

CONTOUR = (255, 90, 78)


def overlay(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Draw the inner border of `mask` bool [H,W] on `image` uint8 [H,W]; returns uint8 [H,W,3]."""
    thickness = max(1, round(min(image.shape) / 250))
    outside = torch.from_numpy(~mask).float()[None]
    for kernel in ((2 * thickness + 1, 1), (1, 2 * thickness + 1)):
        outside = F.max_pool2d(outside, kernel, stride=1, padding=(kernel[0] // 2, kernel[1] // 2))
    drawn = np.repeat(image[:, :, None], 3, axis=2)
    drawn[mask & outside[0].bool().numpy()] = CONTOUR
    return drawn
