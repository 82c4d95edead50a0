"""The weights that are trained, wherever their pieces lie: whole on every rank, or in DeepSpeed's shards.

Under ZeRO each rank's optimizer holds a part of the fp32 weights, and the module itself may be bf16 (with every stage)
or hold parts too (stage 3). So averaging and checking go shard by shard, and what is validated or exported is a whole
fp32 copy, gathered parameter by parameter and kept no longer than that takes.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn


def zero_stage(accelerator: Accelerator) -> int:
    """1, 2 or 3 of DeepSpeed's ZeRO; 0 without."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return accelerator.state.deepspeed_plugin.zero_stage


def count_parameters(module: nn.Module) -> int:
    """Of the whole module, also where this rank holds shards of it."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def meta_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` whose tensors take no memory (device meta)."""
    tensors = [*module.parameters(), *module.buffers()]
    empty = {
        id(tensor): nn.Parameter(tensor.detach().to("meta"), tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in tensors
    }
    return copy.deepcopy(module, empty)


class Weights:
    """Weights of a module that `accelerator` has prepared together with `optimizer`.

    `template` is what `meta_copy` made of the module before that.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, template: nn.Module, accelerator: Accelerator
    ) -> None:
        self._module = module
        self._template = template
        self._stage = zero_stage(accelerator)
        self._accelerator = accelerator
        self.shards: list[Tensor] = _shards(module, optimizer, self._stage)
        """fp32: the trained parameters, or this rank's part of them"""

    @property
    def sharded(self) -> bool:
        """Whether each rank holds its own part."""
        return self._stage > 0

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Of all parameters and buffers of the whole module, by name."""
        return {name: list(tensor.shape) for name, tensor in self._template.state_dict().items()}

    def finite(self) -> bool:
        """Whether no trained weight of any rank is NaN or infinite. Collective."""
        wrong = sum((~shard.isfinite()).any().float() for shard in self.shards)
        return self._accelerator.reduce(torch.as_tensor(wrong).to(self._accelerator.device)).item() == 0

    @contextmanager
    def whole(self) -> Iterator[nn.Module]:
        """The module with all its weights and rank 0's buffers, for all ranks; not to be trained. Collective.

        Without ZeRO it is the module itself; with it an fp32 copy, 4 bytes a parameter while it is in use.
        """
        module = self._gathered() if self.sharded else self._module
        broadcast(list(module.buffers()))  # BatchNorm's statistics are of each rank's own images
        yield module

    @torch.no_grad()
    def _gathered(self) -> nn.Module:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        whole = copy.deepcopy(self._template).to_empty(device=self._accelerator.device)
        for target, source in zip(whole.parameters(), self._module.parameters(), strict=True):
            if source.requires_grad:
                target.copy_(safe_get_full_fp32_param(source))
            else:  # the optimizer does not know it
                with GatheredParameters([source]) if self._stage == 3 else nullcontext():
                    target.copy_(source)
        for copied, buffer in zip(whole.buffers(), self._module.buffers(), strict=True):
            copied.copy_(buffer)
        return whole


def _shards(module: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> list[Tensor]:
    if stage == 0:
        return [parameter for parameter in module.parameters() if parameter.requires_grad]
    zero = optimizer.optimizer  # type: ignore[attr-defined]  # DeepSpeed's, in Accelerate's wrapper
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
