"""What a segmentation network is, and how one is built from its config."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from mgcc_dist.common.components import component_keys
from mgcc_dist.common.errors import UserError
from mgcc_dist.models.config import NETWORKS, NetworkConfig


class Network(nn.Module):
    """Images [B,in_channels or 1,H,W] in [-1,1] -> logits [B,1,H,W].

    In training mode, a network whose config has `auxiliary_outputs` returns (logits, [auxiliary logits, ...]). Its
    arguments are the fields of its config, without the name.
    """

    def inference_module(self) -> nn.Module:
        """Return the part that is needed at inference, which shares its modules with this one; by default all."""
        return self

    def decoders(self) -> list[nn.Module]:
        """Return `inference_module` and, where the network has auxiliary decoders, the same for each of them.

        Auxiliary decoders see features without the perturbations of training.
        """
        return [self.inference_module()]


class EncoderDecoder(Network, ABC):
    """A network whose forward is `decode(encode(x))`; its config has `has_encoder_features`."""

    @abstractmethod
    def encode(self, x: Tensor) -> list[Tensor]:
        """Return the features [B,C,H,W] of every level, shallow to deep."""

    @abstractmethod
    def decode(self, features: list[Tensor]) -> Tensor:
        """Return the logits [B,1,H,W]."""

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))


def build_network(config: NetworkConfig) -> Network:
    """Build the network that `config` names, with freshly initialised weights.

    Raises:
        UserError: it has no separate encoder and decoder, although its config says so.
    """
    network = NETWORKS.load(config)(**component_keys(config))
    if config.has_encoder_features and not isinstance(network, EncoderDecoder):
        raise UserError(f"network {config.name}: has_encoder_features is True, but it is not an EncoderDecoder")
    return network
