"""Training methods by name. Another method is one file beside these, and a line here."""

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
    """The method that `config` names, with its networks at fresh weights.

    Raises:
        UserError: no method of that name, or it can't train that network.
    """
    if config.name not in METHODS:
        raise UserError(f"method.name {config.name!r} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[config.name](config, network)
