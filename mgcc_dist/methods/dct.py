"""Deep co-training, DCT, in two variants.

rotation      SSL4MIS' script, used for the paper's tables: one network; the two views are an image and its rotation by
              k * 90 degrees.
two_networks  Qiao et al. 2018: two networks agree on unlabeled images (Jensen-Shannon divergence) and stay different by
              training each on the other's adversarial examples.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.methods.config import DeepCoTrainingConfig
from mgcc_dist.methods.losses import probability_mse, supervised_loss
from mgcc_dist.methods.method import Method, weighted_losses
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import build_network
from mgcc_dist.train.schedules import Progress, consistency_weight

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class DeepCoTraining(Method):
    """One network with two views, or two networks, of which the first predicts."""

    def __init__(self, config: DeepCoTrainingConfig, network: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.first = build_network(network)
        self.second = build_network(network) if config.views == "two_networks" else None

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        supervised, consistency = self._rotation(batch) if self.second is None else self._two_networks(batch)
        return weighted_losses(supervised, consistency, consistency_weight(self.config.ramp, progress))

    def predictor(self) -> nn.Module:
        return self.first.inference_module()

    def _rotation(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """Half the sum of MSE(p(rot x), stop rot p(x)) and MSE(rot p(x), stop p(rot x))."""
        n = batch.labeled
        turns = int(torch.randint(4, ()))  # on the CPU: its value shapes the computation
        logits = self.first(batch.images)
        on_rotated = self.first(batch.images[n:].rot90(turns, (2, 3)))
        rotated = logits[n:].rot90(turns, (2, 3))
        consistency = 0.5 * (
            probability_mse(on_rotated, rotated.detach().float().sigmoid())
            + probability_mse(rotated, on_rotated.detach().float().sigmoid())
        )
        return supervised_loss(logits[:n], batch.masks, self.config.dice_smooth), consistency

    def _two_networks(self, batch: "Batch") -> tuple[Tensor, Tensor]:
        """L_cot (JSD of both on unlabeled images) + L_dif (each on the other's adversarial examples, all images)."""
        assert self.second is not None
        n, images = batch.labeled, batch.images.detach().requires_grad_()
        first, second = self.first(images), self.second(images)
        supervised = supervised_loss(first[:n], batch.masks, self.config.dice_smooth) + supervised_loss(
            second[:n], batch.masks, self.config.dice_smooth
        )

        p, q = first[n:].float().sigmoid(), second[n:].float().sigmoid()
        agreement = _entropy((p + q) / 2).mean() - (_entropy(p).mean() + _entropy(q).mean()) / 2

        view_difference = []
        for logits, other in ((first, self.second), (second, self.first)):
            pseudo_masks = torch.cat((batch.masks, (logits[n:] > 0).float()))
            attack_loss = F.binary_cross_entropy_with_logits(logits.float(), pseudo_masks)
            (input_gradient,) = torch.autograd.grad(attack_loss, images, retain_graph=True)
            adversarial = (images + self.config.adversarial_step * input_gradient.sign()).detach()
            target = logits.detach().float().sigmoid()
            view_difference.append(F.binary_cross_entropy_with_logits(other(adversarial).float(), target))
        return supervised, agreement + view_difference[0] + view_difference[1]


def _entropy(p: Tensor) -> Tensor:
    """Per-pixel entropy of (p, 1 - p), in nats."""
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p))
