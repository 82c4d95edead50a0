"""Training methods by name. A new method is one file in this folder and one line in `METHODS`."""

from mgcc_dist.common.errors import UserError
from mgcc_dist.methods.cct import CrossConsistencyTraining
from mgcc_dist.methods.config import MethodConfig
from mgcc_dist.methods.cps import CrossPseudoSupervision
from mgcc_dist.methods.ctbct import CrossTeaching
from mgcc_dist.methods.cutmix_teacher import CutMixTeacher
from mgcc_dist.methods.dct import DeepCoTraining
from mgcc_dist.methods.mean_teacher import MeanTeacher
from mgcc_dist.methods.method import Method
from mgcc_dist.methods.mgcc import MultiLevelCrossConsistency
from mgcc_dist.methods.supervised import Supervised
from mgcc_dist.methods.uamt import UncertaintyAwareMeanTeacher
from mgcc_dist.models.config import NetworkConfig

METHODS: dict[str, type[Method]] = {
    "supervised": Supervised,
    "mean_teacher": MeanTeacher,
    "uamt": UncertaintyAwareMeanTeacher,
    "dct": DeepCoTraining,
    "cps": CrossPseudoSupervision,
    "ctbct": CrossTeaching,
    "cct": CrossConsistencyTraining,
    "mgcc": MultiLevelCrossConsistency,
    "cutmix_teacher": CutMixTeacher,
}


def build(config: MethodConfig, network: NetworkConfig) -> Method:
    """Build the method `config.name` with freshly initialised networks.

    Raises:
        UserError: unknown method, or it cannot train that network.
    """
    if config.name not in METHODS:
        raise UserError(f"method.name: unknown method {config.name!r}. Choose one of {', '.join(METHODS)}.")
    return METHODS[config.name](config, network)
