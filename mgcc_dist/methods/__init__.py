"""Training methods by name."""

from mgcc_dist.errors import UserError
from mgcc_dist.methods.method import Method, MethodConfig
from mgcc_dist.methods.mgcc import CrossConsistency
from mgcc_dist.methods.supervised import Supervised
from mgcc_dist.models import NetworkConfig

__all__ = ["Method", "MethodConfig", "build"]

METHODS = {"mgcc": CrossConsistency, "supervised": Supervised}


def build(config: MethodConfig, network: NetworkConfig) -> Method:
    """The method that `config` names, with its networks at fresh weights.

    Raises:
        UserError: no method of that name, or it can't train that network.
    """
    if config.name not in METHODS:
        raise UserError(f"method.name {config.name!r} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[config.name](config, network)
