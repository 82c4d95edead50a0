"""The losses of Section III-C (Eq. 10 and 11) and their parts, all computed in float32 for logits of any dtype."""

import torch
from torch import Tensor
from torch.nn import functional as F


def supervised_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute 0.5 * BCE + Dice (Eq. 10) of logits [B,1,H,W] against masks [B,1,H,W] in {0,1}: the mean over B."""
    return 0.5 * F.binary_cross_entropy_with_logits(logits.float(), masks) + dice_loss(logits, masks)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Compute 1 - soft Dice per image, averaged over the batch: a scalar.

    Dice = (2 sum(p y) + s) / (sum(p) + sum(y) + s), with s = 1e-5. The paper does not specify this; the released code
    computes it per image, not over the batch, and s gives an empty mask predicted as empty a loss of 0.
    """
    smooth = 1e-5
    probabilities, masks = logits.float().sigmoid().flatten(1), masks.flatten(1)
    overlap = 2 * (probabilities * masks).sum(1) + smooth
    return (1 - overlap / (probabilities.sum(1) + masks.sum(1) + smooth)).mean()


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
