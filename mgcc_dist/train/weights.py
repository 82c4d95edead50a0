"""The trained weights, complete on every rank or in shards of DeepSpeed or FSDP2.

Under ZeRO each rank's optimizer holds a shard of the fp32 weights; the module itself may be bf16 (any stage) or sharded
too (stage 3). Under FSDP2 the module's parameters are fp32 shards. So averages and checks work on shards. Validation
gathers each fp32 parameter when its layer runs, and frees it afterwards. Export gathers one parameter at a time, and
only rank 0 keeps them, in CPU memory.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

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


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether each rank trains a shard of the weights of its own: under DeepSpeed and FSDP2."""
    return zero_stage(accelerator) > 0 or is_fsdp(accelerator)


def deepspeed_precision(accelerator: Accelerator) -> str:
    """Return the precision of the module's weights, which DeepSpeed sets: "bf16", "fp16", or "no" for float32."""
    if not zero_stage(accelerator):
        return "no"
    settings = accelerator.state.deepspeed_plugin.deepspeed_config
    enabled = {kind: settings.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16")}
    asked = accelerator.mixed_precision
    return next((kind for kind, value in enabled.items() if (asked == kind if value == "auto" else value)), "no")


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


class _GatheredOnRead(dict[str, nn.Parameter | None]):
    """Parameters of a layer that are sharded: its code reads the full tensor, which lives as long as it is in use.

    Iterating (`parameters()`) gives placeholders that have shape, dtype and device, take no memory and are NaN.
    """

    def __init__(
        self, placeholders: Mapping[str, nn.Parameter | None], gather: Callable[[nn.Parameter], Tensor]
    ) -> None:
        super().__init__(placeholders)
        self._gather = gather

    def __getitem__(self, name: str) -> Any:
        placeholder = super().__getitem__(name)
        return None if placeholder is None else self._gather(placeholder)


def gather_on_read(module: nn.Module, gather: Callable[[nn.Parameter], Tensor]) -> None:
    """Make the layers of `module` read `gather(parameter)` instead of their parameters."""
    for layer in module.modules():
        layer._parameters = _GatheredOnRead(layer._parameters, gather)


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
        self._sources: dict[int, nn.Parameter] = {}
        self.shards: list[Tensor] = _shards(module, optimizer, self._stage)
        """fp32: the trained parameters, or this rank's part of them"""

    @property
    def sharded(self) -> bool:
        """Whether each rank holds a shard of its own."""
        return is_sharded(self._accelerator)

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

    def evaluation_module(self) -> nn.Module:
        """Return the module with the full fp32 weights and rank 0's buffers, not to be trained. Collective.

        Without shards this is the module itself. With shards it is a copy whose layers gather their parameters at each
        call, so all ranks must call it equally often.
        """
        module = self._unsharded_copy() if self.sharded else self._module
        broadcast(list(module.buffers()))  # each rank's BatchNorm has statistics of its own images
        return module

    def state_dict(self, network: nn.Module) -> dict[str, Tensor]:
        """Return the state dict of `network`, a part of the `evaluation_module`. Collective.

        With shards only the main process gets it, in CPU memory; the others get {}.
        """
        if not self.sharded:
            return network.state_dict()
        state = {}
        for name, tensor in network.state_dict(keep_vars=True).items():
            full = self._gather(tensor) if isinstance(tensor, nn.Parameter) else tensor
            if self._accelerator.is_main_process:
                state[name] = full.detach().cpu()
        return state

    @torch.no_grad()
    def _unsharded_copy(self) -> nn.Module:
        device = self._accelerator.device
        placeholders = {
            id(parameter): nn.Parameter(
                torch.full((), torch.nan, dtype=parameter.dtype, device=device).expand(parameter.shape), False
            )
            for parameter in self._template.parameters()
        }
        buffers = {
            id(empty): buffer.to(empty.dtype, copy=True)
            for empty, buffer in zip(self._template.buffers(), self._module.buffers(), strict=True)
        }
        module = copy.deepcopy(self._template, placeholders | buffers)
        self._sources = {
            id(placeholder): source
            for placeholder, source in zip(placeholders.values(), self._module.parameters(), strict=True)
        }
        gather_on_read(module, self._gather)
        return module

    @torch.no_grad()
    def _gather(self, placeholder: nn.Parameter) -> Tensor:
        """Return the full parameter that `placeholder` stands for. Collective."""
        source = self._sources[id(placeholder)]
        if isinstance(source, DTensor):
            full = source.full_tensor()
        elif self._stage and source.requires_grad:
            from deepspeed.utils import safe_get_full_fp32_param

            full = safe_get_full_fp32_param(source)
        else:  # DeepSpeed's optimizer has no copy of it
            full = self._gather_untrained(source)
        return full.to(placeholder)

    def _gather_untrained(self, source: nn.Parameter) -> Tensor:
        if self._stage != 3:
            return source
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([source]):
            return source.clone()


@torch.no_grad()  # in which `to_local` returns the shard itself
def _shards(module: nn.Module, optimizer: torch.optim.Optimizer, stage: int) -> list[Tensor]:
    if stage == 0:
        trained: list[Tensor] = [parameter for parameter in module.parameters() if parameter.requires_grad]
        return [each.to_local() if isinstance(each, DTensor) else each for each in trained]
    zero = optimizer.optimizer  # type: ignore[attr-defined]  # DeepSpeed's, in Accelerate's wrapper
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
