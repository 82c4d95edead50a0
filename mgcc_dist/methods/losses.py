"""The losses of Section III-C (Eq. 10 and 11) and their parts, all computed in float32 for logits of any dtype."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def supervised_loss(logits: Tensor, masks: Tensor, dice_smooth: float = 0.0) -> Tensor:
    """Compute 0.5 * BCE + Dice (Eq. 10) of logits [B,1,H,W] against masks [B,1,H,W] in {0,1}: the mean over B."""
    return 0.5 * F.binary_cross_entropy_with_logits(logits.float(), masks) + dice_loss(logits, masks, dice_smooth)


def mean_supervised_loss(decoders: Sequence[Tensor], masks: Tensor, dice_smooth: float) -> Tensor:
    """Average Eq. 10 over the logits [B,1,H,W] of several decoders (Eq. 9): a scalar."""
    return torch.stack([supervised_loss(logits, masks, dice_smooth) for logits in decoders]).mean()


def dice_loss(logits: Tensor, masks: Tensor, smooth: float = 0.0) -> Tensor:
    """Compute 1 - soft Dice per image, averaged over the batch: a scalar.

    Dice = (2 sum(p y) + s) / (sum(p) + sum(y) + s), with s = 1e-5 + smooth H W. The paper does not specify this; the
    released code computes it per image, not over the batch, with s = 1e-5, which gives an empty mask predicted as empty
    a loss of 0. An empty mask's gradient is s / (sum(p) + s)^2 per pixel: none worth the name until s is of the size of
    a false alarm.
    """
    smooth = 1e-5 + smooth * logits[0].numel()
    probabilities, masks = logits.float().sigmoid().flatten(1), masks.flatten(1)
    overlap = 2 * (probabilities * masks).sum(1) + smooth
    return (1 - overlap / (probabilities.sum(1) + masks.sum(1) + smooth)).mean()


def two_class_dice_loss(logits: Tensor, masks: Tensor, region: Tensor) -> Tensor:
    """Compute 1 - soft Dice over the batch's pixels in `region`, averaged over lesion and background: a scalar.

    Dice = (2 sum(p y) + s) / (sum(p^2) + sum(y^2) + s), with s = 1e-5. All arguments are [B,1,H,W]; `masks` and
    `region` are of 0 and 1. The Dice of SSL4MIS, UniMatch and BCP, with (p, 1 - p) for their softmax of two classes.
    """
    smooth = 1e-5
    p = logits.float().sigmoid()
    losses = []
    for score, target in ((p, masks), (1 - p, 1 - masks)):
        overlap, squares = (region * score * target).sum(), (region * (score.square() + target.square())).sum()
        losses.append(1 - (2 * overlap + smooth) / (squares + smooth))
    return torch.stack(losses).mean()


def consistency_loss(main: Tensor, auxiliary: list[Tensor], detach_target: bool) -> Tensor:
    """Average the mean squared difference of probabilities over the K auxiliary decoders (Eq. 11): a scalar.

    `main` and each of `auxiliary` are logits [U,1,H,W] of the same unlabeled images. The paper does not specify the
    norm; the released code squares it and backpropagates into both sides. `detach_target` stops the gradient into the
    main decoder, as in Ouali et al. 2020 (CCT).
    """
    target = main.float().sigmoid()
    if detach_target:
        target = target.detach()
    return torch.stack([probability_mse(logits, target) for logits in auxiliary]).mean()


def probability_mse(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the mean squared difference of sigmoid(logits) and probabilities, both [B,1,H,W]: a scalar."""
    return F.mse_loss(logits.float().sigmoid(), target)
