"""The losses of Section III-C, Eq. 10 and 11, and parts. All compute in float32, whatever precision the logits have."""

import torch
from torch import Tensor
from torch.nn import functional as F


def supervised_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """0.5 * BCE + Dice (Eq. 10) of logits [B,1,H,W] against masks [B,1,H,W] in {0,1}; a scalar, the mean over B."""
    return 0.5 * F.binary_cross_entropy_with_logits(logits.float(), masks) + dice_loss(logits, masks)


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - soft Dice of each image, averaged over the images of the batch.

    Dice = (2 sum(p y) + s) / (sum(p) + sum(y) + s), with s = 1e-5. The paper leaves the form open; this is the released
    code's: per image, not over the batch, and s keeps an empty mask predicted as empty at loss 0.
    """
    smooth = 1e-5
    probabilities, masks = logits.float().sigmoid().flatten(1), masks.flatten(1)
    overlap = 2 * (probabilities * masks).sum(1) + smooth
    return (1 - overlap / (probabilities.sum(1) + masks.sum(1) + smooth)).mean()


def consistency_loss(main: Tensor, auxiliary: list[Tensor], detach_target: bool) -> Tensor:
    """Mean over the K auxiliary decoders of the mean squared difference of probabilities (Eq. 11); a scalar.

    `main` and each of `auxiliary` are logits [U,1,H,W] of the same unlabeled images. The paper leaves the norm open;
    the released code squares it and lets the gradient flow into both sides. `detach_target` stops it on the main
    decoder's side, as in Ouali et al. 2020 (CCT).
    """
    target = main.float().sigmoid()
    if detach_target:
        target = target.detach()
    return torch.stack([probability_mse(logits, target) for logits in auxiliary]).mean()


def probability_mse(logits: Tensor, target: Tensor) -> Tensor:
    """Mean squared difference between sigmoid(logits) and probabilities, both [B,1,H,W]; a scalar."""
    return F.mse_loss(logits.float().sigmoid(), target)
