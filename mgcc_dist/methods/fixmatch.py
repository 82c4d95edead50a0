"""FixMatch (Sohn et al. 2020) for segmentation, as implemented in the code of UniMatch (Yang et al. 2023)."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.data.ultrasound import strong_view
from mgcc_dist.methods.boxes import box_masks, cut_mix
from mgcc_dist.methods.config import FixMatchConfig
from mgcc_dist.methods.losses import supervised_loss, two_class_dice_loss
from mgcc_dist.methods.method import Method, weighted_losses
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.train.schedules import Progress

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class FixMatch(Method):
    """The confident pixels of the prediction on a weak view are the labels of a strong view with CutMix.

    Labeled images and weak views pass the network together, strong views in a forward of their own. Labeled images are
    augmented as `data.augment` says; strong views are always those of the augmentation `ultrasound`.
    """

    def __init__(self, config: FixMatchConfig, network: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.network = build_network(network)

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n, weak = batch.labeled, batch.weak_images[batch.labeled :]
        logits = self.network(torch.cat((batch.images[:n], weak)))
        masks, confident = pseudo_masks(logits[n:], self.config.confidence)
        strong, *targets = cut_mix(random_boxes(weak, self.config.cutmix), strong_view(weak), masks, confident)
        consistency = pseudo_loss(self.config.pseudo_loss, self.network(strong), *targets)
        supervised = supervised_loss(logits[:n], batch.masks, self.config.dice_smooth)
        losses = weighted_losses(supervised, consistency, self.config.unlabeled_weight)
        return losses | {"confident": confident.mean()}

    def predictor(self) -> nn.Module:
        return self.network.inference_module()


def pseudo_masks(logits: Tensor, confidence: float) -> tuple[Tensor, Tensor]:
    """Return the predicted masks and which of their pixels are confident, both float [U,1,H,W] of 0 and 1."""
    p = logits.detach().float().sigmoid()
    return (p > 0.5).float(), (torch.maximum(p, 1 - p) >= confidence).float()


def pseudo_loss(kind: str, logits: Tensor, masks: Tensor, confident: Tensor) -> Tensor:
    """Compute the loss of logits [U,1,H,W] against the confident pixels of pseudo-masks: a scalar."""
    if kind == "dice":
        return two_class_dice_loss(logits, masks, confident)
    return (confident * F.binary_cross_entropy_with_logits(logits.float(), masks, reduction="none")).mean()


def random_boxes(images: Tensor, probability: float) -> Tensor:
    """Draw UniMatch's CutMix box for about `probability` of the images, none for the others: bool [B,1,H,W].

    Area 2 % to 40 % of the image, height / width 0.3 to 3.3. The original draws again while a box is larger than the
    image; here it is cut to the image's size.
    """
    area, ratio, top, left, drawn = torch.rand(5, len(images), 1, 1, device=images.device)
    area, ratio = 0.02 + 0.38 * area, 0.3 + (1 / 0.3 - 0.3) * ratio
    boxes = box_masks(images, (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1), top, left)
    return boxes & (drawn < probability)[:, None]
