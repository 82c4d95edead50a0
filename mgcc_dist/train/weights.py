"""The trained weights, complete on every rank or in shards of DeepSpeed or FSDP2.

Under ZeRO each rank's optimizer holds a shard of the fp32 weights; the module itself may be bf16 (any stage) or sharded
too (stage 3). Under FSDP2 the module's parameters are fp32 shards. So averages and checks work on shards, and
validation and export use a full fp32 copy that is gathered parameter by parameter and freed afterwards.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mgcc_dist.train.fsdp import is_fsdp


def zero_stage(accelerator: Accelerator) -> int:
    """Return DeepSpeed's ZeRO stage (1, 2 or 3); 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return accelerator.state.deepspeed_plugin.zero_stage


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters of the full module, also if this rank holds only shards of it."""
    return sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in module.parameters())


def meta_copy(module: nn.Module) -> nn.Module:
    """Copy `module` with its tensors on the meta device, where they take no memory."""
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

    `template` is the `meta_copy` of the module before that.
    """

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, template: nn.Module, accelerator: Accelerator
    ) -> None:
        self._module = module
        self._template = template
        self._stage = zero_stage(accelerator)
        self._accelerator = accelerator
        self._fsdp = is_fsdp(accelerator)
        self.shards: list[Tensor] = _shards(module, optimizer, self._stage)
        """fp32: the trained parameters, or this rank's part of them"""

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a shard of its own."""
        return self._stage > 0 or self._fsdp

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Shapes of all parameters and buffers of the full module, by name."""
        return {name: list(tensor.shape) for name, tensor in self._template.state_dict().items()}

    def as_distributed(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """Return tensors with the shapes of `shards` under FSDP2 as the distributed tensors that they are parts of."""
        parameters = [parameter for parameter in self._module.parameters() if parameter.requires_grad]
        return {
            str(i): DTensor.from_local(
                tensor, of.device_mesh, of.placements, run_check=False, shape=of.shape, stride=of.stride()
            )
            for i, (tensor, of) in enumerate(zip(tensors, parameters, strict=True))
            if isinstance(of, DTensor)
        }

    def finite(self) -> bool:
        """Return whether no trained weight of any rank is NaN or infinite. Collective."""
        not_finite = sum((~shard.isfinite()).any().float() for shard in self.shards)
        return self._accelerator.reduce(torch.as_tensor(not_finite).to(self._accelerator.device)).item() == 0

    @contextmanager
    def full_module(self) -> Iterator[nn.Module]:
        """Yield the module with all of its weights and rank 0's buffers, on all ranks; not to be trained. Collective.

        Without shards this is the module itself; with shards an fp32 copy, which takes 4 bytes per parameter.
        """
        gather = self._gathered_from_fsdp if self._fsdp else self._gathered
        module = gather() if self.sharded else self._module
        broadcast(list(module.buffers()))  # each rank's BatchNorm has statistics of its own images
        yield module

    @torch.no_grad()
    def _gathered(self) -> nn.Module:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_get_full_fp32_param

        full = copy.deepcopy(self._template).to_empty(device=self._accelerator.device)
        for target, source in zip(full.parameters(), self._module.parameters(), strict=True):
            if source.requires_grad:
                target.copy_(safe_get_full_fp32_param(source))
            else:  # the optimizer has no copy of it
                with GatheredParameters([source]) if self._stage == 3 else nullcontext():
                    target.copy_(source)
        for copied, buffer in zip(full.buffers(), self._module.buffers(), strict=True):
            copied.copy_(buffer)
        return full

    @torch.no_grad()
    def _gathered_from_fsdp(self) -> nn.Module:
        full = copy.deepcopy(self._template).to_empty(device=self._accelerator.device)
        for target, source in zip(full.parameters(), self._module.parameters(), strict=True):
            target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)
        for copied, buffer in zip(full.buffers(), self._module.buffers(), strict=True):
            copied.copy_(buffer)
        return full


@torch.no_grad()  # in which `to_local` returns the shard itself
def _shards(module: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> list[Tensor]:
    if stage == 0:
        trained: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return [each.to_local() if isinstance(each, DTensor) else each for each in trained]
    zero = optimizer.optimizer  # type: ignore[attr-defined]  # DeepSpeed's, in Accelerate's wrapper
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
