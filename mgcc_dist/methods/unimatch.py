"""UniMatch (Yang et al. 2023), the first version: FixMatch with two strong views and perturbed features."""

from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mgcc_dist.data.ultrasound import strong_view
from mgcc_dist.methods.boxes import cut_mix
from mgcc_dist.methods.config import UniMatchConfig
from mgcc_dist.methods.fixmatch import pseudo_loss, pseudo_masks, random_boxes
from mgcc_dist.methods.losses import supervised_loss
from mgcc_dist.methods.method import Method, weighted_losses
from mgcc_dist.models.config import NetworkConfig
from mgcc_dist.models.network import EncoderDecoder, build_network
from mgcc_dist.train.schedules import Progress

if TYPE_CHECKING:
    from mgcc_dist.data.batch import Batch


class UniMatch(Method):
    """The confident pixels of a weak view are the labels of three others.

    Image stream: two strong views, each with CutMix boxes of its own. Feature stream: the weak view, with channels of
    the encoder's features on all levels set to zero. Loss on unlabeled images: half the mean of the two strong views,
    and half that of the feature stream.
    """

    def __init__(self, config: UniMatchConfig, network: NetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.network = cast(EncoderDecoder, build_network(network))

    def step(self, batch: "Batch", progress: Progress) -> dict[str, Tensor]:
        n, weak = batch.labeled, batch.weak_images[batch.labeled :]
        features = self.network.encode(torch.cat((batch.images[:n], weak)))
        # As in the original, one forward for both: BN of the decoder normalizes clean and perturbed features together.
        both = [torch.cat((level, F.dropout2d(level, self.config.feature_dropout))) for level in features]
        logits, perturbed = self.network.decode(both).chunk(2)
        masks, confident = pseudo_masks(logits[n:], self.config.confidence)

        kind = self.config.pseudo_loss
        (first, *first_targets), (second, *second_targets) = (
            cut_mix(random_boxes(weak, self.config.cutmix), strong_view(weak), masks, confident) for _ in range(2)
        )
        of_first, of_second = self.network(torch.cat((first, second))).chunk(2)
        image_loss = (pseudo_loss(kind, of_first, *first_targets) + pseudo_loss(kind, of_second, *second_targets)) / 2
        feature_loss = pseudo_loss(kind, perturbed[n:], masks, confident)
        consistency = (image_loss + feature_loss) / 2
        supervised = supervised_loss(logits[:n], batch.masks, self.config.dice_smooth)
        losses = weighted_losses(supervised, consistency, self.config.unlabeled_weight)
        return losses | {"confident": confident.mean()}

    def predictor(self) -> nn.Module:
        return self.network.inference_module()
