"""Floating-point operations of a training step, forward and backward.

They are counted by torch.utils.flop_counter on a copy of the module whose tensors are on the meta device: no memory, no
arithmetic, no GPU, and nothing that the training run could notice. Fused modules count as the plain module that they
replace (kernels/dispatcher.py), so the number is that of the model, whatever computes it. An implementation that needs
fewer operations, such as the up-convolution in phases (16 instead of 36 products), makes the utilisation higher.

Counted are matrix products, convolutions and attention. Norms, activations, resampling, FFTs and the optimizer are not,
as usual.
"""

import copy
import logging
import warnings
from math import prod
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from mgcc_dist.common.errors import reason_of
from mgcc_dist.kernels.dispatcher import KernelDispatcher
from mgcc_dist.train.schedules import Progress

logger = logging.getLogger(__name__)


class Movable(Protocol):
    def to(self, device: str) -> Any: ...


def count_flops(template: nn.Module, batch: Movable, progress: Progress) -> int | None:
    """Return the FLOPs of one forward and backward pass of `batch`, a multiplication and an addition being two.

    Args:
        template: a `meta_copy` of the module; not changed.

    Returns:
        None if the module can't run on the meta device, for example because a value decides what it computes.
    """
    module = copy.deepcopy(template)
    for part in module.modules():
        if isinstance(part, KernelDispatcher):
            part.implementations = {"plain": part.implementations["plain"]}
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward}
    )
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), counter:
            warnings.simplefilter("ignore")
            module(batch.to("meta"), progress)["loss"].backward()
    except Exception as error:  # anything: the run does not depend on it
        logger.info("the FLOPs of a step can't be counted: %s: %s", type(error).__name__, reason_of(error))
        return None
    return counter.get_total_flops()


def _convolution_backward(
    grad_out: list[int], x: list[int], weight: list[int], *args: Any, out_shape: Any = None, **_: Any
) -> int:
    """Return the FLOPs of the gradients that are asked for. torch's own formula is too high for grouped convolutions.

    Each gradient takes as many products as the forward pass.
    """
    transposed, output_mask = args[4], args[7]
    applied = x if transposed else grad_out  # once per element of these, every filter of one channel
    return 2 * prod(applied) * prod(weight[1:]) * sum(output_mask[:2])
